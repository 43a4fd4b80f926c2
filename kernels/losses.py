"""Binary cross-entropy on logits against constant targets: loss, gradient and mean probability in one pass."""

import torch
import triton
import triton.language as tl

from fastgan.kernels.launch import cdiv, launch
from fastgan.kernels.pieces import wait_for_previous
from fastgan.kernels.statistics import sum_rows

BLOCK = 1024


@triton.jit
def _bce(logits_ptr, grad_ptr, n, target, BLOCK: tl.constexpr):
    """This program's part of mean(softplus(−x) + (1 − target)·x), of its gradient σ(x) − target, and of mean σ(x)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < n
    x = tl.load(logits_ptr + i, mask=ok, other=0.0).to(tl.float32)
    # softplus(−x) without overflow, as exp sees only −|x|, and without losing log(1 + t) to rounding where x is large:
    # what u is rounded by, the quotient corrects (Kahan).
    t = tl.exp(-tl.abs(x))
    u = 1.0 + t
    log1p = tl.where(u == 1.0, t, tl.log(u) * (t / tl.where(u == 1.0, 1.0, u - 1.0)))
    loss = (1.0 - target) * x + tl.maximum(-x, 0.0) + log1p
    probability = tl.where(x < 0.0, t, 1.0) / u
    share = tl.full((1,), 1.0, tl.float32) / n
    tl.store(grad_ptr + i, (probability - target) * share, mask=ok)
    return tl.sum(tl.where(ok, loss * share, 0.0), 0), tl.sum(tl.where(ok, probability * share, 0.0), 0)


@triton.jit
def bce_kernel(
    real_ptr,  # (n_real,)
    fake_ptr,  # (n_fake,) or None: the generator's loss looks at one set only
    real_grad_ptr,  # (n_real,), any floating dtype
    fake_grad_ptr,  # (n_fake,)
    loss_ptr,  # (programs,): each one's part of the loss
    means_ptr,  # (programs, 2): of mean σ(real) and of mean σ(fake)
    n_real,
    n_fake,
    real_target,
    fake_target,
    BLOCK: tl.constexpr,
):
    wait_for_previous()
    loss, real_mean = _bce(real_ptr, real_grad_ptr, n_real, real_target, BLOCK)
    fake_mean = 0.0
    if fake_ptr is not None:
        fake_loss, fake_mean = _bce(fake_ptr, fake_grad_ptr, n_fake, fake_target, BLOCK)
        loss += fake_loss
    tl.store(loss_ptr + tl.program_id(0), loss)
    means_ptr += tl.program_id(0) * 2
    tl.store(means_ptr, real_mean)
    tl.store(means_ptr + 1, fake_mean)


def bce(real, fake, real_target, fake_target, grad_dtype=torch.float32):
    """Mean BCE of two contiguous 1-D sets of logits, each against its target, added; `fake` may be None.

    Returns:
        the loss, 0-dim float32; [mean σ(real), mean σ(fake)] float32; the loss's gradient (n_real + n_fake,) in
        `grad_dtype`, real's first.
    """
    n_real, n_fake = real.numel(), 0 if fake is None else fake.numel()
    programs = cdiv(max(n_real, n_fake), BLOCK)

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=real.device)

    loss, means, grads = empty(), empty(2), empty(n_real + n_fake, dtype=grad_dtype)
    parts = (loss, means) if programs == 1 else (empty(1, programs, 1), empty(1, programs, 2))
    launch(
        bce_kernel,
        (programs,),
        *(real, fake, grads, None if fake is None else grads[n_real:], *parts),
        *(n_real, n_fake, real_target, fake_target),
        device=real.device,
        BLOCK=BLOCK,
    )
    if programs > 1:
        sum_rows(parts[0], out=loss.view(1, 1))
        sum_rows(parts[1], out=means.view(1, 2))
    return loss, means, grads
