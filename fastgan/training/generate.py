"""Pictures from a checkpoint."""

from pathlib import Path

from fastgan.training.checkpoints import load_generator
from fastgan.training.devices import pick_device
from fastgan.training.pictures import draw_latents, grid, sample, save_png


def generate(checkpoint, out, *, num=64, seed=0, separate=False, device="auto"):
    """Draw ``num`` new pictures with a checkpoint's generator.

    Args:
        checkpoint: the file, or the folder of the run.
        out: the PNG file for a grid of all pictures; with ``separate``, a folder for 000000.png, 000001.png, …
            Neither may exist, save an empty folder.
        num: how many pictures.
        seed: decides which; the first pictures of a seed are the same whatever ``num`` is.
        separate: one file per picture instead of a grid.
        device: auto, cpu, cuda or cuda:N.

    Returns:
        number of pictures, and their side in pixels.

    Raises:
        ValueError: an argument that is not allowed, a checkpoint that cannot be used, or ``out`` exists.
    """
    out = Path(out)
    for name, value, minimum in (("num", num, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value < 2**63:
            raise ValueError(f"{name} must be an integer of at least {minimum}; got {value!r}")
    _check_out(out, separate)
    device = pick_device(device)
    generator = load_generator(checkpoint, device)

    images = sample(generator, draw_latents(num, generator.nz, seed))
    if separate:
        out.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(images):
            save_png(image, out / f"{index:06d}.png")
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_png(grid(images), out)
    return len(images), images.shape[-1]


def _check_out(out, separate):
    if separate:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise ValueError(f"out {str(out)!r} must be a new or an empty folder")
    elif out.suffix.lower() != ".png":
        raise ValueError(f"out must end in .png; got {str(out)!r} (for one file per picture: separate)")
    elif out.exists():
        raise ValueError(f"out {str(out)!r} exists already: choose another name, or remove it")
