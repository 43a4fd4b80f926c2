"""A gradient's way back through a convolution and on to what was before it: an activation, BatchNorm.

Both operators are of first order (`fastgan.first_order`): they have no gradients of their own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan.ops.choice import choose, conv_problem
from fastgan.ops.geometry import out_size
from fastgan.ops.implementations import empty_result, in_dtype_of, run_conv, run_conv_batch_norm_grad
from fastgan.ops.operators import operator


@operator("fastgan::conv_activation_grad")
def conv_activation_grad(
    dz: Tensor,
    weight: Tensor,
    weight_copy: Tensor | None,
    activated: Tensor,
    transposed: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    activation: str,
    slope: float,
) -> Tensor:
    """conv(dz, weight)·act'(z) where activated = act(z): the way back through a convolution and what was before it."""
    size = out_size(dz, weight, transposed, stride, padding, output_padding)
    problem = conv_problem(dz, weight, transposed, stride, padding, size, then="activated")
    return run_conv(
        choose(problem, dz.device),
        dz,
        in_dtype_of(dz, weight, weight_copy),
        size,
        transposed=transposed,
        stride=stride,
        padding=padding,
        activation=activation,
        slope=slope,
        activated=activated,
    )


@conv_activation_grad.register_fake
def _(dz, weight, weight_copy, activated, transposed, stride, padding, output_padding, activation, slope):
    return empty_result(dz, weight, transposed, stride, padding, output_padding)


@operator("fastgan::conv_batch_norm_grad")
def conv_batch_norm_grad(
    dz: Tensor,
    weight: Tensor,
    weight_copy: Tensor | None,
    normalized: Sequence[Tensor],
    transposed: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """conv(dz, weight)·act'(z) where z = γ·x̂ + β: the way back through a convolution and to the BatchNorm before it.

    `normalized` is (y, mean, invstd) or (y, mean, invstd, gamma, beta) with x̂ = (y − mean)·invstd. Also returned are
    that BatchNorm's sums over the result, [Σ dz, Σ dz·x̂], (groups, 2, C) float32.
    """
    size = out_size(dz, weight, transposed, stride, padding, output_padding)
    problem = conv_problem(dz, weight, transposed, stride, padding, size, then="normalized")
    return run_conv_batch_norm_grad(
        choose(problem, dz.device),
        dz,
        in_dtype_of(dz, weight, weight_copy),
        size,
        (*normalized, None, None)[:5],
        transposed=transposed,
        stride=stride,
        padding=padding,
        activation=activation,
        slope=slope,
    )


@conv_batch_norm_grad.register_fake
def _(dz, weight, weight_copy, normalized, transposed, stride, padding, output_padding, activation, slope):
    grad = empty_result(dz, weight, transposed, stride, padding, output_padding)
    return grad, dz.new_empty((len(normalized[1]), 2, grad.shape[1]), dtype=torch.float32)
