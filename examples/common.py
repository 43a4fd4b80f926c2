"""What the programs of this folder share: options, pictures, the loop, and the comparison of speed.

A program hands `run` a function `build(options, channels)` that makes its GAN, an nn.Module with

    inputs(images)      → what to call the GAN with, so that its forward goes through each of its networks once
    train_step(images)  → {name: loss}: one update of its networks; images: (N, C, S, S) in [−1, 1]
    draw(images)        → image batches (N, C, S, S) that belong side by side
"""

import argparse
import copy
import os
import time
from contextlib import closing
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

import fastgan
from fastgan import data
from fastgan.checks import check_choice, check_integer, require
from fastgan.command_line import run_command
from fastgan.files import check_writable
from fastgan.training.config import check_batch_size
from fastgan.training.devices import pick_device, synchronize
from fastgan.training.samples import grid, save_png

IMAGE_SIZES = (16, 32, 64, 128, 256)
DRAWN = 16  # pictures in the grid; they are kept out of training
SEED = 0
SOFTWARE = "fastgan examples"  # written into the pictures: those may be drawn anew
AGREEMENT = 0.05  # how far fused results may be from stock ones before they are timed; bfloat16 and TF32 give 0.01


def run(argv, build, *, description, steps, batch_size):
    """The command line of a program: 0 when it is done, 130 after Ctrl-C, 2 for anything wrong with the input."""
    options = _parse(argv, description, steps, batch_size)
    return run_command(lambda: _train(options, build), vars(options), root="dataroot")


def pencil(images):
    """Pictures as drawings, dark lines on white paper along the outside of what is bright; the same shape and range."""
    grey = images.mean(1, keepdim=True)
    edges = F.max_pool2d(grey, 3, stride=1, padding=1) - grey  # 0 … 2
    return (1 - edges).expand_as(images)


def down(in_channels, out_channels, *, stride=2, norm=True):
    """The layers that halve the side of an image."""
    layers = [nn.Conv2d(in_channels, out_channels, 4, stride, 1, bias=not norm)]
    layers += [nn.BatchNorm2d(out_channels)] if norm else []
    return [*layers, nn.LeakyReLU(0.2, inplace=True)]


def up(in_channels, out_channels, *, stride=2, padding=1):
    """The layers that double the side; with stride 1 and no padding they make 4×4 of 1×1."""
    convolution = nn.ConvTranspose2d(in_channels, out_channels, 4, stride, padding, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


def widths(image_size, width):
    """Channels of the layers at half the side of the image, a quarter, … 4: `width`, twice that, …"""
    return [width << i for i in range(image_size.bit_length() - 3)]


def real_loss(logits):
    """The loss of a discriminator's logits that should say: real."""
    return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))


def fake_loss(logits):
    """The loss of a discriminator's logits that should say: fake."""
    return F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits))


def _parse(argv, description, steps, batch_size):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help="training steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="images in a step (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=32, help="side of the images (default: %(default)s)")
    parser.add_argument("--dataroot", metavar="FOLDER", help="pictures to learn (default: 5,000 handwritten digits)")
    name = description.split()[0].lower()
    parser.add_argument("--out", default=f"runs/{name}.png", help="PNG file to draw (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, by autocast")
    parser.add_argument("--no-fused", dest="fused", action="store_false", help="stock layers: leave the one line out")
    return parser.parse_args(argv)


def _train(options, build):
    check_integer("steps", options.steps, 1)
    check_batch_size(options.batch_size)
    check_choice("image_size", options.image_size, IMAGE_SIZES)
    device = pick_device(options.device)
    out = _picture_file(options.out)
    training, drawn = _load(options)
    drawn = data.scale(drawn).to(device)
    torch.backends.cudnn.benchmark = True  # worth it: all batches have one shape

    gan = _make(build, options, training.nc, device)
    with _precision(options, device):
        print(fastgan.explain(gan, *gan.inputs(drawn)), flush=True)
    every = max(1, options.steps // 10)
    with closing(data.HostImages(training, options.batch_size, device=device, seed=SEED)) as images:
        reported, clock = 0, time.perf_counter()
        for step in range(1, options.steps + 1):
            with _precision(options, device):
                losses = gan.train_step(images.before_step())
            if step % every == 0 or step == options.steps:
                values = ", ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
                synchronize(device)
                speed = (step - reported) * options.batch_size / (time.perf_counter() - clock)
                print(f"step {step}/{options.steps}: {values}, {speed:.0f} images/s", flush=True)
                _draw(gan, drawn, out)
                reported, clock = step, time.perf_counter()
        print(f"pictures: {out}")
        print(_speed_up(build, options, images.before_step()))
    return 0


def _picture_file(out):
    """The file to draw: a new one, or one that an earlier run has drawn."""
    out = os.path.expanduser(out)
    check_writable("out", out)
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"out must be a file; {str(out)!r} is a folder")
    if out.suffix.lower() != ".png":
        raise ValueError(f"out must end in .png; got {str(out)!r}")
    if out.exists() and not _is_ours(out):
        raise ValueError(f"out {str(out)!r} exists, and no example has drawn it: choose another name, or remove it")
    return out


