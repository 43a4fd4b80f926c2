"""One picture, whatever its format, to a square uint8 array."""

import numpy as np

# Modes that hold 0 … 65,535, or, of 32 bits, 0 … 255 at times. Pillow's own conversion clips them at 255.
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def read_picture(file, image_size):
    """Decode a picture file to RGB, resized and centre-cropped: uint8 (3, image_size, image_size).

    Transparent pictures are laid on white, the rotation noted in EXIF is applied, and of an animation the first frame
    is taken.

    Args:
        file: a path or an open binary file.
        image_size: side of the result.

    Raises:
        whatever Pillow raises for a file that it cannot decode: OSError, SyntaxError, struct.error and others.
    """
    from PIL import Image, ImageOps

    with Image.open(file) as picture:
        # JPEG can decode at 1/2, 1/4 or 1/8 for a fraction of the time; twice the wanted side keeps the quality.
        picture.draft(None, (2 * image_size, 2 * image_size))
        ImageOps.exif_transpose(picture, in_place=True)
        return to_square(_to_rgb(picture), image_size)


def to_square(picture, image_size):
    """Resize a Pillow picture ("L" or "RGB") so that its shorter side fits and crop the centre: uint8 (C, S, S)."""
    from PIL import Image

    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # Resizing the centre square alone gives the same pixels as resizing all and cropping, with less work. Pillow
    # widens the filter by the scale (antialiasing) when it shrinks.
    box = (left, top, left + side, top + side)
    square = np.asarray(picture.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box))
    return square[None] if square.ndim == 2 else square.transpose(2, 0, 1)


def _to_rgb(picture):
    from PIL import Image

    if picture.mode in _DEEP_MODES:
        numbers = np.asarray(picture)
        numbers = numbers if picture.mode == "I" and numbers.max() <= 255 else numbers / 257
        eight_bit = np.clip(numbers, 0, 255).round().astype(np.uint8)
        return Image.fromarray(eight_bit).convert("RGB")
    if picture.mode == "F":  # floating point, of either usual range
        numbers = np.nan_to_num(np.asarray(picture))
        numbers = numbers * 255 if numbers.max() <= 1 else numbers
        return Image.fromarray(np.clip(numbers, 0, 255).round().astype(np.uint8)).convert("RGB")
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")
