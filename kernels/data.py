"""Batches from a data set that lies on the GPU: picked, mirrored, scaled and laid out in one launch."""

import torch
import triton
import triton.language as tl

from fastgan.kernels.launch import cdiv, launch, next_power_of_2
from fastgan.kernels.pieces import wait_for_previous

BLOCK = 2048


@triton.jit
def next_batch_kernel(
    images_ptr,  # (count, H, W, C) uint8
    order_ptr,  # (≥ batches · batch_size,) image numbers, the order of an epoch
    mirrored_ptr,  # (the same,) uint8: 1 where that image of the order is to be mirrored; or None: none is
    drawn_ptr,  # (programs,) int32: how many batches of the epoch have been drawn
    out_ptr,  # (batch_size, H, W, C)
    batches,
    batch_size,
    SIZE: tl.constexpr,  # H · W · C
    W: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_previous()
    program = tl.program_id(0)
    n = program // tl.cdiv(SIZE, BLOCK)
    i = program % tl.cdiv(SIZE, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    ok = i < SIZE

    # Every program counts for itself, because none can tell whether the others have read a common counter yet. The
    # atomic is for its order: it reads once for all threads of the program, and before it writes.
    drawn = tl.atomic_add(drawn_ptr + program, 1, sem="relaxed")
    # The remainder keeps whoever draws beyond the end of the epoch inside of `order`.
    row = drawn % batches * batch_size + n
    image = tl.load(order_ptr + row).to(tl.int64)

    source = i
    if mirrored_ptr is not None:
        column = i // C % W
        source = tl.where(tl.load(mirrored_ptr + row) != 0, i + (W - 1 - 2 * column) * C, i)
    x = tl.load(images_ptr + image * SIZE + source, mask=ok, other=0).to(tl.float32)
    # The rounded division, so that the bits are those of torch on a CPU; a plain one is an approximation.
    x = tl.div_rn(x, tl.full(x.shape, 127.5, tl.float32)) - 1.0
    tl.store(out_ptr + n.to(tl.int64) * SIZE + i, x.to(out_ptr.dtype.element_ty), mask=ok)


def _block(size):
    return min(next_power_of_2(size), BLOCK)


def programs(batch_size, images):
    """How many programs write a batch: the length of `drawn`."""
    size = images[0].numel()
    return batch_size * cdiv(size, _block(size))


def next_batch(images, order, mirrored, drawn, batch_size, dtype):
    """The next batch in `dtype`, scaled to [−1, 1]: (batch_size, C, H, W) in channels_last memory; adds 1 to `drawn`.

    Args:
        images: (count, H, W, C) uint8, contiguous.
        order: (≥ batch_size,) int32 or int64, contiguous: the images of an epoch's batches, one batch after the other.
        mirrored: (the same,) uint8, contiguous: 1 for those to be mirrored left to right; None for none.
        drawn: (programs(batch_size, images),) int32, all of one value: the batches drawn from this order.
    """
    _, height, width, channels = images.shape
    size = height * width * channels
    out = torch.empty((batch_size, height, width, channels), dtype=dtype, device=images.device)
    launch(
        next_batch_kernel,
        (drawn.numel(),),
        *(images, order, mirrored, drawn, out),
        *(len(order) // batch_size, batch_size),
        device=images.device,
        SIZE=size,
        W=width,
        C=channels,
        BLOCK=_block(size),
    )
    return out.permute(0, 3, 1, 2)