def _is_ours(path):
    try:
        with require("PIL.Image", "drawing").open(path) as picture:
            return picture.info.get("Software") == SOFTWARE
    except OSError:  # no picture
        return False


def _load(options):
    """(the images to train with, a few more to draw: uint8 (n, C, S, S))."""
    name = "digits" if options.dataroot is None else "folder"
    images = data.load(name, root=options.dataroot, image_size=options.image_size)
    count = max(2, min(DRAWN, len(images) // 8))
    chosen = torch.linspace(0, len(images) - 1, count).round().long()
    drawn = torch.stack([images[i] for i in chosen.tolist()])
    if isinstance(images, data.ImagesInMemory):  # of more than fit there, the drawn ones stay in
        others = torch.ones(len(images), dtype=torch.bool).index_fill(0, chosen, False)
        images = data.ImagesInMemory(name, images.images[others])
    if len(images) < options.batch_size:
        raise ValueError(
            f"batch_size must be at most the {len(images)} pictures to learn from, beside {count} kept to draw; "
            f"got {options.batch_size}"
        )
    return images, drawn


def _make(build, options, channels, device):
    torch.manual_seed(SEED)
    return build(options, channels).to(device, memory_format=torch.channels_last)


def _precision(options, device):
    # No cache of weights in bfloat16: it would outlive an optimizer's step.
    return torch.autocast(device.type, torch.bfloat16, enabled=options.bf16, cache_enabled=False)


@torch.no_grad()
def _draw(gan, images, out):
    gan.eval()
    out.parent.mkdir(parents=True, exist_ok=True)
    save_png(grid(data.to_uint8(torch.cat(gan.draw(images), dim=3)).cpu()), out, software=SOFTWARE)
    gan.train()


def _speed_up(build, options, images):
    """What the one line gives: the training step with stock layers and with fused ones, compared and then timed."""
    device = images.device
    if device.type != "cuda":
        return f"speed-up: measured on a GPU only, and this ran on {device.type}"
    gans, difference = _stock_and_fused(build, options, images)
    if not difference < AGREEMENT:
        return f"speed-up: not measured, because results of fused and stock layers differ by {difference:.1%}"
    with _precision(options, device):
        stock, fused = _medians([lambda gan=gan: gan.train_step(images) for gan in gans])
    return (
        f"speed-up: {stock / fused:.2f} ({stock:.2f} ms a step with stock layers, {fused:.2f} ms with fused ones, on "
        f"{torch.cuda.get_device_name(device)}; their results agree to {difference:.2%})"
    )


def _stock_and_fused(build, options, images):
    """The same GAN with stock and with fused layers, and how far apart their outputs and first losses are."""
    gans, results = [], []
    for fused in (False, True):
        options = copy.copy(options)
        options.fused = fused
        gan = _make(build, options, images.shape[1], images.device)
        for module in gan.modules():
            if isinstance(module, nn.Dropout):
                module.eval()  # its mask depends on the memory layout of what it gets
        with _precision(options, images.device):
            outputs, losses = gan(*gan.inputs(images)), gan.train_step(images)
        results.append([tensor.detach().float() for tensor in (*outputs, *losses.values())])
        gans.append(gan.train())
    # Relative, except where everything is small: the difference of two scores, say.
    return gans, max(((b - a).norm() / a.norm().clamp(min=1)).item() for a, b in zip(*results, strict=True))


def _medians(calls):
    """Median milliseconds of each GPU call in `calls`; they take turns, ten times in a row."""
    milliseconds, repeats = [[] for _ in calls], 10
    for call in calls * 10:  # to warm up
        call()
    for _ in range(9):
        for call, times in zip(calls, milliseconds, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / repeats)
    return [median(times) for times in milliseconds]
