"""The command line of the tuner: `python -m fastgan.tune --help`."""

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from fastgan import backend
from fastgan.checks import in_short
from fastgan.command_line import print_what_can_be_shown
from fastgan.files import check_writable
from fastgan.kernels.launch import MatrixTile
from fastgan.ops import choice
from fastgan.ops.tables import load_table, why_no_table, write_table
from fastgan.tune.workloads import SHAPE_HELP, problems_of

_MODELS, _BATCHES = ("dcgan28", "dcgan64", "dcgan128"), (64, 128, 256, 1024)
_QUICK_MODELS, _QUICK_BATCHES = ("dcgan64",), (128, 1024)
_EPILOG = f"""what to tune:
  dcgan64               the DCGAN for images of 64×64, as scripts/train.py builds it; any of its image sizes
  package.module:name   the model that calling `name` gives; --input says what it is called with
  a shape               conv:… or convt:… (transposed), such as
                        {SHAPE_HELP}

The table is kept for this GPU in $FASTGAN_CACHE, $XDG_CACHE_HOME/fastgan or ~/.cache/fastgan, and wins over the one
that comes with fastgan. What was measured before with the same versions stays in it.
"""


def main(arguments=None):
    """Tune, print and write a table.

    Returns the exit status: 0, 1 if a kernel was wrong or failed, 2 if impossible, 130 after Ctrl-C.
    """
    print_what_can_be_shown()
    options = _parser().parse_args(arguments)
    try:
        problems = problems_of(
            options.what or (_QUICK_MODELS if options.quick else _MODELS),
            options.batch or (_QUICK_BATCHES if options.quick else _BATCHES),
            [backend.PRECISIONS[name] for name in options.dtype or ("bf16",)],
            options.input,
        )
    except ValueError as error:
        return _refuse(error)
    if not problems:
        return _refuse("there is nothing to tune: no convolution among these that our kernels compute")
    if not torch.cuda.is_available():
        return _refuse("tuning measures a CUDA GPU, and torch sees none here")
    if not backend.HAS_TRITON:
        return _refuse("the triton package is not installed")
    if backend.interpreted():
        return _refuse("TRITON_INTERPRET is set: the interpreter's kernels are not the GPU's")

    from fastgan.tune.session import tune

    gpu = torch.cuda.get_device_name()
    versions = _versions()
    try:
        path = _checked(options.out, gpu)
    except ValueError as error:
        return _refuse(error)
    save, saved = _saver(path, gpu, versions), []

    def save_and_tell(measured):
        save(measured)
        saved.append(len(measured))

    print(f"{len(problems)} convolutions on {gpu}, {', '.join(f'{k} {v}' for k, v in versions.items())}", flush=True)
    began = time.perf_counter()
    try:
        measured, failures = tune(problems, report=_line, save=save_and_tell, processes=options.jobs)
    except KeyboardInterrupt:
        print(f"interrupted; {_what_was_kept(path, saved)}", file=sys.stderr)
        return 130
    except ValueError as error:
        return _refuse(error)
    except (RuntimeError, OSError) as error:  # the GPU, or the compilers: nothing more can be measured
        print(f"fastgan.tune: {in_short(error)}; {_what_was_kept(path, saved)}", file=sys.stderr)
        return 1
    _summary(measured, failures, path, time.perf_counter() - began)
    return 1 if failures else 0


def _what_was_kept(path, saved):
    return f"what was measured by then is in {path}" if saved else "nothing was measured by then"


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m fastgan.tune",
        description="Measure on this GPU, for each convolution and direction, our Triton kernels in several tiles "
        "against cuDNN, and keep which is the faster.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="*", help=f"models and shapes, see below (default: {' '.join(_MODELS)})")
    parser.add_argument(
        "--batch",
        type=_counts,
        help="batch sizes, 64,128 (default: 64,128,256,1024; discriminators also at twice each)",
    )
    parser.add_argument("--dtype", type=_dtypes, help="bf16, fp16, fp32 or several, bf16,fp16 (default: bf16)")
    parser.add_argument("--input", type=_counts, metavar="C,H,W", help="one input of a model given as module:name")
    parser.add_argument("--quick", action="store_true", help="only 64×64 images and batches of 128 and 1024")
    parser.add_argument("--out", metavar="FILE", help="write the table here, not to the user's cache")
    parser.add_argument("--jobs", type=_count, help="processes that compile (default: the number of cores, less one)")
    return parser


def _count(text):
    counts = _counts(text)
    if len(counts) > 1:
        raise argparse.ArgumentTypeError(f"must be one positive integer; got {text!r}")
    return counts[0]


def _counts(text):
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"must be positive integers with commas between them; got {text!r}")
    return counts


def _dtypes(text):
    names = text.split(",")
    if not set(names) <= set(backend.PRECISIONS):
        raise argparse.ArgumentTypeError(
            f"must be of {', '.join(backend.PRECISIONS)}, with commas between them; got {text!r}"
        )
    return names


def _refuse(why):
    print(f"fastgan.tune: {why}", file=sys.stderr)
    return 2


def _checked(out, gpu):
    """The file to write: `out` if it is given and may be replaced, else the user's own table of this GPU."""
    if out is None:
        out = choice.user_table_path(gpu)
        if out is None:
            raise ValueError(
                "there is no home folder to keep the table in: name a file with --out, or set FASTGAN_CACHE"
            )
        check_writable("the user's table", out)
        return out
    out = os.path.expanduser(out)
    if Path(out).is_dir():
        raise ValueError(f"--out must be a file; {out!r} is a folder")
    if why := why_no_table(out, gpu):
        raise ValueError(f"--out {out!r} is there and no table of this GPU ({why}): choose another name, or remove it")
    check_writable("--out", out)
    return Path(out)


def _versions():
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__, "cudnn": str(torch.backends.cudnn.version())}


def _saver(path, gpu, versions):
    """A function that writes measurements to `path`, with those that are there already from the same versions."""
    _, why = load_table(path, gpu, versions)
    if why is not None:
        print(f"the table of measured convolutions {path} is replaced: {why}", file=sys.stderr)

    def save(measured):
        known, _ = load_table(path, gpu, versions)  # again: another GPU's tuner may write to it, too
        try:
            write_table(path, gpu, versions, {**known, **measured})
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error

    return save


def _line(problem, result, seconds):
    """Print what came of one Problem."""
    head = f"{seconds:6.1f} s  {problem.shape:<40} {problem.kind:<19} {problem.dtype} {problem.batch:>5}"
    if result.measurement is None:
        print(f"{head}  not measured: {result.failure}", flush=True)
        return
    implementation, tile, ours, cudnn, _ = result.measurement
    ours, tile = ("-", "") if ours is None else (f"{ours:.1f}", MatrixTile(**tile))
    print(f"{head}  ours {ours:>8} µs  cuDNN {cudnn:>8.1f} µs  {implementation:<6} {tile}", flush=True)
    for candidate in result.candidates:
        if candidate.failure:
            print(f"{'':10}{candidate.tile}: {candidate.failure}", flush=True)


def _summary(measured, failures, path, seconds):
    won = sum(m.implementation == "triton" for m in measured.values())
    print(f"{len(measured)} measured in {seconds:.0f} s: our kernel is the faster in {won}; written to {path}")
    if failures:
        print(f"{failures} candidates or convolutions failed, see above; none of them is ever chosen")


if __name__ == "__main__":
    sys.exit(main())
