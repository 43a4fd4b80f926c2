"""The command lines: that they work, and that every kind of bad input ends in one clear line and status 2."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastgan import backend
from fastgan.files import alone_in
from fastgan.training import TrainConfig, new_run
from fastgan.training.checkpoints import read_checkpoint
from tests.processes import ROOT, main_of

SCRIPTS = ROOT / "scripts"
TINY = "--dataset fake --image-size 8 --batch-size 4 --nz 5 --ngf 4 --ndf 4 --device cpu".split()
train, generate = main_of("train"), main_of("generate")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_folder():
    """A run of two steps in the folder "run"."""
    assert train([*TINY, "--max-steps", "2", "--out", "run"]) == 0
    return Path("run")


def contents():
    """Every file below the current folder with its bytes, and every folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def refuse(main, capsys, *arguments):
    """Run a command line that must end with status 2 and one line of error, and change no file; gives the line."""
    before = contents()
    capsys.readouterr()
    try:
        status = main([str(argument) for argument in arguments])
        lines = 1
    except SystemExit as exit:  # argparse prints its usage first
        status, lines = exit.code, None
    message = capsys.readouterr().err
    assert status == 2, message
    assert contents() == before
    if lines:
        assert message.startswith("error: ") and message.count("\n") == lines, message
    return message


def test_train_then_generate(capsys):
    assert train([*TINY, "--fused", "--max-steps", "3", "--explain", "--out", "run"]) == 0
    output = capsys.readouterr().out
    assert "Generator" in output and "Discriminator" in output  # what --explain prints
    assert "run/samples/step-000003.png" in output and "run/loss.png" in output
    assert Path("run/samples/step-000003.png").exists()
    assert generate(["run/checkpoint.pt", "--out", "grid.png", "--num", "4", "--device", "cpu"]) == 0
    assert "4 pictures of 8x8 in grid.png" in capsys.readouterr().out
    assert Image.open("grid.png").size == (22, 22)
    assert generate(["run", "--out", "folder", "--num", "3", "--separate", "--device", "cpu"]) == 0
    assert len(list(Path("folder").iterdir())) == 3


