"""Which parts of a convolution a CPU computes faster as matrix products than PyTorch does as convolutions.

Between sides of many channels PyTorch's convolutions in float32 run as fast as the CPU multiplies. They are slow at the
ends of a GAN, a side of one position (`fastgan/cpu/convolution.py` knows those) and one of three channels, and where
large weights are put in order for few positions.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastgan.cpu.capabilities import cpu_kind
from fastgan.cpu.products import to_high, to_low, weight_grad_of_all_taps, weight_grad_tap_by_tap
from fastgan.memory_format import suggests_channels_last
from fastgan.ops.geometry import out_size


class Products(NamedTuple):
    """What computes each part of a convolution, forward and backward; None: PyTorch's convolution does."""

    to_high: Callable | None = None
    to_low: Callable | None = None
    weight_grad: Callable | None = None


class Sides(NamedTuple):
    """A convolution, seen the same way in both directions, as `fastgan/cpu/products.py` does."""

    batch: int
    low_size: tuple  # (h, w)
    high_size: tuple
    weight_shape: tuple  # (low channels, high channels, kh, kw)
    stride: tuple
    padding: tuple

    @property
    def positions(self):
        """Of an image on the low side."""
        return math.prod(self.low_size)


class Bounds(NamedTuple):
    """Where products with a large weight are the faster ones, in float32."""

    least_elements: int  # of the weight
    most_positions: float = math.inf  # of all images, on the low side
    least_stride: int = 1

    def hold(self, sides):
        return (
            math.prod(sides.weight_shape) >= self.least_elements
            and sides.batch * sides.positions <= self.most_positions
            and max(sides.stride) >= self.least_stride
        )


class LargeWeights(NamedTuple):
    """Where each product with a large weight is the faster one on a kind of CPU; None: nowhere."""

    to_high: Bounds | None
    to_low: Bounds | None
    weight_grad: Bounds | None  # of a channels_last weight
    default_weight_grad: Bounds | None  # of one in the default layout


# PyTorch's float32 convolutions wait for copies of large weights, where a low side of few positions makes their
# arithmetic small. How many times as long as products they take (two threads, cold caches as in a step, stride 2,
# batches of 1 to 32 but on the Intel; – was not measured; "few": up to 128 positions in all images):
#
#     channels                    AMD, AVX-512            Intel, AVX-512   AMD without AVX-512
#     weight gradient   256×512   0.9 to 3.8              –                1.1 to 8, all sizes; more for one position
#                       512×512   1.5 to 4.8              –
#                       512×1024  1.9 to 5.6              –
#     to the low side   256×512   few 1.0 to 2.2; 0.7     1.1 to 1.3       1.1 to 2.8
#                       512×512   few 1.1 to 2.8; 0.7     1.1 to 1.3       1.1 to 2.8
#                       512×1024  few 1.2 to 3.1; 0.9     1.1 to 1.3       twice that
#     from the low side 256×512   0.7 to 1.2              1.3 to 1.4       0.7 to 1.0
#                       512×512   0.7 to 1.2              1.3 to 1.4       0.7 to 1.9, mostly above 1; one position 4.6
#                       512×1024  few 0.9 to 2.7; 0.7     1.3 to 1.4       0.9 to 2.9
#
# Weights in the default layout are the same, but for their gradients on the AMD with AVX-512: 0.6 to 1.1, 0.9 to 2.2
# and 1.5 to 3.4. 512×512 at two positions a side and fewer: 2 on the Intel. Without strides (3×3 taps): on the AMD with
# AVX-512 weight gradients 0.6 to 3.5, the others 0.4 to 2; on the one without 1.0 to 10, for more than one image, and
# 0.6 to 1.8.
_WIDE, _WIDER, _WIDEST = 2**21, 2**22, 2**23  # elements: 256×512, 512×512 and 512×1024 channels of 4×4 taps
_LARGE_WEIGHTS = {
    "Intel": LargeWeights(
        to_high=Bounds(_WIDE),
        to_low=Bounds(_WIDE),
        weight_grad=Bounds(_WIDE),
        default_weight_grad=Bounds(_WIDE),
    ),
    "AMD": LargeWeights(
        to_high=Bounds(_WIDEST, most_positions=128, least_stride=2),
        to_low=Bounds(_WIDE, most_positions=128, least_stride=2),
        weight_grad=Bounds(_WIDE),
        default_weight_grad=Bounds(_WIDEST),
    ),
    "x86 without AVX-512": LargeWeights(
        to_high=Bounds(_WIDER, least_stride=2),
        to_low=Bounds(_WIDE, least_stride=2),
        weight_grad=Bounds(_WIDE),
        default_weight_grad=Bounds(_WIDE),
    ),
    "other": LargeWeights(to_high=None, to_low=None, weight_grad=Bounds(_WIDE), default_weight_grad=None),
}
_FEW_POSITIONS = 16  # of an image on the low side: with more of them no large weight gains
# PyTorch pads an image's channels to eight. Up to so many of them the product is 1.3 to 5 times as fast in float32, if
# the low side has _LEAST_LOW numbers for each; with fewer it is faster in a loop of nothing else, but not in a training
# step. Half precision, whose product is in float32, stops at one channel.
_IMAGE_CHANNELS, _IMAGE_CHANNELS_IN_HALF, _LEAST_LOW = 3, 1, 2**17
# Weight gradients in half precision: PyTorch puts each in order again, which counts where it is large beside what it is
# summed up of. A product copies that, all taps of it: at 8 positions (of all images) a channel both take the same time.
_POSITIONS_A_CHANNEL = 8
_LEAST_CHANNELS = 16  # a narrow product leaves the CPU's vectors half empty

