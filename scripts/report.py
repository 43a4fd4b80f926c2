"""Turn benchmark results into RESULTS.md: `python scripts/report.py --run` measures this machine and reports it.

    python scripts/report.py --run              tests on the GPU if there is one, benchmarks, profile, report
    python scripts/report.py FILE.json ...      take in what pytest-benchmark or benchmarks.profiling wrote
    python scripts/report.py                    write RESULTS.md and the plots anew

Every file taken in is kept as it is in benchmarks/results/, named after its device, in the place of older results that
have no kind of benchmark more. Exit status: 0; 1 if the tests on the GPU fail or the benchmarks break off; 2 for
anything wrong with the input; 130 after Ctrl-C. What was measured and could not be kept stays where a message says, for
`report.py FILE.json`.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

try:
    from benchmarks import plots, reading, tables, timing
    from fastgan.command_line import run_command, say
    from fastgan.files import check_writable, write_text, written_whole
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
    if not options.run:
        take_in(files, loaded, options.root, results)
        return 0
    if options.models and not timing.ON_GPU:
        raise ValueError("models are measured on a GPU only: their variants are compiled and captured")
    for file, content in zip(files, loaded, strict=True):
        if content.device == timing.device_name():
            raise ValueError(f"{file} is from this machine, which --run measures: give one of them")
    kept = results / f"{reading.slug(timing.device_name())}.json"
    if not options.models and kept.exists() and reading.load(kept).of("models"):
        raise ValueError(f"models are in {kept}, which would lose them: give --models too, or name another --root")
    folder_with(files, loaded, results)  # what is wrong with it is said before minutes of measuring
    with kept_if_not_taken_in() as folder:
        measured, complete = measure(folder, options.full, options.models, not options.no_checks)
        if measured:
            take_in([*files, *measured], [*loaded, *map(reading.load, measured)], options.root, results)
    return 0 if complete else 1


@contextmanager
def kept_if_not_taken_in():
    """A new folder to measure in; after an error in the context, what can be taken in from there is left and named.

    On a full disk, say, or after Ctrl-C: it is minutes of a machine's time.
    """
    folder, left = Path(tempfile.mkdtemp(prefix="fastgan-report-")), []
    try:
        yield folder
    except BaseException:
        left = _readable(folder)
        raise
    finally:
        if left:
            print(f"measured by then: {' '.join(map(str, left))}; `report.py` takes it in", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _readable(folder):
    """The profile and the latest file of timings in a folder that was measured in, where they are whole."""
    parts = sorted(folder.glob("benchmarks-*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    found = {}
    for file in (*parts, folder / "profile.json"):
        with suppress(ValueError):
            found.setdefault(type(reading.load(file)), file)
    return list(found.values())


def take_in(files, loaded, root, results):
    """Keep the files and write the report. All of it is made first: nothing is changed if something cannot be shown."""
    new, runs, profiles, others = folder_with(files, loaded, results)
    if not runs:
        raise ValueError(f"{results} holds no results: give a file, or measure with --run")
    with tempfile.TemporaryDirectory(prefix="fastgan-report-") as folder:
        pictures = draw(runs, profiles, Path(folder))
        page = tables.results(runs, profiles, {picture.name for picture in pictures})
        results.mkdir(parents=True, exist_ok=True)
        for target, (file, _) in new.items():
            keep(file, target)
            say(f"kept: {target}")
        for picture in pictures:
            keep(picture, results / picture.name)
    for name in sorted(set(others) - {"probe.json"}):  # which is read by people
        say(f"left out: {results / name} is neither of pytest-benchmark nor a profile")
    write_text(root / "RESULTS.md", page)
    say(f"written: {root / 'RESULTS.md'}")


def folder_with(files, loaded, results):
    """({where a file goes: (file, content)}, *`reading.load_folder` with the files in it), if nothing is lost by it."""
    new = {results / f"{content.name}.json": (file, content) for file, content in zip(files, loaded, strict=True)}
    runs, profiles, others = reading.load_folder(results, new)
    for target, (file, content) in new.items():
        if isinstance(content, reading.BenchmarkRun):
            lost = content.lacks(reading.load(target)) if target.exists() else []
            if lost:
                raise ValueError(
                    f"{file} would take the place of {target}, which has timings of {', '.join(lost)} too: measure "
                    f"those (pytest benchmarks --go-on={file} --benchmark-json=all.json), or name another --root"
                )
        elif content.name not in [run.name + reading.PROFILE_SUFFIX for run in runs]:  # whose section it stands in
            raise ValueError(f"{file} is a profile of {content.device}, of which there are no timings: give those too")
    return new, runs, profiles, others


def _check_different(files, loaded):
    """One file for each device: a second one would take the place of the first."""
    known = {}
    for file, content in zip(files, loaded, strict=True):
        if content.name in known:
            raise ValueError(f"{known[content.name]} and {file} are both from {content.device}: give one of them")
        known[content.name] = file


def measure(folder, full, models, checks):
    """Run checks, benchmarks and profile, each in a process of its own: (files with results, whether nothing broke)."""
    start, on_gpu = time.monotonic(), timing.ON_GPU

    def run(what, *command):
        say(f"[{time.monotonic() - start:.0f} s] {what}")
        return run_to_its_end([sys.executable, "-m", *command])

    if on_gpu and checks and run("tests on the GPU", "pytest", "-q", "-m", "gpu") != 0:
        print("error: a test fails on this GPU, so that no speed is worth reporting", file=sys.stderr)
        return [], False
    options = ["--full"] if full else []
    options += [] if models else ["--ignore=benchmarks/bench_models.py"]
    timings, complete = run_benchmarks(run, folder, options)
    files = [timings] if timings else []
    if files and on_gpu:
        if run("profile of a step", "benchmarks.profiling", str(folder)) == 0:
            files.append(folder / "profile.json")
        else:
            print("warning: no step could be profiled", file=sys.stderr)
    say(f"[{time.monotonic() - start:.0f} s] report")
    return files, complete


def run_to_its_end(command):
    """The exit status of a command. After Ctrl-C, which it gets too, it may write what it has: that is waited for."""
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise


def run_benchmarks(run, folder, options):
    """(the file with the timings or None, whether it has all): a new process each time an error takes one its GPU."""
    timings, what = None, "benchmarks"
    for part in itertools.count():
        file = folder / f"benchmarks-{part}.json"
        earlier = [f"--go-on={timings}"] if timings else []
        status = run(what, "pytest", "-q", "benchmarks", f"--benchmark-json={file}", *options, *earlier)
        try:
            broke_off = json.loads(file.read_text(encoding="utf-8"))["broke_off"]
        except (OSError, ValueError):  # its process died before it was written, or while it was
            broke_off = None
        # 1 is a benchmark whose check failed or that cannot run here: its reason is in the file, for the report.
        if broke_off is None or (status not in (0, 1) and not broke_off):
            print(f"error: the benchmarks broke off (pytest ended with status {status})", file=sys.stderr)
            return timings, False
        timings, what = file, "the other benchmarks"
        if not broke_off:
            return timings, True


def keep(file, target):
    """Copy a file into the results, as it is."""
    if not (target.exists() and file.samefile(target)):
        content = file.read_bytes()
        with written_whole(target) as temporary:
            temporary.write_bytes(content)


def draw(runs, profiles, folder):
    """Draw into a folder what there is to draw; the pictures."""
    pictures = [(folder / f"{run.name}-throughput.png", plots.throughput, run) for run in runs]
    profiled = [(run.name, profiles[run.name]) for run in runs if run.name in profiles]
    pictures += [(folder / f"{name}-profile.png", plots.step_time, profile) for name, profile in profiled]
    return [path for path, draw_into, content in pictures if draw_into(content, path)]


if __name__ == "__main__":
    sys.exit(main())
