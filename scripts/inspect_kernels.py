"""What the compiler makes of our kernels, without a GPU: `python scripts/inspect_kernels.py --target sm_90`.

Compiles every kernel as a step of the 64×64 DCGAN starts it, and the matrix kernels in every configuration of the
tables of measured convolutions, and shows registers, spilled bytes, shared memory, matrix instruction, asynchronous
copies and occupancy (the share of a multiprocessor's warps that fit).

Exit status: 0, 1 if a kernel does not compile, 2 for anything wrong with the input, 130 after Ctrl-C.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter would take the compiler's place

from fastgan.backend import KERNEL_DTYPES, PRECISIONS
from fastgan.command_line import aligned, run_command
from fastgan.ops.choice import shipped_tables
from fastgan.ops.tables import why_no_table
from fastgan.tune.inspection import TARGETS, inspect, launches_of_defaults, launches_of_tables

_COLUMNS = (
    "kernel",
    "tile",
    "dtype",
    "registers",
    "spill_bytes",
    "shared_bytes",
    "matrix_instruction",
    "async_copy",
    "occupancy",
)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [f"sm_{capability}" for capability in TARGETS]
    parser.add_argument(
        "--target",
        default="sm_90",
        choices=names,
        help="sm_80 is an A100, sm_90 an H100, sm_100 a B200 (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of objects")
    parser.add_argument("--dtype", choices=PRECISIONS, help="of the kernels outside the tables (default: all three)")
    parser.add_argument(
        "--table", action="append", type=Path, metavar="FILE", help="tables (default: the shipped ones)"
    )
    parser.add_argument("--only-tables", action="store_true", help="only the configurations in the tables")
    return parser.parse_args(argv)


def main(argv=None):
    options = parse(argv)
    return run_command(lambda: show(options), vars(options))


def show(options):
    for path in options.table or ():
        why = why_no_table(path) if path.is_file() else "there is no such file"
        if why:
            raise ValueError(f"table {str(path)!r} is no table of measured convolutions: {why}")
    found = launches_of_tables(options.table if options.table is not None else shipped_tables())
    if not options.only_tables:
        found += launches_of_defaults([PRECISIONS[options.dtype]] if options.dtype else KERNEL_DTYPES)
    rows = inspect(found, int(options.target.removeprefix("sm_")))
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    return 1 if any("error" in row for row in rows) else 0


def table(rows):
    lines = [_COLUMNS]
    for row in rows:
        tile = "×".join(str(value) for name, value in row["config"].items() if name.startswith(("BLOCK", "num_")))
        lines.append([str(dict(row, tile=tile).get(name, "-")) for name in _COLUMNS])
    return "\n".join(
        [*aligned(lines), *(f"{row['kernel']} {row['config']}: {row['error']}" for row in rows if "error" in row)]
    )


if __name__ == "__main__":
    sys.exit(main())
