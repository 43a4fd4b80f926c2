"""Every kind of bad input to the command lines ends in one clear line and status 2, and nothing is written."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from tests.scripts.commands import TINY, generate, refuse, start, train


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


@pytest.mark.parametrize("choice, said", (("foo", "one of auto"), ("triton", "need a CUDA device")))
def test_a_backend_that_is_not_possible_leaves_nothing(choice, said, capsys, monkeypatch):
    monkeypatch.setenv("FASTGAN_BACKEND", choice)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert said in refuse(train, capsys, *TINY, "--max-steps", "1", "--out", "run")


@pytest.mark.parametrize("package", ["matplotlib", "tensorboard", "tqdm", "PIL"])
def test_a_package_that_cannot_be_imported_is_named(package, capsys, monkeypatch):
    def broken(name, *rest):
        if name.partition(".")[0] == package:
            raise RuntimeError("built for another NumPy")
        return import_module(name, *rest)

    import_module = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", broken)
    message = refuse(train, capsys, *TINY, "--out", "run")
    assert "training needs the package" in message and "built for another NumPy" in message


def test_names_that_are_too_long(run_folder, capsys):
    assert "--out" in refuse(train, capsys, *TINY, "--out", "n" * 300)
    for length in (300, 252):  # the second once more than a file name may have while it is written
        assert "--out" in refuse(generate, capsys, "run", "--out", "n" * (length - 4) + ".png")


def test_missing_pillow_says_what_to_install(run_folder, capsys, monkeypatch):
    for module in ("PIL", "PIL.Image"):
        monkeypatch.setitem(sys.modules, module, None)
    remedy = 'needs the package pillow: pip install -e ".[train]"'
    assert f"drawing {remedy}" in refuse(generate, capsys, "run", "--out", "folder/new.png")
    assert f"training {remedy}" in refuse(train, capsys, *TINY)


def test_bad_input_in_a_process_of_its_own():
    process = start(*TINY, "--image-size", "30")
    output, error = process.communicate(timeout=100)
    assert process.returncode == 2 and output == ""
    assert error.startswith("error: --image-size") and "Traceback" not in error
    assert not any(Path().iterdir())
