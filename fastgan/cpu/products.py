"""Convolutions and their gradients as matrix products, for CPUs; `fastgan/cpu/choice.py` says where they gain.

"Low" and "high" are the sides with fewer and with more positions: (result, x) of a convolution, (x, result) of a
transposed one. Weights are (low channels, high channels, kh, kw), without dilation or groups.
"""

import torch
import torch.nn.functional as F

from fastgan.memory_format import suggests_channels_last

_MANY_CHANNELS = 16  # on a high side: enough to fill vectors along them
# So many numbers of taps at once: of 32 images of 4×4 positions by 256 channels of 4×4 taps. More leave the caches,
# which takes up to a quarter longer; with half as many the products are the slower ones.
_TAPS_AT_ONCE = 2**21


def from_one_position(x, weight):
    """conv_transpose2d of (N, in_channels, 1, 1) without padding: one product, in the layout of the weight."""
    y = _of_rows(torch.mm(x.flatten(1), _rows(weight, weight)), weight)
    return y.contiguous(memory_format=torch.channels_last) if suggests_channels_last(x) else y


def to_one_position(x, weight):
    """conv2d of images as large as the kernel, without padding."""
    y = F.linear(_rows(x, weight)[:, None, None], _rows(weight, weight))
    return y if y.shape[3] == 1 else y.flatten(1)[:, :, None, None]  # of one channel it is no view


def to_high(low, weight, stride, padding, layouts):
    """conv_transpose2d to sides `stride` times as large, with so large a kernel that each position there gets a tap.

    Low sides in half precision are added up in float32. The result is channels_last if one of `layouts` is.
    """
    size, channels = low.shape[2:], weight.shape[1]
    high = _result(low, weight, channels, [side * step for side, step in zip(size, stride, strict=True)], layouts)
    taps_of = _taps_first if channels < _MANY_CHANNELS else _taps_last
    weight = weight.to(torch.promote_types(low.dtype, torch.float32))
    parts = _parts(len(low), weight[0].numel() * size.numel())
    for low_part, high_part in zip(low.chunk(parts), high.chunk(parts), strict=True):
        taps = taps_of(low_part.to(weight.dtype), weight)
        for axis in range(2):
            taps = _added_up(taps, axis, stride[axis], padding[axis])
        by_phase = high_part.view(-1, channels, size[0], stride[0], size[1], stride[1])
        by_phase.copy_(taps.permute(3, 0, 4, 1, 5, 2))
    return high


def _result(x, weight, channels, size, layouts):
    """Memory for the result of their convolution: no view, because an activation in place may come next."""
    layout = torch.channels_last if any(map(suggests_channels_last, layouts)) else torch.contiguous_format
    return torch.empty(len(x), channels, *size, dtype=weight.dtype, device=x.device, memory_format=layout)