@pytest.mark.parametrize(
    "gpu, fused, said",
    (
        ("T800", True, "measured convolutions on NVIDIA T800 yet, so cuDNN computes them: `"),
        ("H100 PCIe", True, "computes them, but for those in which our kernels are far ahead on NVIDIA H100 80GB HBM3"),
        ("H200", True, ""),
        ("T800", False, ""),
    ),
)
def test_a_gpu_that_nobody_measured_is_told_of(gpu, fused, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA {gpu}")
    monkeypatch.setattr(backend, "capability", lambda index: 90 if gpu.startswith("H") else 0)
    tiny = dict(dataset="fake", image_size=8, batch_size=4, nz=5, ngf=4, ndf=4, device="cpu")
    run = new_run(TrainConfig(fused=fused, **tiny), "run")
    run.device = torch.device("cuda")
    train.__globals__["describe"](run)
    output = capsys.readouterr().out
    assert said in output and ("nobody has measured" in output) == bool(said)


@pytest.mark.parametrize("options", [["--data-on", "host", "--flip"], ["--data-on", "auto", "--no-flip"]])
def test_images_on_the_host(options, capsys):
    assert train([*TINY, *options, "--max-steps", "2", "--out", "run"]) == 0
    assert "ms" in capsys.readouterr().out.split("data wait ")[1].splitlines()[0]
    assert json.loads(Path("run/config.json").read_text())["images_on"] == "host"


def test_the_default_folder_is_named_after_the_data_set():
    assert train([*TINY, "--max-steps", "1"]) == 0
    assert Path("runs/fake/checkpoint.pt").exists()


def test_resume(run_folder, capsys):
    assert train(["--resume", "run/checkpoint.pt", "--max-steps", "4", "--device", "cpu"]) == 0
    assert "going on after step 2 of 4" in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4]
    before = contents()
    assert train(["--resume", "run"]) == 0
    assert "has finished its 4 steps" in capsys.readouterr().out
    assert contents() == before


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--image-size", "30"], ["--image-size", "30", "28", "64"]),
        (["--dataset", "imagenet"], ["dataset", "imagenet", "digits", "folder"]),
        (["--dataset", "folder"], ["--dataroot must be given"]),
        (["--dataset", "folder", "--dataroot", "empty"], ["empty"]),
        (["--dataset", "folder", "--dataroot", "missing"], ["missing"]),
        (["--batch-size", "1"], ["--batch-size", "at least 2"]),
        (["--batch-size", "0"], ["--batch-size", "0"]),
        (["--batch-size", "4096"], ["--batch-size", "2048", "4096"]),
        (["--batch-size", "many"], ["--batch-size", "many"]),
        (["--epochs", "-1"], ["epochs", "-1"]),
        (["--max-steps", "0"], ["--max-steps", "0"]),
        (["--nz", "0"], ["nz", "0"]),
        (["--ngf", "-8"], ["ngf", "-8"]),
        (["--ndf", "0"], ["ndf", "0"]),
        (["--lr", "0"], ["lr", "0"]),
        (["--lr", "nan"], ["lr", "nan"]),
        (["--beta1", "1.5"], ["beta1", "1.5"]),
        (["--seed", "-1"], ["seed", "-1"]),
        (["--workers", "-1"], ["workers", "-1"]),
        (["--precision", "fp64"], ["precision", "fp64", "bf16"]),
        (["--precision", "fp16"], ["fp16", "CUDA", "bf16"]),
        (["--device", "tpu"], ["device", "tpu", "cuda"]),
        (["--device", "cuda"], ["CUDA"]),
        (["--data-on", "disk"], ["--data-on", "disk", "auto", "gpu", "host"]),
        (["--data-on", "gpu"], ["--data-on 'gpu'", "CUDA", "'cpu'"]),
        (["--ngf", "100000000"], ["--ngf", "100000000", "1024"]),
        (["--ndf", "1025"], ["--ndf", "1025", "1024"]),
        (["--nz", "100000000"], ["--nz", "100000000", "65536"]),
        (["--workers", "99999"], ["--workers", "99999", "1024"]),
        (["--seed", str(2**63)], ["--seed", str(2**63), str(2**63 - 1)]),
        (["--device", "cpu:3"], ["--device", "cpu:3", "cuda:N"]),
        (["--dataset", "folder", "--dataroot", ""], ["--dataroot must be a path; got ''"]),
        (["--out", ""], ["--out", "''"]),
        (["--out", "afile"], ["--out", "'afile'", "not a folder"]),
        (["--out", "afile/x"], ["--out", "'afile/x'", "Not a directory"]),
        (["--out", "/proc/x/y"], ["--out", "'/proc/x/y'"]),
        (["--resume", "missing"], ["missing"]),
        (["--resume", "empty"], ["empty", "checkpoint.pt"]),
    ],
)
def test_bad_options_are_named_and_nothing_is_written(arguments, parts, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("empty").mkdir()
    Path("afile").write_text("mine")
    message = refuse(train, capsys, *TINY, "--max-steps", "1", "--out", "run", *arguments)
    for part in parts:
        assert part in message


def test_a_used_out_is_refused(run_folder, capsys):
    message = refuse(train, capsys, *TINY, "--max-steps", "2", "--out", "run")
    assert "'run'" in message and "--resume run" in message and "--out" in message


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["--ngf", "8"], ("--ngf 8", "has 4")),
        (["--image-size", "16"], ("--image-size 16", "has 8")),
        (["--dataset", "digits"], ("dataset 'digits'", "has 'fake'")),
        (["--batch-size", "8"], ("--batch-size 8", "has 4")),
        (["--seed", "3"], ("--seed 3", "has 0")),
        (["--lr", "0.1"], ("--lr 0.1", "has 0.0002")),
        (["--precision", "bf16"], ("precision 'bf16'", "has 'fp32'")),
        (["--flip"], ("--flip True", "has False")),
        (["--out", "other"], ("'other'", "'run'")),
    ],
)
def test_resume_with_contradicting_options_names_both_values(run_folder, capsys, arguments, values):
    message = refuse(train, capsys, "--resume", "run", "--max-steps", "4", *arguments)
    assert all(value in message for value in values)


