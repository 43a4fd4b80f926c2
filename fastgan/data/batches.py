"""Batches in a reproducible order, and the way between uint8 images and the range of the networks."""

import itertools
import signal
import warnings

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fastgan.checks import check_integer, first_few


def steps_per_epoch(dataset, batch_size):
    """How many whole batches the data set has; an incomplete last one is dropped.

    Raises:
        ValueError: the data set has fewer images than one batch, or ``batch_size`` is no positive integer.
    """
    check_integer("batch_size", batch_size, 1)
    if len(dataset) < batch_size:
        raise ValueError(f"batch_size must be at most the {len(dataset)} images of the data set; got {batch_size}")
    return len(dataset) // batch_size


def batch_indices(dataset, batch_size, *, seed, first_step=0):
    """Endless iterator of the image numbers in each batch: int64 (batch_size,).

    The numbers of step i depend on (len(dataset), batch_size, seed, i) only. Epoch e runs through a permutation drawn
    from a generator that is seeded by (seed, e), so a run that resumes at ``first_step`` goes on as if unbroken.

    Raises:
        ValueError: an argument that is not allowed, or fewer images than one batch.
    """
    return (indices for indices, _ in _plan(dataset, batch_size, seed, first_step, flip=False))


def _plan(dataset, batch_size, seed, first_step, flip):
    """For each batch the image numbers, and which of them to mirror: bool (batch_size,), or None for none.

    Checks the arguments now, not when the first batch is asked for.
    """
    count, per_epoch = len(dataset), steps_per_epoch(dataset, batch_size)
    check_integer("seed", seed, 0)
    check_integer("first_step", first_step, 0)

    def plan_of(epoch):
        order = epoch_order(count, seed, epoch).split(batch_size)
        mirrored = epoch_mirrored(count, seed, epoch).split(batch_size) if flip else [None] * len(order)
        return itertools.islice(zip(order, mirrored, strict=True), per_epoch)

    epoch, start = divmod(first_step, per_epoch)
    return itertools.islice(itertools.chain.from_iterable(map(plan_of, itertools.count(epoch))), start, None)


def epoch_order(count, seed, epoch):
    """The order of the images in an epoch: int64 (count,), a permutation."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(count))


def epoch_mirrored(count, seed, epoch):
    """Which images of that order are mirrored left to right where a run flips: bool (count,), half of them or so."""
    # The third number makes it another stream of random bits than the order's.
    return torch.from_numpy(np.random.default_rng((seed, epoch, 1)).integers(0, 2, count, dtype=np.bool_))


def batches(dataset, batch_size, *, seed, first_step=0, workers=0, flip=False):
    """Endless iterator of batches: uint8 (batch_size, nc, S, S), in the order of ``batch_indices``.

    Args:
        dataset: what ``load`` returns.
        batch_size: images in each batch.
        seed: decides the order.
        first_step: number of the first batch; those before it are not read.
        workers: processes that decode images; 0 decodes in this one. Images in memory need none.
        flip: mirror half of the images left to right, chosen anew in every epoch, by ``seed`` and epoch only.

    Raises:
        ValueError: an argument that is not allowed, or fewer images than one batch; while iterating, no picture that
            can be read.
    """
    check_integer("workers", workers, 0)
    plan = _plan(dataset, batch_size, seed, first_step, flip)
    images = getattr(dataset, "images", None)
    if images is not None:
        return (_mirror(images.index_select(0, indices), mirrored) for indices, mirrored in plan)
    return _on_demand(dataset, plan, workers)


def _mirror(batch, mirrored):
    """Mirror those images of a batch that `mirrored`, one bool each, names; None names none. In place."""
    if mirrored is not None:
        which = torch.as_tensor(mirrored, device="cpu")
        batch[which] = batch[which].flip(-1)
    return batch


def _on_demand(dataset, plan, workers):
    loader = DataLoader(
        _WholeBatches(dataset),
        batch_size=None,  # the sampler's items are whole batches already
        sampler=([None if part is None else part.tolist() for part in parts] for parts in plan),
        num_workers=workers,
        generator=torch.Generator(),  # otherwise the loader draws a seed from the global generator
        worker_init_fn=_leave_interrupts_alone,
    )
    unreadable = {}
    with torch.device("cpu"):  # whatever the default is: the loader draws a number from that generator
        loaded = iter(loader)
    try:
        for batch, more in loaded:
            if isinstance(batch, ValueError):
                raise batch
            if more and not unreadable:
                first = next(iter(more.values()))
                warnings.warn(
                    f"{first}; the next picture takes its place, as with others like it, which are counted to the end",
                    stacklevel=2,
                )
            unreadable.update(more)
            yield batch
    finally:
        if len(unreadable) > 1:
            reasons = first_few(unreadable.values(), "; ")
            warnings.warn(f"{len(unreadable)} of {len(dataset)} pictures could not be read: {reasons}", stacklevel=2)


def _leave_interrupts_alone(_):
    """In a worker: Ctrl-C reaches all processes of a terminal, and the one that trains still waits for batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _WholeBatches(Dataset):
    """Reads a list of images at a time: (batch, those that turned out to be unreadable).

    An error is handed over in the batch's place: DataLoader would bury it in a traceback.
    """

    def __init__(self, dataset):
        self.dataset, self.told = dataset, 0

    def __getitem__(self, batch):
        indices, mirrored = batch
        try:
            images = _mirror(torch.stack([self.dataset[index] for index in indices]), mirrored)
        except ValueError as error:
            return error, {}
        unreadable = getattr(self.dataset, "unreadable", {})
        more = dict(itertools.islice(unreadable.items(), self.told, None))
        self.told = len(unreadable)
        return images, more


def scale(images):
    """uint8 images to float32 in [−1, 1]: x / 127.5 − 1, in the same shape, with the same bits on every device.

    Raises:
        ValueError: the images are not uint8.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be torch.uint8; got {images.dtype}")
    # By a number, torch on CUDA divides through its reciprocal, which rounds differently; by a tensor it does divide.
    return images.to(torch.float32) / torch.full((), 127.5, dtype=torch.float32, device=images.device) - 1


def to_uint8(images):
    """Floating images to uint8, the inverse of ``scale``: values outside [−1, 1] are clamped, others rounded.

    Raises:
        ValueError: the images are not floating point.
    """
    if not images.is_floating_point():
        raise ValueError(f"images must be floating point; got {images.dtype}")
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
