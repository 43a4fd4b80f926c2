"""In which order of memory a tensor (N, C, H, W) lies: the default one, or channels_last."""

import torch


def suggests_channels_last(tensor):
    """Whether ATen takes a 4-dimensional tensor for a channels_last one; where sizes of one make it both, for neither.

    Source: `is_channels_last_strides_2d` in PyTorch's c10/core/MemoryFormat.h.
    """
    if tensor.dim() != 4:
        return False
    sizes, strides = tensor.shape, tensor.stride()
    if strides[1] == 0:
        return False
    least = 0
    for axis in (1, 3, 2, 0):
        if sizes[axis] == 0 or strides[axis] < least or (axis == 0 and least == strides[1]):
            return False
        least = strides[axis] * max(sizes[axis], 1)
    return True


def default_layout(y):
    """y in the default (NCHW) layout, with strides that ATen does not take for channels_last: itself, or a copy.

    ``y.contiguous()`` gives a tensor of one channel, or of one position, as it is: with channels_last strides it would
    make the next stock layer's result channels_last.
    """
    y = y.contiguous()
    return y.clone(memory_format=torch.contiguous_format) if suggests_channels_last(y) else y


def fastest_format(images):
    """The memory format that layers are fastest in: channels_last of images (N, C, H, W), else the default one."""
    return torch.channels_last if images.dim() == 4 else torch.contiguous_format