def _parts(images, taps_an_image):
    """In how many parts to take the images."""
    return -(-images // max(1, _TAPS_AT_ONCE // taps_an_image))


def _taps_first(low, weight):
    """What each tap adds to the high side, (high channels, kh, kw, N, height of the low side, its width), for few
    channels: as rows, whose positions lie side by side."""
    (n, _, *size), kernel_size = low.shape, weight.shape[2:]
    by_tap = weight.flatten(1).t()
    if low.is_contiguous(memory_format=torch.channels_last):
        return torch.mm(by_tap, _by_position(low).t()).view(-1, *kernel_size, n, *size)
    return torch.bmm(by_tap.expand(n, -1, -1), low.flatten(2)).view(n, -1, *kernel_size, *size).movedim(0, 3)


def _taps_last(low, weight):
    """The same for many channels: in the order of the weight."""
    size, (channels, *kernel_size) = low.shape[2:], weight.shape[1:]
    taps = torch.mm(_by_position(low), _rows(weight, weight))
    if suggests_channels_last(weight):
        return taps.view(-1, *size, *kernel_size, channels).permute(5, 3, 4, 0, 1, 2)
    return taps.view(-1, *size, channels, *kernel_size).permute(3, 4, 5, 0, 1, 2)


def _added_up(taps, axis, stride, padding):
    """What the taps come to along one axis of the high side, in place.

    Args:
        taps: (channels, taps along one axis, along the other, N, height of the low side, its width).
    Returns:
        The same with only the taps that stay where they are: those to the `stride` positions of the high side that
        lie at each one of the low side. The others were moved there and added.
    """
    size, high = taps.shape[4 + axis], taps.narrow(1 + axis, padding, stride)
    for tap in range(taps.shape[1 + axis]):
        shift, phase = divmod(tap - padding, stride)
        length = size - abs(shift)
        if shift != 0 and length > 0:
            moved = taps.select(1 + axis, tap).narrow(3 + axis, max(-shift, 0), length)
            high.select(1 + axis, phase).narrow(3 + axis, max(shift, 0), length).add_(moved)
    return high


def to_low(high, weight, stride, padding, layouts):
    """conv2d. The result is channels_last if one of `layouts` is."""
    patches, rows = _patches(high, weight, stride, padding), _rows(weight, weight)
    n, *size = patches.shape[:3]
    low = _result(high, weight, len(weight), size, layouts)
    parts = _parts(n, patches[0].numel())
    for low_part, part in zip(low.chunk(parts), patches.chunk(parts), strict=True):
        # The weight first: of up to 48 positions the other way round takes MKL up to three times as long.
        product = torch.mm(rows, part.reshape(-1, rows.shape[1]).t())
        low_part.copy_(product.view(-1, len(part), *size).transpose(0, 1))
    return low


def _by_position(low):
    """(N × its height × its width, low channels)."""
    return low.permute(0, 2, 3, 1).reshape(-1, low.shape[1])


def _rows(tensor, weight):
    """(len(tensor), all else), flattened in the memory order of `weight`; of the weight itself it is a view."""
    return (tensor.permute(0, 2, 3, 1) if suggests_channels_last(weight) else tensor).reshape(len(tensor), -1)


def _of_rows(rows, weight):
    """`_rows` undone: of rows as long as the weight's, (their number, high channels, kh, kw)."""
    channels, *kernel_size = weight.shape[1:]
    if suggests_channels_last(weight):
        return rows.view(-1, *kernel_size, channels).permute(0, 3, 1, 2)
    return rows.view(-1, channels, *kernel_size)


def _patches(high, weight, stride, padding):
    """(N, height of the low side, its width, *a row of the weight): what each position there is computed from."""
    high = F.pad(high, (padding[1], padding[1], padding[0], padding[0]))
    patches = high.unfold(2, weight.shape[2], stride[0]).unfold(3, weight.shape[3], stride[1])
    # From (N, high channels, height, width, kh, kw).
    return patches.permute((0, 2, 3, 4, 5, 1) if suggests_channels_last(weight) else (0, 2, 3, 1, 4, 5))


def weight_grad_of_all_taps(low, high, weight, stride, padding):
    """The weight gradient as one product over all positions of the low side."""
    patches = _patches(high, weight, stride, padding).reshape(-1, weight[0].numel())
    return _of_rows(torch.mm(_by_position(low).t(), patches), weight)


def weight_grad_tap_by_tap(low, high, weight, stride, padding):
    """The weight gradient by one product for each tap of the kernel, for a channels_last weight.

    Each takes only the positions whose tap lies inside the image: of a 4×4 low side (kernel 4, stride 2, padding 1)
    9 to 16 of the 16.
    """
    low_channels, high_channels, *kernel_size = weight.shape
    dweight = low.new_empty(low_channels, *kernel_size, high_channels)
    low, high = low.permute(2, 3, 0, 1), high.permute(2, 3, 0, 1)  # (height, width, N, channels)
    rows, columns = (
        [_meeting(tap, low.shape[axis], high.shape[axis], stride[axis], padding[axis]) for tap in range(taps)]
        for axis, taps in enumerate(kernel_size)
    )
    for i, (low_rows, high_rows) in enumerate(rows):
        for j, (low_columns, high_columns) in enumerate(columns):
            a = low[low_rows, low_columns].reshape(-1, low_channels)
            b = high[high_rows, high_columns].reshape(-1, high_channels)
            torch.mm(a.t(), b, out=dweight[:, i, j])
    return dweight.permute(0, 3, 1, 2)


def _meeting(tap, low, high, stride, padding):
    """(slice of low, slice of high) along one axis: the positions that meet at a tap of the kernel, pair by pair."""
    offset = tap - padding
    first = max(0, -(offset // stride))
    last = max(first - 1, min(low - 1, (high - 1 - offset) // stride))  # first - 1: none meet
    return slice(first, last + 1), slice(first * stride + offset, max(0, last * stride + offset + 1), stride)
