"""Decoding one picture: every mode and file type, cropped and resized."""

import numpy as np
import pytest

from fastgan.data.pictures import read_picture
from tests.data import colour

Image = pytest.importorskip("PIL.Image")


def saved(tmp_path, picture, name="picture.png", **options):
    picture.save(tmp_path / name, **options)
    return tmp_path / name


def test_grayscale(tmp_path):
    assert colour(read_picture(saved(tmp_path, Image.new("L", (9, 9), 77)), 4)) == [77, 77, 77]


def test_one_bit(tmp_path):
    assert colour(read_picture(saved(tmp_path, Image.new("1", (9, 9), 1)), 4)) == [255, 255, 255]


def test_palette(tmp_path):
    picture = Image.new("RGB", (9, 9), (1, 2, 3)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert colour(read_picture(saved(tmp_path, picture), 4)) == [1, 2, 3]


def test_transparent_palette(tmp_path):
    picture = Image.new("P", (9, 9), 0)
    picture.putpalette([1, 2, 3])
    assert colour(read_picture(saved(tmp_path, picture, transparency=0), 4)) == [255, 255, 255]


@pytest.mark.parametrize(("mode", "black"), [("RGBA", (0, 0, 0)), ("LA", (0,))])
def test_transparency_is_laid_on_white(tmp_path, mode, black):
    clear = saved(tmp_path, Image.new(mode, (9, 9), (*black, 0)))
    assert colour(read_picture(clear, 4)) == [255, 255, 255]
    translucent = saved(tmp_path, Image.new(mode, (9, 9), (*black, 51)))
    assert colour(read_picture(translucent, 4)) == [204, 204, 204]


@pytest.mark.parametrize("name", ["picture.png", "picture.tif"])
@pytest.mark.parametrize(("deep", "eight_bit"), [(0, 0), (257 * 100, 100), (65535, 255)])
def test_sixteen_bits(tmp_path, name, deep, eight_bit):
    picture = Image.fromarray(np.full((9, 9), deep, dtype=np.uint16))
    assert colour(read_picture(saved(tmp_path, picture, name), 4)) == [eight_bit] * 3


@pytest.mark.parametrize(("number", "eight_bit"), [(100, 100), (255, 255), (257 * 100, 100)])
def test_thirty_two_bits(tmp_path, number, eight_bit):
    """Of either usual range."""
    picture = Image.fromarray(np.full((9, 9), number, dtype=np.int32))
    assert colour(read_picture(saved(tmp_path, picture, "picture.tif"), 4)) == [eight_bit] * 3


@pytest.mark.parametrize(("number", "eight_bit"), [(0.2, 51), (1.0, 255), (51.0, 51), (np.nan, 0)])
def test_floating_point(tmp_path, number, eight_bit):
    """Of either usual range."""
    picture = Image.fromarray(np.full((9, 9), number, dtype=np.float32))
    assert colour(read_picture(saved(tmp_path, picture, "picture.tif"), 4)) == [eight_bit] * 3


def test_cmyk_jpeg(tmp_path):
    picture = saved(tmp_path, Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "picture.jpg")
    assert colour(read_picture(picture, 4)) == [255, 255, 255]


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (9, 9), plain) for plain in ("red", "blue")]
    path = saved(tmp_path, frames[0], "picture.gif", save_all=True, append_images=frames[1:])
    assert colour(read_picture(path, 4)) == [255, 0, 0]


def test_exif_rotation(tmp_path):
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:4] = 255
    picture = Image.fromarray(pixels)
    picture.getexif()[0x0112] = 3  # taken upside down
    upright = read_picture(saved(tmp_path, picture, exif=picture.getexif()), 8)
    assert not upright[:, :4].any() and (upright[:, 4:] == 255).all()


@pytest.mark.parametrize("size", [(40, 20), (20, 40)])
def test_crop_is_the_centre(tmp_path, size):
    """A centred red square, blue beside it: all that remains is red, up to the filter's reach over the edges."""
    picture = Image.new("RGB", size, "blue")
    picture.paste("red", ((size[0] - 20) // 2, (size[1] - 20) // 2, (size[0] + 20) // 2, (size[1] + 20) // 2))
    image = read_picture(saved(tmp_path, picture), 10)
    assert (image[0] > 230).all() and (image[2] < 30).all()
    assert np.array_equal(image, image[:, ::-1, ::-1])


def test_crop_equals_resizing_everything_first(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8))
    whole = np.asarray(noise.resize((20, 10), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(read_picture(saved(tmp_path, noise), 10), whole[:, :, 5:15])


def test_shrinking_is_antialiased(tmp_path):
    """A fine checkerboard becomes gray; picking pixels would leave black and white."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    image = read_picture(saved(tmp_path, Image.fromarray(board)), 8)
    assert image.min() > 115 and image.max() < 140


def test_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    ramp = np.linspace(0, 255, 640).astype(np.uint8)
    picture = Image.fromarray(np.broadcast_to(ramp, (640, 640)).copy())
    image = read_picture(saved(tmp_path, picture, "picture.jpg", quality=95), 16)
    expected = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC))
    assert np.abs(image.astype(int) - expected).max() <= 2