def test_a_truncated_checkpoint_and_what_is_none(run_folder, capsys):
    good = Path("run/checkpoint.pt").read_bytes()
    for bad in (good[: len(good) // 2], b"", b"hello\n"):
        Path("run/checkpoint.pt").write_bytes(bad)
        assert "run/checkpoint.pt is not" in refuse(train, capsys, "--resume", "run", "--max-steps", "4")
        assert "run/checkpoint.pt is not" in refuse(generate, capsys, "run/checkpoint.pt", "--out", "grid.png")


def test_a_checkpoint_of_another_architecture(run_folder, capsys):
    state = torch.load("run/checkpoint.pt", weights_only=True)
    state["config"]["ngf"] = 16
    torch.save(state, "run/checkpoint.pt")
    assert "does not fit" in refuse(train, capsys, "--resume", "run", "--max-steps", "4")
    assert "another architecture" in refuse(generate, capsys, "run", "--out", "grid.png")


def test_printed_commands_can_be_pasted(capsys):
    assert train([*TINY, "--max-steps", "1", "--seed", str(2**63 - 1), "--out", "my run"]) == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("more: python scripts/generate.py ")
    assert generate(shlex.split(command)) == 0  # with a seed that is allowed
    assert Path("my run/more.png").exists()
    assert "--resume 'my run'," in refuse(train, capsys, *TINY, "--out", "my run")


def test_an_interrupted_generate(run_folder, capsys, monkeypatch):
    def interrupted(**options):
        raise KeyboardInterrupt

    monkeypatch.setitem(generate.__globals__, "generate", interrupted)
    assert generate(["run", "--out", "new.png"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_line(run_folder, capsys):
    os.symlink("/dev/full", f"run/checkpoint.pt.{os.getpid()}.tmp")  # what is written before it takes its name
    capsys.readouterr()
    assert train(["--resume", "run", "--max-steps", "3"]) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'run/checkpoint.pt'\n"


def test_a_run_that_saved_no_step_goes_on(capsys, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastgan.training.loop._update", killed)
        assert train([*TINY, "--epochs", "1", "--out", "run"]) == 130
    assert train(["--resume", "run", "--max-steps", "2"]) == 0
    whole = Path("run/metrics.jsonl").read_text()
    assert train([*TINY, "--epochs", "1", "--max-steps", "2", "--out", "other"]) == 0
    rows = [
        [json.loads(line) for line in text.splitlines()] for text in (whole, Path("other/metrics.jsonl").read_text())
    ]
    assert [row["loss_g"] for row in rows[0]] == [row["loss_g"] for row in rows[1]]


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


def test_explain_is_of_the_precision_of_the_run(monkeypatch, capsys):
    monkeypatch.setenv("FASTGAN_BACKEND", "triton")
    assert train([*TINY, "--fused", "--precision", "bf16", "--max-steps", "1", "--explain", "--out", "run"]) == 0
    assert capsys.readouterr().out.count("Triton's interpreter computes bfloat16 wrongly") == 4


def test_without_stderr_and_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "stderr", None)  # as `2>&-` leaves it
    assert train([*TINY, "--max-steps", "1", "--out", "~/run"]) == 0
    assert train(["--max-steps", "2", "--resume", "~/run", "--out", "~/run"]) == 0
    assert generate(["~/run", "--out", "~/new.png"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert read_checkpoint("home/run")["step"] == 2 and Path("home/new.png").exists()


def test_a_picture_that_cannot_be_written_costs_no_checkpoint(monkeypatch):
    def on_a_full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("fastgan.training.records.save_png", on_a_full_disk)
    assert train([*TINY, "--max-steps", "2", "--out", "run"]) == 2
    assert read_checkpoint("run")["step"] == 2


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


@pytest.mark.parametrize("choice, said", (("foo", "one of auto"), ("triton", "need a CUDA device")))
def test_a_backend_that_is_not_possible_leaves_nothing(choice, said, capsys, monkeypatch):
    monkeypatch.setenv("FASTGAN_BACKEND", choice)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert said in refuse(train, capsys, *TINY, "--max-steps", "1", "--out", "run")


def test_compilation_that_fails_is_one_line(capsys, monkeypatch):
    def broken(graph_module, inputs):
        raise OSError("no compiler")

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **how: compiled(model, **how, backend=broken))
    assert train([*TINY, "--compile", "--max-steps", "1", "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert "compile does not work here" in error and "--no-compile" in error and error.count("\n") == 1


def test_generate_refuses(run_folder, capsys):
    Path("afile").write_text("mine")
    assert "--out 'afile/x.png'" in refuse(generate, capsys, "run", "--out", "afile/x.png")
    assert "--out 'afile/x'" in refuse(generate, capsys, "run", "--out", "afile/x", "--separate")
    assert "--num" in refuse(generate, capsys, "run", "--out", "new.png", "--num", "99999999999")
    assert "1000000" in refuse(generate, capsys, "run", "--out", "new", "--num", "1000001", "--separate")
    Path("there.png").write_text("mine")
    assert "exists" in refuse(generate, capsys, "run", "--out", "there.png")
    assert "empty" in refuse(generate, capsys, "run", "--out", "run", "--separate")
    assert "num" in refuse(generate, capsys, "run", "--out", "new.png", "--num", "0")
    assert "missing.pt" in refuse(generate, capsys, "missing.pt", "--out", "new.png")


def test_missing_pillow_says_what_to_install(run_folder, capsys, monkeypatch):
    for module in ("PIL", "PIL.Image"):
        monkeypatch.setitem(sys.modules, module, None)
    remedy = 'needs the package pillow: pip install -e ".[train]"'
    assert f"drawing {remedy}" in refuse(generate, capsys, "run", "--out", "folder/new.png")
    assert f"training {remedy}" in refuse(train, capsys, *TINY)


def test_a_loss_that_is_not_finite_stops_with_the_step(capsys):
    assert train([*TINY, "--lr", "1e30", "--epochs", "1", "--out", "run"]) == 2
    output = capsys.readouterr()
    assert "not finite at step" in output.err and "run/diverged.pt" in output.err and output.err.count("\n") == 1
    assert Path("run/diverged.pt").exists() and read_checkpoint("run")["step"] == 0


def start(*arguments, script="train.py", **variables):
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_bad_input_in_a_process_of_its_own():
    process = start(*TINY, "--image-size", "30")
    output, error = process.communicate(timeout=100)
    assert process.returncode == 2 and output == ""
    assert error.startswith("error: --image-size") and "Traceback" not in error
    assert not any(Path().iterdir())


@pytest.mark.parametrize("script", ["train.py", "generate.py"])
def test_ctrl_c_while_torch_is_imported_is_quiet(script):
    Path("torch.py").write_text("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)")
    process = start(script=script, PYTHONPATH=os.getcwd())
    assert process.communicate(timeout=100) == ("", "") and process.returncode == -signal.SIGINT


def test_help_and_the_library_import_nothing_that_only_training_needs():
    code = (
        "import runpy, sys\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'matplotlib', 'tensorboard', 'torchvision', 'PIL', 'mlxtend'} & set(sys.modules)))"
    )
    code = f"import sys; sys.argv = [{str(SCRIPTS / 'train.py')!r}, '--help']\n{code}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert "--resume" in result.stdout and result.stdout.endswith("\n[]\n")


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
