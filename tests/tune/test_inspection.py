"""scripts/inspect_kernels.py: what the compiler made of every kernel in every configuration of the tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastgan.ops.choice import shipped_tables
from fastgan.ops.tables import Measurement, Problem, write_table
from fastgan.tune.inspection import _occupancy, _plain, launches_of_tables
from tests.kernels.compile_kernels import MATRIX_KERNELS
from tests.processes import main_of, run_compiling

SCRIPT = Path(__file__).parents[2] / "scripts" / "inspect_kernels.py"
FIELDS = {
    *("kernel", "config", "dtype", "target", "registers", "spill_bytes", "shared_bytes"),
    *("matrix_instruction", "async_copy", "occupancy"),
}


def inspect(*arguments):
    # Another process: in this one the interpreter may have taken the place of the compiler.
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


def rows_of(*arguments):
    done = inspect("--json", *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout)


def assert_good_for_hopper(rows):
    matrix = [row for row in rows if row["kernel"] in MATRIX_KERNELS and row["dtype"] == "bfloat16"]
    assert matrix
    for row in matrix:
        assert row["spill_bytes"] == 0, row
        # Its matrix units take 64 rows at least; where there are fewer, the smaller ones do.
        if row["config"].get("BLOCK_M", 64) >= 64:
            assert row["matrix_instruction"] == "wgmma", row


@pytest.mark.slow
def test_every_kernel_in_its_default_configuration_and_in_those_of_the_tables():
    rows = rows_of("--dtype", "bf16")
    assert all(row.keys() == FIELDS and row["target"] == "sm_90" and 0 < row["occupancy"] <= 1 for row in rows)
    assert_good_for_hopper(rows)
    kernels = {row["kernel"] for row in rows}
    assert {"tile_statistics_kernel", "conv_epilogue_kernel", "merge_statistics_kernel", "bce_kernel"} <= kernels
    found = {json.dumps([row["kernel"], row["config"]]) for row in rows}
    tables = {launch.key: launch for launch in launches_of_tables(shipped_tables())}
    assert tables
    for launch in tables.values():
        assert json.dumps([launch.kernel, {name: _plain(value) for name, value in launch.options.items()}]) in found


@pytest.fixture
def table(tmp_path):
    tile = {"block_m": 64, "block_n": 64, "block_k": 32, "num_warps": 4, "num_stages": 3}
    problem = Problem("down", "bfloat16", 16, (8, 8), (16, 16), 64, 32, (4, 4), (2, 2), (1, 1))
    lost = problem._replace(batch=32)
    rows = {problem: Measurement("triton", tile, 1.0, 2.0, 16), lost: Measurement("cudnn", None, None, 2.0, 32)}
    write_table(tmp_path / "table.json", "NVIDIA T800", {}, rows)
    return tmp_path / "table.json"


@pytest.mark.parametrize(
    "target, instruction",
    (
        pytest.param("sm_80", "mma", marks=pytest.mark.slow),
        ("sm_90", "wgmma"),
        pytest.param("sm_100", "tcgen05", marks=pytest.mark.slow),
    ),
)
def test_a_table(target, instruction, table):
    (row,) = rows_of("--target", target, "--only-tables", "--table", table)
    assert row["kernel"] == "down_kernel" and row["dtype"] == "bfloat16" and row["target"] == target
    assert row["config"]["BLOCK_M"] == 64 and row["config"]["num_stages"] == 3
    assert row["matrix_instruction"] == instruction
    assert row["spill_bytes"] == 0 and row["registers"] > 0 and row["shared_bytes"] > 0


def test_what_it_prints(table):
    printed = inspect("--target", "sm_90", "--only-tables", "--table", table).stdout
    head, row = printed.splitlines()[:2]
    assert "registers" in head
    assert row.split()[0] == "down_kernel" and "64×64×32×4×3" in row and "wgmma" in row


def test_bad_input(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which the script takes out
    main = main_of("inspect_kernels")
    assert main(["--table", str(tmp_path / "nothing.json")]) == 2
    assert "nothing.json" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--target", "sm_70"])
    capsys.readouterr()
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    assert main(["--table", str(tmp_path / "notes.json")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: --table") and "notes.json" in err and err.count("\n") == 1


INTERRUPTED = """
from tests.processes import main_of

main = main_of("inspect_kernels")


def interrupted(*arguments):
    raise KeyboardInterrupt


main.__globals__["launches_of_defaults"] = interrupted
raise SystemExit(main([]))
"""


def test_an_interruption():
    done = run_compiling("-c", INTERRUPTED)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    "registers, shared, warps, expected",
    ((32, 0, 4, 1.0), (128, 0, 4, 0.25), (255, 0, 8, 0.125), (32, 113 << 10, 8, 0.25), (32, 228 << 10, 8, 0.0)),
)
def test_occupancy(registers, shared, warps, expected):
    assert _occupancy(90, registers, shared, warps) == expected
