"""scripts/report.py --run: what it measures, and that nothing of it is lost."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import timing
from tests.processes import ROOT, main_of
from tests.report.files import DEVICE, complete, content, report, run, step


def test_what_a_run_would_lose_is_said_before_it(write, capsys, monkeypatch):
    assert run(write("b.json", complete())) == 0
    monkeypatch.setitem(report.__globals__, "measure", None)
    assert run("--run", write("l.json", content(step("a", 1.0)))) == 2
    assert "l.json would take the place of" in capsys.readouterr().err
    monkeypatch.setattr(timing, "device_name", lambda: DEVICE)
    assert run("--run") == 2  # without models
    assert capsys.readouterr().err.startswith("error: --models are in benchmarks/results/test-gpu-9000.json")


def test_goes_on_without_a_reader(write, monkeypatch):
    """As in `report.py | head -0`."""

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Closed())
        assert run(write("b.json", complete())) == 0
    assert Path("RESULTS.md").exists()


@pytest.mark.parametrize("options", (["--full"], ["--models"], ["--no-checks"], ["--run", "--root", "afile"]))
def test_refuses_before_anything_is_measured(write, capsys, options, monkeypatch):
    write("afile", "mine")
    monkeypatch.setitem(report.__globals__, "measure", None)
    assert report(options) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {options[-2] if len(options) > 1 else options[0]}"), message
    assert message.count("\n") == 1 and Path("afile").read_text() == "mine"


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt(), 130), (OSError("No space left on device"), 2)])
def test_what_was_measured_is_not_lost(error, status, write, capsys, monkeypatch):
    """Where it cannot be kept, or the run is stopped, a file is left, and what was there before stays whole."""
    Path("benchmarks/results").mkdir(parents=True)
    before = write("benchmarks/results/test-gpu-9000.json", content(step("fused-bf16", 1.0)))
    good, left = Path(before).read_bytes(), content(step("fused-bf16", 2.0))

    def measure(folder, *_):
        write(folder / "benchmarks-0.json", left)
        write(folder / "fused-bf16-64px.json", {"traceEvents": []})  # a trace, which nothing takes in
        if isinstance(error, KeyboardInterrupt):
            raise error
        return [folder / "benchmarks-0.json"], True

    def write_bytes(path, content):
        path.write_text("half of")
        raise error

    monkeypatch.setitem(report.__globals__, "measure", measure)
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    assert run("--run") == status
    (kept,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("measured by then: ")]
    file = Path(kept.removeprefix("measured by then: ").partition(";")[0])
    assert json.loads(file.read_text()) == left
    assert Path(before).read_bytes() == good and sorted(path.name for path in Path(before).parent.iterdir()) == [
        "test-gpu-9000.json"
    ]
    shutil.rmtree(file.parent)


@pytest.mark.parametrize("models", (True, False))
def test_what_cannot_be_measured_is_refused_first(models, write, capsys, monkeypatch):
    monkeypatch.setitem(report.__globals__, "measure", None)
    monkeypatch.setattr(timing, "ON_GPU", False)
    monkeypatch.setattr(timing, "device_name", lambda: DEVICE)
    assert run("--run", *(["--models"] if models else [write("a.json", complete())])) == 2
    message = capsys.readouterr().err
    assert ("measured on a GPU only" if models else "a.json is from this machine") in message


def test_benchmarks_that_end_with_their_process(tmp_path):
    """What the processes before it wrote is reported all the same, and the status says that it is not all."""

    def run(what, *command):
        file = Path(command[3].partition("=")[2])
        file.write_text('{"broke_off": true}' if file.stem.endswith("0") else '{"broke_off": tr')
        return -11

    assert report.__globals__["run_benchmarks"](run, tmp_path, []) == (tmp_path / "benchmarks-0.json", False)


@pytest.mark.parametrize("on_gpu", (True, False))
@pytest.mark.parametrize("models", (True, False))
def test_what_a_run_measures(models, on_gpu, tmp_path, monkeypatch):
    """On a GPU the networks of public GANs take minutes to compile: only where they are asked for."""
    commands = []

    def run_to_its_end(command):
        commands.append(command[2:])
        if "benchmarks" in command:
            (tmp_path / "benchmarks-0.json").write_text('{"broke_off": false}')
        return 0

    monkeypatch.setitem(report.__globals__, "run_to_its_end", run_to_its_end)
    monkeypatch.setattr(timing, "ON_GPU", on_gpu)
    measured = [tmp_path / "benchmarks-0.json", *([tmp_path / "profile.json"] if on_gpu else [])]
    assert report.__globals__["measure"](tmp_path, False, models, True) == (measured, True)
    (benchmarks,) = (command for command in commands if "benchmarks" in command)
    assert ("--ignore=benchmarks/bench_models.py" in benchmarks) == (not models)
    assert any("gpu" in command for command in commands) == on_gpu


LOSING = """
import pytest
from benchmarks import timing
from benchmarks.conftest import *  # the hooks

lost = []
timing.gpu_is_lost = lambda: bool(lost)


@pytest.fixture
def lose_gpu():
    lost.append(True)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""


TIMED = """
import pytest

pytestmark = pytest.mark.benchmark(group="ceilings")

def test_a(benchmark):
    benchmark(lambda: None)

def test_b(benchmark, lose_gpu):
    pass

def test_c(benchmark):
    benchmark(lambda: None)

def test_d(benchmark, lose_gpu):
    pass
"""


def test_goes_on_where_an_error_took_the_gpu_away(tmp_path):
    """Each such error costs the one benchmark that it is in, and the run ends when none is left."""
    (tmp_path / "conftest.py").write_text(LOSING)
    (tmp_path / "test_timed.py").write_text(TIMED)
    statuses = []
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}

    def run(what, module, quiet, folder, *options):
        command = [sys.executable, "-m", module, quiet, str(tmp_path), *options, "-p", "no:cacheprovider"]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        statuses.append(done.returncode)
        return done.returncode

    file, complete = report.__globals__["run_benchmarks"](run, tmp_path, [])
    assert complete
    content = json.loads(file.read_text())
    assert [entry["name"] for entry in content["benchmarks"]] == ["test_a", "test_c"]
    assert [entry["fullname"].partition("::")[2] for entry in content["not_run"]] == ["test_b", "test_d"]
    assert all("illegal memory access" in entry["reason"] for entry in content["not_run"])
    assert statuses == [2, 1]


def test_says_which_package_is_missing(monkeypatch, capsys):
    """With what training needs alone there is no pytest."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pytest", None)
    with pytest.raises(SystemExit) as stopped:
        main_of("report")
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "pytest" in message and ".[dev]" in message and message.count("\n") == 1
