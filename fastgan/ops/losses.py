"""The GAN losses on logits: one kernel gives loss, gradients and the mean probabilities."""

import torch
from torch import Tensor

from fastgan.ops.operators import operator


@operator("fastgan::bce")
def bce(
    real: Tensor, fake: Tensor | None, real_target: float, fake_target: float, grads_as_logits: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, [mean σ(real), mean σ(fake)], the loss's gradient for all logits, flat, real's first), all in float32.

    With `grads_as_logits` the gradient is in the dtype of `real`, for who passes it on as it is.

    The loss, 0-dim, is the mean BCE of `real` against its target plus that of `fake`, if there is any, against its own.
    It alone is differentiable, in both sets of logits; the probabilities are for monitoring.
    """
    from fastgan.kernels.losses import bce as kernel

    flat_fake = None if fake is None else fake.contiguous().view(-1)
    grad_dtype = real.dtype if grads_as_logits else torch.float32
    return kernel(real.contiguous().view(-1), flat_fake, real_target, fake_target, grad_dtype)


@bce.register_fake
def _(real, fake, real_target, fake_target, grads_as_logits):
    count = real.numel() + (0 if fake is None else fake.numel())
    loss, means = (real.new_empty(shape, dtype=torch.float32) for shape in ((), (2,)))
    return loss, means, real.new_empty(count, dtype=real.dtype if grads_as_logits else torch.float32)


def _save(ctx, inputs, output):
    real, fake, *ctx.targets, _ = inputs
    ctx.save_for_backward(real, fake, output[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros are written for what has no gradient


def _backward(ctx, dloss, *_):
    *logits, grads = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: gradients that have gradients of their own
        sets = zip(logits, ctx.targets, strict=True)
        grads = torch.cat([(x.float().sigmoid() - t).reshape(-1) / x.numel() for x, t in sets if x is not None])
    # They stay in float32 until the loss scale of mixed precision is in them: 1/N is small in float16.
    grads = grads * dloss
    found, start = [], 0
    for x, wanted in zip(logits, ctx.needs_input_grad[:2], strict=True):
        count = 0 if x is None else x.numel()
        found.append(grads[start : start + count].view(x.shape).to(x.dtype) if wanted else None)
        start += count
    return *found, None, None, None


bce.register_autograd(_backward, setup_context=_save)
