"""A data set that lives on the GPU as uint8 and gives its batches there, inside a CUDA graph if need be."""

import torch

from fastgan import backend
from fastgan.checks import check_integer
from fastgan.data.batches import epoch_mirrored, epoch_order, scale, steps_per_epoch

MEMORY_SHARE = 0.5  # of the GPU memory that is free: the networks, their activations and the optimizers want the rest
_CHUNK = 64 << 20  # bytes that are on the GPU twice while the images are laid out there


class ResidentImages:
    """Batches from a uint8 data set that is held on ``device``: the same ones, in the same order, as ``batches`` gives.

    On the host call ``before_step()`` before each step, then ``draw()``, or the replay of a CUDA graph that holds one
    ``draw()``. The images of the batch are chosen on the device: ``draw`` waits for nothing, depends on no number of
    the host's, and reads buffers that stay where they are. Draw once outside before capturing: it compiles the kernel.

    A draw without its ``before_step`` (a warm-up that is undone, say) moves the batches on; ``seek`` puts them right.

    Args:
        images: uint8 (count, C, H, W), on any device.
        batch_size: images in a batch; an incomplete last batch of an epoch is dropped.
        device: where the images are to be. On a CPU everything works as well, by plain torch.
        dtype: of the batches; they are scaled in float32 and then rounded.
        seed: decides the order and what is mirrored.
        flip: mirror half of the images left to right, chosen anew in every epoch.

    Raises:
        ValueError: an argument that is not allowed, or fewer images than one batch.
    """

    def __init__(self, images, batch_size, *, device, dtype=torch.float32, seed, flip=False):
        if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8 or images.dim() != 4:
            came = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, torch.Tensor) else repr(images)
            raise ValueError(f"images must be a torch.uint8 tensor of shape (count, C, H, W); got {came}")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating torch.dtype; got {dtype!r}")
        self.steps_per_epoch = steps_per_epoch(images, batch_size)
        check_integer("seed", seed, 0)
        self.batch_size, self.dtype, self.seed = batch_size, dtype, seed
        device = torch.device(device)
        self.backend, _ = backend.select(device, dtype)
        self.images = _channels_last(images, device)
        counters = 1
        if self.backend == "triton":
            from fastgan.kernels.data import programs

            counters = programs(batch_size, self.images)
        self._order = torch.empty(len(images), dtype=torch.int32, device=device)
        self._mirrored = torch.empty(len(images), dtype=torch.uint8, device=device) if flip else None
        self._drawn = torch.zeros(counters, dtype=torch.int32, device=device)  # batches of this epoch, many times over
        self._epoch = None
        self.seek(0)

    def seek(self, step):
        """Make batch number ``step`` the next one, as a run does that resumes; call ``before_step`` before its draw."""
        check_integer("step", step, 0)
        self._next = step
        self._set_epoch(step // self.steps_per_epoch)
        self._drawn.fill_(step % self.steps_per_epoch)

    def before_step(self):
        """Get ready for one ``draw()``, on the host: at the end of an epoch, send the order of the next one.

        Returns:
            None, for the step draws its images itself; ``HostImages`` returns them here.
        """
        epoch = self._next // self.steps_per_epoch
        if epoch != self._epoch:
            self._set_epoch(epoch)
            self._drawn.zero_()
        self._next += 1

    def draw(self):
        """The next batch: (batch_size, C, H, W) in [−1, 1], in channels_last memory, newly allocated."""
        if self.backend == "reference":
            return _draw_reference(self.images, self._order, self._mirrored, self._drawn, self.batch_size, self.dtype)
        from fastgan.kernels.data import next_batch

        return next_batch(self.images, self._order, self._mirrored, self._drawn, self.batch_size, self.dtype)

    def seconds_waited(self):
        """How long steps have waited for data since this was asked last: never, so 0.0."""
        return 0.0

    def close(self):
        """Nothing to end; ``HostImages`` ends its reading here."""

    def _set_epoch(self, epoch):
        count = len(self._order)
        self._send(epoch_order(count, self.seed, epoch), self._order)
        if self._mirrored is not None:
            self._send(epoch_mirrored(count, self.seed, epoch), self._mirrored)
        self._epoch = epoch

    @staticmethod
    def _send(values, buffer):
        values = values.to(buffer.dtype)
        # From pinned memory the copy takes its turn on the stream, after the draws already there; the host goes on.
        buffer.copy_(values.pin_memory() if buffer.is_cuda else values, non_blocking=True)


def why_not_resident(dataset, device, share):
    """What speaks against holding the data set on ``device`` by ``ResidentImages``; None if nothing does.

    Args:
        dataset: what ``load`` returns.
        device: a torch.device.
        share: how much of the GPU memory that is free the images may take.
    """
    if device.type != "cuda":
        return f"it needs CUDA, and the device is {device.type!r}"
    images = getattr(dataset, "images", None)
    if images is None:
        return f"data set {dataset.name!r} is too large to be held in memory, and is read as it is needed"
    free, _ = torch.cuda.mem_get_info(device)
    if images.numel() > share * free:
        return f"the images take {images.numel() / 1e9:.2f} GB, and {free / 1e9:.2f} GB of the GPU's memory are free"
    return None


def _channels_last(images, device):
    """The images as (count, H, W, C), contiguous, on `device`, with little more memory there than they take."""
    count, channels, height, width = images.shape
    laid_out = torch.empty((count, height, width, channels), dtype=torch.uint8, device=device)
    chunk = max(1, _CHUNK // images[0].numel())
    for part, to in zip(images.split(chunk), laid_out.split(chunk), strict=True):
        to.copy_(part.to(device).permute(0, 2, 3, 1))
    return laid_out


def _draw_reference(images, order, mirrored, drawn, batch_size, dtype):
    """What the kernel computes, in plain torch; `drawn` counts in place, and nothing is read on the host."""
    first = drawn[0] % (len(order) // batch_size) * batch_size
    rows = first + torch.arange(batch_size, device=order.device)
    batch = images.index_select(0, order[rows])  # (batch_size, H, W, C)
    if mirrored is not None:
        batch = torch.where(mirrored[rows].bool().view(-1, 1, 1, 1), batch.flip(2), batch)
    drawn.add_(1)
    return scale(batch).to(dtype).permute(0, 3, 1, 2)
