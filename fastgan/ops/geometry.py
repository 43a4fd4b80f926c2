"""Sizes of convolutions and transposed convolutions (dilation 1)."""


def padding_in_numbers(padding, kernel, stride):
    """The text "same" or "valid" as a pair of numbers; anything else, and "same" where there is no such pair, as it is.

    "same" pads an even kernel more on one side, and PyTorch refuses it with a stride.
    """
    if padding == "valid":
        return (0, 0)
    if padding == "same" and all([k % 2 == 1 and s == 1 for k, s in zip(kernel, stride, strict=True)]):
        return tuple([k // 2 for k in kernel])
    return padding


def conv_size(size, kernel, stride, padding):
    """Output (h, w) of a convolution of an input of (h, w)."""
    return [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding, strict=True)]


def conv_transpose_size(size, kernel, stride, padding, output_padding):
    """Output (h, w) of a transposed convolution of an input of (h, w)."""
    return [
        (n - 1) * s - 2 * p + k + extra
        for n, k, s, p, extra in zip(size, kernel, stride, padding, output_padding, strict=True)
    ]


def output_padding_for(out_size, size, kernel, transposed, stride, padding):
    """The output_padding with which a transposed convolution makes `out_size` of (h, w); zeros for an ordinary one."""
    if not transposed:
        return [0, 0]
    sizes = conv_transpose_size(size, kernel, stride, padding, (0, 0))
    return [wanted - n for wanted, n in zip(out_size, sizes, strict=True)]


def backward_conv_args(size, kernel, transposed, stride, padding):
    """The `LayerSpec.conv_args` of the convolution that takes a gradient back to an input of this (h, w)."""
    other_way = (not transposed, stride, padding)
    return *other_way, output_padding_for(size, conv_size(size, kernel, stride, padding), kernel, *other_way)


def size_after(size, kernel, transposed, stride, padding, output_padding):
    """Output (h, w) of either of them for an input of (h, w)."""
    if transposed:
        return conv_transpose_size(size, kernel, stride, padding, output_padding)
    return conv_size(size, kernel, stride, padding)


def out_size(x, weight, *conv_args):
    """The (h, w) of conv(x, weight); `conv_args` are (transposed, stride, padding, output_padding)."""
    return size_after(x.shape[2:], weight.shape[2:], *conv_args)
