"""The GAN losses on logits: one kernel gives loss, gradients and the mean probabilities."""

import torch
from torch import Tensor


@torch.library.custom_op("fastgan::bce", mutates_args=())
def bce(real: Tensor, fake: Tensor | None, real_target: float, fake_target: float) -> tuple[Tensor, Tensor, Tensor]:
    """([loss, mean σ(real), mean σ(fake)], gradient for real, gradient for fake), all float32.

    The loss is the mean BCE of `real` against its target plus that of `fake`, if there is any, against its own.
    Only the loss is differentiable, in both sets of logits; the probabilities are for monitoring.
    """
    from fastgan.kernels.losses import bce as kernel

    flat_fake = None if fake is None else fake.contiguous().view(-1)
    sums, real_grad, fake_grad = kernel(real.contiguous().view(-1), flat_fake, real_target, fake_target)
    # An operator cannot return None.
    fake_grad = real_grad.new_empty(0) if fake is None else fake_grad.view(fake.shape)
    return sums, real_grad.view(real.shape), fake_grad


@bce.register_fake
def _(real, fake, real_target, fake_target):
    shapes = (3,), real.shape, (0,) if fake is None else fake.shape
    return tuple(real.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _save(ctx, inputs, output):
    real, fake, *ctx.targets = inputs
    ctx.save_for_backward(real, fake, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros are written for the gradients' gradients


def _backward(ctx, dsums, *_):
    *logits, real_grad, fake_grad = ctx.saved_tensors
    found = []
    for x, grad, target, wanted in zip(
        logits, (real_grad, fake_grad), ctx.targets, ctx.needs_input_grad[:2], strict=True
    ):
        if wanted and torch.is_grad_enabled():  # create_graph=True: a gradient that has one of its own
            grad = (x.float().sigmoid() - target) / x.numel()
        # It stays in float32 until the loss scale of mixed precision is in it: 1/N is small in float16.
        found.append((grad * dsums[0]).to(x.dtype) if wanted else None)
    return *found, None, None


bce.register_autograd(_backward, setup_context=_save)
