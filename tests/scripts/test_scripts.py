"""The command lines: that they do what they say."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastgan import backend
from fastgan.training import TrainConfig, new_run
from fastgan.training.checkpoints import read_checkpoint
from tests.scripts.commands import SCRIPTS, TINY, contents, generate, refuse, train


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


def test_printed_commands_can_be_pasted(capsys):
    assert train([*TINY, "--max-steps", "1", "--seed", str(2**63 - 1), "--out", "my run"]) == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("more: python scripts/generate.py ")
    assert generate(shlex.split(command)) == 0  # with a seed that is allowed
    assert Path("my run/more.png").exists()
    assert "--resume 'my run'," in refuse(train, capsys, *TINY, "--out", "my run")


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
