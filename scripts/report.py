"""Turn benchmark results into RESULTS.md: `python scripts/report.py --run` measures this machine and reports it.

    python scripts/report.py --run              tests on the GPU if there is one, benchmarks, profile, report
    python scripts/report.py FILE.json ...      take in what pytest-benchmark or benchmarks.profiling wrote
    python scripts/report.py                    write RESULTS.md and the plots anew

Every file taken in is kept as it is in benchmarks/results/, named after its device. Exit status: 0; 1 if the tests on
the GPU fail or the benchmarks leave no results; 2 for anything wrong with the input; 130 after Ctrl-C.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

try:
    from benchmarks import plots, reading, tables
    from fastgan.command_line import run_command
    from fastgan.files import check_writable
except ModuleNotFoundError as missing:
    print(f"error: {missing}; the benchmarks' packages come with: pip install -e '.[dev]'", file=sys.stderr)
    sys.exit(2)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="JSON of pytest-benchmark, or a profile.json")
    parser.add_argument("--run", action="store_true", help="measure this machine first")
    parser.add_argument("--full", action="store_true", help="with --run: every batch and image size, not the usual few")
    parser.add_argument(
        "--models", action="store_true", help="with --run: networks of public GANs too, minutes of compiling"
    )
    parser.add_argument("--no-checks", action="store_true", help="with --run: leave out the tests on the GPU")
    parser.add_argument("--root", type=Path, default=ROOT, help="where RESULTS.md and benchmarks/results/ are")
    return parser.parse_args(argv)


def main(argv=None):
    options = parse(argv)
    return run_command(lambda: take_in_and_report(options), vars(options))


def take_in_and_report(options):
    for name in ("full", "models", "no_checks"):
        if getattr(options, name) and not options.run:
            raise ValueError(f"{name} says what --run measures: give --run too, or leave it out")
    results = options.root / "benchmarks" / "results"
    for folder in (options.root, results):
        check_writable("root", folder, folder=True)
    files = [Path(file) for file in options.files]
    loaded = [reading.load(file) for file in files]  # all of them, before anything is written
    _check_different(files, loaded)
    with tempfile.TemporaryDirectory() as folder:
        if options.run:
            measured = measure(Path(folder), options.full, options.models, not options.no_checks)
            if not measured:
                return 1
            files, loaded = files + measured, loaded + [reading.load(path) for path in measured]
            _check_different(files, loaded)
        results.mkdir(parents=True, exist_ok=True)
        for file, content in zip(files, loaded, strict=True):
            keep(file, results / f"{content.name}.json")
    report(options.root, results)
    return 0


def _check_different(files, loaded):
    """One file for each device: a second one would take the place of the first."""
    known = {}
    for file, content in zip(files, loaded, strict=True):
        if content.name in known:
            raise ValueError(f"{known[content.name]} and {file} are both from {content.device}: give one of them")
        known[content.name] = file


def measure(folder, full, models, checks):
    """Run checks, benchmarks and profile, each in a process of its own; the files with results, if there are any."""
    import torch

    start, python, on_gpu = time.monotonic(), [sys.executable, "-m"], torch.cuda.is_available()

    def run(what, *command):
        print(f"[{time.monotonic() - start:.0f} s] {what}", flush=True)
        return subprocess.run([*python, *command], cwd=ROOT).returncode

    if on_gpu and checks and run("tests on the GPU", "pytest", "-q", "-m", "gpu") != 0:
        print("error: a test fails on this GPU, so that no speed is worth reporting", file=sys.stderr)
        return []
    options = ["--full"] if full else []
    options += [] if models or not on_gpu else ["--ignore=benchmarks/bench_models.py"]
    timings, profile = run_benchmarks(run, folder, options), folder / "profile.json"
    if not timings:
        return []
    if on_gpu and run("profile of a step", "benchmarks.profiling", str(folder)) != 0:
        print("warning: no step could be profiled", file=sys.stderr)
    print(f"[{time.monotonic() - start:.0f} s] report", flush=True)
    return [timings, profile] if profile.exists() else [timings]


def run_benchmarks(run, folder, options):
    """The file with the timings, or None: in a new process as often as an error has left one without its GPU."""
    timings, what = None, "benchmarks"
    for part in itertools.count():
        file = folder / f"benchmarks-{part}.json"
        earlier = [f"--go-on={timings}"] if timings else []
        status = run(what, "pytest", "-q", "benchmarks", f"--benchmark-json={file}", *options, *earlier)
        broke_off = file.exists() and json.loads(file.read_text(encoding="utf-8"))["broke_off"]
        # 1 is a benchmark whose check failed or that cannot run here: its reason is in the file, for the report.
        if not file.exists() or (status not in (0, 1) and not broke_off):
            print(f"error: the benchmarks broke off (pytest ended with status {status})", file=sys.stderr)
            return timings
        timings, what = file, "the other benchmarks"
        if not broke_off:
            return timings


def keep(file, target):
    """Copy a file into the results, as it is."""
    if not (target.exists() and file.samefile(target)):
        target.write_bytes(file.read_bytes())
    print(f"kept: {target}")


def report(root, results):
    """RESULTS.md and the plots from everything in the folder of results."""
    runs, profiles, others = reading.load_folder(results)
    if not runs:
        raise ValueError(f"{results} holds no results: give a file, or measure with --run")
    for name in others:
        print(f"left out: {results / name} is neither of pytest-benchmark nor a profile")
    drawn = set()
    for run in runs:
        pictures = [(f"{run.name}-throughput.png", plots.throughput, run)]
        if run.name in profiles:
            pictures.append((f"{run.name}-profile.png", plots.step_time, profiles[run.name]))
        drawn |= {name for name, draw, content in pictures if draw(content, results / name)}
    (root / "RESULTS.md").write_text(tables.results(runs, profiles, drawn), encoding="utf-8")
    print(f"written: {root / 'RESULTS.md'}")


if __name__ == "__main__":
    sys.exit(main())
