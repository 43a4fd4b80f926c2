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
    real, fake, *_ = inputs
    ctx.dtypes = real.dtype, None if fake is None else fake.dtype
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros are written for the gradients' gradients


def _backward(ctx, dsums, *_):
    # The gradients stay in float32 until the loss scale of mixed precision is in them: 1/N is small in float16.
    real_grad, fake_grad = (
        (grad * dsums[0]).to(dtype) if wanted else None
        for grad, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
    )
    return real_grad, fake_grad, None, None


bce.register_autograd(_backward, setup_context=_save)