_answers, _MOST_ANSWERS = {}, 1024  # of `products_for`


def surely_gains_nothing(x, weight, conv):
    """Whether a few sizes tell that no product does, in float32: most layers are such, and every call asks."""
    return weight.numel() < _WIDE and not _goes_to_image(x, weight, conv)


def _goes_to_image(x, weight, conv):
    """Whether the result or the gradient for x may have an image's few channels, and the low side numbers enough."""
    low_channels, image_channels = weight.shape[:2]
    if image_channels > _IMAGE_CHANNELS:
        return False
    if conv.transposed:
        return x.numel() >= _LEAST_LOW * image_channels
    if not (torch.is_grad_enabled() and x.requires_grad):
        return False
    smaller = math.prod(conv.stride) if isinstance(conv.stride, tuple) else 1  # somebody may have set one number
    return x.numel() * low_channels >= _LEAST_LOW * image_channels**2 * smaller


def products_for(x, weight, dtype, *conv_args):
    """The `Products` that gain for conv(x, weight) in `dtype`.

    The answer is kept: after a convolution, with the caches full of its numbers, Python takes four times as long.

    Args:
        conv_args: (transposed, stride, padding, output_padding).
    """
    key = x.shape, x.stride(), weight.shape, weight.stride(), dtype, conv_args, cpu_kind()
    found = _answers.get(key)
    if found is None:
        if len(_answers) >= _MOST_ANSWERS:
            _answers.clear()
        found = _answers[key] = _products_for(x, weight, dtype, *conv_args)
    return found


def _products_for(x, weight, dtype, transposed, stride, padding, output_padding):
    size = out_size(x, weight, transposed, stride, padding, output_padding)
    low, high = (x.shape[2:], size) if transposed else (size, x.shape[2:])
    sides = Sides(len(x), tuple(low), tuple(high), tuple(weight.shape), stride, padding)
    found = _with_large_weight(sides, x, weight) if dtype == torch.float32 else _in_half(sides, x, weight)
    if found.to_high is None and _is_to_image(sides, dtype):
        found = found._replace(to_high=to_high)
    return found if _fit(sides) else found._replace(to_high=None)


def _with_large_weight(sides, x, weight):
    in_channels_last = suggests_channels_last(weight)
    layout = torch.channels_last if in_channels_last else torch.contiguous_format
    # Results lie as the weight does, stock's as x, too.
    as_stock = in_channels_last or not suggests_channels_last(x)
    if sides.positions > _FEW_POSITIONS or not as_stock or not weight.is_contiguous(memory_format=layout):
        return Products()
    where = _LARGE_WEIGHTS[cpu_kind()]
    if in_channels_last:
        bounds, weight_grad = where.weight_grad, weight_grad_tap_by_tap
    else:
        bounds, weight_grad = where.default_weight_grad, weight_grad_of_all_taps
    wanted = (where.to_high, to_high), (where.to_low, to_low), (bounds, weight_grad)
    return Products(*[product if bounds and bounds.hold(sides) else None for bounds, product in wanted])


def _in_half(sides, x, weight):
    in_order = all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    few = sides.batch * sides.positions <= _POSITIONS_A_CHANNEL * len(weight)
    gains = in_order and few and min(weight.shape[:2]) >= _LEAST_CHANNELS
    return Products(weight_grad=weight_grad_of_all_taps if gains else None)


def _is_to_image(sides, dtype):
    """Whether going to the high side is faster as a product because that has few channels."""
    low_channels, image_channels, *kernel_size = sides.weight_shape
    most = _IMAGE_CHANNELS if dtype == torch.float32 else _IMAGE_CHANNELS_IN_HALF
    if image_channels > most or low_channels < _LEAST_CHANNELS or kernel_size == [1, 1]:
        return False
    return sides.batch * sides.positions * low_channels >= _LEAST_LOW * image_channels


def _fit(sides):
    """Whether `to_high` goes from one side to the other: `stride` times as large, without gaps."""
    axes = zip(sides.low_size, sides.high_size, sides.weight_shape[2:], sides.stride, sides.padding, strict=True)
    return all(high == low * step and padded + step <= taps for low, high, taps, step, padded in axes)
