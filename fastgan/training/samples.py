"""Pictures from a generator: sampling, grids, PNG files."""

import math

import torch

from fastgan.data import to_uint8
from fastgan.files import written_whole

_AT_A_TIME = 256  # images that the generator makes
_GAP = 2  # pixels between the images of a grid


def draw_latents(count, nz, seed):
    """``count`` latent vectors, float32 (count, nz) on the CPU, that depend on ``seed`` alone.

    The first ones are the same whatever ``count`` is, and the global random generators are left alone. In the place of
    a seed a torch.Generator may stand: it goes on where it was.
    """
    random = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(nz, generator=random, device="cpu") for _ in range(count)])


@torch.no_grad()
def sample(generator, latents):
    """The generator's images of ``latents``: uint8 (N, nc, S, S) on the CPU.

    In eval mode, so that a picture depends on its own latent only and running statistics stay as they are; the
    generator returns to the mode it was in.
    """
    was_training = generator.training
    device = next(generator.parameters()).device
    generator.eval()
    try:
        return torch.cat([to_uint8(generator(part.to(device))).cpu() for part in latents.split(_AT_A_TIME)])
    finally:
        generator.train(was_training)


def grid(images):
    """Tile uint8 images (N, nc, S, S) into one uint8 (nc, H, W), as square as can be, on black."""
    count, nc, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cells = images.new_zeros(rows * columns, nc, height + _GAP, width + _GAP)
    cells[:count, :, _GAP:, _GAP:] = images
    cells = cells.view(rows, columns, nc, height + _GAP, width + _GAP)
    tiled = cells.permute(2, 0, 3, 1, 4).reshape(nc, rows * (height + _GAP), columns * (width + _GAP))
    return torch.nn.functional.pad(tiled, (0, _GAP, 0, _GAP))


def save_png(image, path, *, software=None):
    """Write one uint8 image (nc, H, W), grey or RGB, to a PNG file, whole or not at all; it may say what made it."""
    from PIL import Image, PngImagePlugin

    array = image.squeeze(0).numpy() if image.shape[0] == 1 else image.permute(1, 2, 0).contiguous().numpy()
    about = PngImagePlugin.PngInfo()
    if software is not None:
        about.add_text("Software", software)
    with written_whole(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG", pnginfo=about)
