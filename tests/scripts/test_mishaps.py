"""What can come between while a command line runs: it ends in one line, and what was trained is kept."""

import io
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastgan.files import alone_in
from fastgan.training.checkpoints import read_checkpoint
from tests.scripts.commands import TINY, generate, start, train


def test_an_interrupted_generate(run_folder, capsys, monkeypatch):
    def interrupted(**options):
        raise KeyboardInterrupt

    monkeypatch.setitem(generate.__globals__, "generate", interrupted)
    assert generate(["run", "--out", "new.png"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("script", ["train.py", "generate.py"])
def test_ctrl_c_while_torch_is_imported_is_quiet(script):
    Path("torch.py").write_text("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)")
    process = start(script=script, PYTHONPATH=os.getcwd())
    assert process.communicate(timeout=100) == ("", "") and process.returncode == -signal.SIGINT


def test_ctrl_c_saves_and_says_how_to_go_on(capsys):
    arguments = [*TINY, "--epochs", "1000", "--log-every", "1", "--save-every", "100000", "--out", "run"]
    process = start(*arguments, MPLBACKEND="nonsense")
    metrics, deadline = Path("run/metrics.jsonl"), time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in error
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    last = torch.load("run/checkpoint.pt", weights_only=True)["step"]
    assert steps == list(range(1, last + 1))
    assert f"step {last} is saved" in output and "--resume run" in output
    assert train(["--resume", "run", "--max-steps", str(last + 1), "--log-every", "1"]) == 0
    assert f"going on after step {last} of {last + 1}" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_line(run_folder, capsys):
    os.symlink("/dev/full", f"run/checkpoint.pt.{os.getpid()}.tmp")  # what is written before it takes its name
    capsys.readouterr()
    assert train(["--resume", "run", "--max-steps", "3"]) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'run/checkpoint.pt'\n"


def test_a_picture_that_cannot_be_written_costs_no_checkpoint(monkeypatch):
    def on_a_full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("fastgan.training.records.save_png", on_a_full_disk)
    assert train([*TINY, "--max-steps", "2", "--out", "run"]) == 2
    assert read_checkpoint("run")["step"] == 2


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_closed_pipes_end_nothing(stream, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    def main(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(sys, stream, Closed())
            return train([*TINY, "--max-steps", "2", "--save-every", "1", *arguments])

    assert main("--explain", "--out", "run") == 0 and read_checkpoint("run")["step"] == 2
    assert main("--out", "run") == 2
    with monkeypatch.context() as patch:
        patch.setattr(sys, stream, Closed())
        assert generate(["run", "--out", "new.png"]) == 0


def test_names_and_characters_that_cannot_be_shown(monkeypatch, capsys):
    before = list(Path().iterdir())
    assert train([*TINY, "--out", "o\udcff"]) == 2
    assert "error: --out must be a name in UTF-8; got 'o?'" in capsys.readouterr().err
    assert list(Path().iterdir()) == before
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert train([*TINY, "--fused", "--max-steps", "1", "--explain", "--out", "run"]) == 0
    sys.stdout.flush()
    assert b"4?4?4?4" in shown.getvalue()


def test_one_process_trains_in_a_folder(run_folder, capsys):
    capsys.readouterr()
    with alone_in("run"):
        assert train(["--resume", "run", "--max-steps", "3"]) == 2
    assert capsys.readouterr().err == "error: another process is training in run right now\n"
    assert train(["--resume", "run", "--max-steps", "3"]) == 0


@pytest.mark.parametrize(
    "error, said",
    (
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "CUDA out of memory. Tried"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "DefaultCPUAllocator: can't allocate memory"),
    ),
)
def test_too_little_memory_is_one_line(error, said, run_folder, capsys, monkeypatch):
    def too_large(*_, **__):
        raise error

    for place in ("loop._update", "run._train_step", "checkpoints.torch.load"):
        with monkeypatch.context() as patch:
            patch.setattr(f"fastgan.training.{place}", too_large)
            capsys.readouterr()
            assert train(["--resume", "run", "--max-steps", "3"]) == 2
        smaller = "a smaller --batch-size or --image-size or --ngf or --ndf needs less"
        assert capsys.readouterr().err == f"error: not enough memory: {said}; {smaller}\n"
    monkeypatch.setitem(generate.__globals__, "generate", too_large)
    assert generate(["run", "--out", "new.png"]) == 2
    assert capsys.readouterr().err == f"error: not enough memory: {said}; a smaller --num needs less\n"


def test_compilation_that_fails_is_one_line(capsys, monkeypatch):
    def broken(graph_module, inputs):
        raise OSError("no compiler")

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **how: compiled(model, **how, backend=broken))
    assert train([*TINY, "--compile", "--max-steps", "1", "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert "compile does not work here" in error and "--no-compile" in error and error.count("\n") == 1


def test_a_loss_that_is_not_finite_stops_with_the_step(capsys):
    assert train([*TINY, "--lr", "1e30", "--epochs", "1", "--out", "run"]) == 2
    output = capsys.readouterr()
    assert "not finite at step" in output.err and "run/diverged.pt" in output.err and output.err.count("\n") == 1
    assert Path("run/diverged.pt").exists() and read_checkpoint("run")["step"] == 0


def test_warnings_that_are_errors_are_one_line(capsys):
    Path("pictures").mkdir()
    for i in range(5):
        Image.new("RGB", (8, 8)).save(f"pictures/{i}.png")
    Path("pictures/5.png").write_bytes(b"no picture")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train([*TINY, "--dataset", "folder", "--dataroot", "pictures", "--max-steps", "1", "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: left out 1 of 6 pictures") and error.count("\n") == 1 and not Path("run").exists()
