"""Pictures from a checkpoint."""

import os
from pathlib import Path

import torch

from fastgan.checks import check_integer, require
from fastgan.files import check_writable
from fastgan.training.checkpoints import load_generator
from fastgan.training.config import MOST_SEED
from fastgan.training.devices import pick_device
from fastgan.training.samples import draw_latents, grid, sample, save_png

# So many pictures at most: more do not fit well into one grid, or have no name of six digits.
MOST_IN_GRID, MOST_SEPARATE = 2**14, 10**6
_PART = 1024  # separate pictures that are in memory at a time


def generate(checkpoint, out, *, num=64, seed=0, separate=False, device="auto"):
    """Draw ``num`` new pictures with a checkpoint's generator.

    Args:
        checkpoint: the file, or the folder of the run.
        out: the PNG file for a grid of all pictures; with ``separate``, a folder for 000000.png, 000001.png, …
            Neither may exist, save an empty folder.
        num: how many pictures: at most 16,384 in a grid, 1,000,000 separate ones.
        seed: decides which; the first pictures of a seed are the same whatever ``num`` is.
        separate: one file per picture instead of a grid.
        device: auto, cpu, cuda or cuda:N.

    Returns:
        number of pictures, and their side in pixels.

    Raises:
        ValueError: an argument that is not allowed, a checkpoint that cannot be used, ``out`` exists, or no Pillow.
    """
    require("PIL.Image", "drawing")
    most_pictures = MOST_SEPARATE if separate else MOST_IN_GRID
    check_integer("num", num, 1, most_pictures)
    check_integer("seed", seed, 0, MOST_SEED)
    out = os.path.expanduser(out)
    _check_out(out, separate)
    out = Path(out)
    device = pick_device(device)
    generator = load_generator(checkpoint, device)

    random = torch.Generator().manual_seed(seed)
    if separate:
        out.mkdir(parents=True, exist_ok=True)
        for first in range(0, num, _PART):
            images = sample(generator, draw_latents(min(_PART, num - first), generator.nz, random))
            for index, image in enumerate(images, start=first):
                save_png(image, out / f"{index:06d}.png")
    else:
        images = sample(generator, draw_latents(num, generator.nz, random))
        out.parent.mkdir(parents=True, exist_ok=True)
        save_png(grid(images), out)
    return num, images.shape[-1]


def _check_out(given, separate):
    out = Path(given)
    if separate:
        if os.path.exists(out) and not (out.is_dir() and not any(out.iterdir())):
            raise ValueError(f"out {str(out)!r} must be a new or an empty folder")
    elif out.suffix.lower() != ".png":
        raise ValueError(f"out must end in .png; got {given!r} (for one file a picture: --separate)")
    elif os.path.exists(out):
        raise ValueError(f"out {str(out)!r} exists already: choose another name, or remove it")
    check_writable("out", given, folder=separate)
