"""What the operators say of bad input, before any work starts."""

import torch

from fastgan.checks import check_tensor, is_integer
from fastgan.ops.geometry import out_size

ACTIVATIONS = ("relu", "leaky_relu", "tanh", "sigmoid", None)


def check_conv_bn_act(
    x,
    weight,
    bias,
    gamma,
    beta,
    running_mean,
    running_var,
    layer,
):
    """Raise ValueError or TypeError for what the operators of a `fastgan.ops.layer_spec.LayerSpec` cannot take."""
    for name, tensor in (("x", x), ("weight", weight)):
        check_tensor(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions; got shape {tuple(tensor.shape)}")
    if 0 in weight.shape:
        raise ValueError(f"weight must not be empty; got shape {tuple(weight.shape)}")
    in_axis, out_axis = (0, 1) if layer.transposed else (1, 0)
    in_channels, out_channels = weight.shape[in_axis], weight.shape[out_axis]
    if x.shape[1] != in_channels:
        raise ValueError(
            f"x must have {in_channels} channels, as weight {tuple(weight.shape)} has on axis {in_axis}; "
            f"got shape {tuple(x.shape)}"
        )
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x and weight must have one dtype; got {x.dtype} and {weight.dtype}")
    vectors = dict(bias=bias, gamma=gamma, beta=beta, running_mean=running_mean, running_var=running_var)
    _check_vectors(x, out_channels, vectors)
    for name, tensor in dict(weight=weight, **vectors).items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}; got {tensor.device}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given both or neither")
    for name in ("running_mean", "running_var"):
        if vectors[name] is not None and vectors[name].requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient: it has none")
    if layer.batch_norm and not layer.batch_statistics and running_mean is None:
        raise ValueError("running_mean and running_var are needed when training is False; got None")
    _check_numbers(layer)
    _check_batch(x, layer, (out_channels, *_check_sizes(x, weight, layer)))


def _check_vectors(x, out_channels, vectors):
    """Look at those of {name: vector or None} that there are."""
    for name, vector in vectors.items():
        if vector is not None:
            check_tensor(name, vector)
            if vector.shape != (out_channels,):
                raise ValueError(f"{name} must have shape ({out_channels},); got {tuple(vector.shape)}")
            if vector.dtype != x.dtype:
                _check_other_dtype(name, vector, x)


def _check_other_dtype(name, vector, x):
    """Beside half precision vectors may be in float32, and under autocast all of them are cast."""
    is_half = x.dtype in (torch.float16, torch.bfloat16)
    if not (is_half and vector.dtype == torch.float32) and not torch.is_autocast_enabled(x.device.type):
        allowed = f"{x.dtype}, that of x{', or torch.float32' if is_half else ''}"
        raise TypeError(f"{name} must be in {allowed}; got {vector.dtype}")


def _check_numbers(layer):
    """Look at the constants that are no sizes."""
    activation, momentum = layer.activation, layer.momentum
    # Not by getattr: what torch.compile has made of a number is none, and has no attributes.
    if not isinstance(momentum, int | float) and not (isinstance(momentum, torch.Tensor) and momentum.ndim == 0):
        raise TypeError(f"momentum must be a number or a 0-dim tensor; got {momentum!r}")
    if not isinstance(layer.batch_statistics, bool):
        raise TypeError(f"training must be True or False; got {layer.batch_statistics!r}")
    if not isinstance(layer.eps, int | float):
        raise TypeError(f"eps must be a number; got {layer.eps!r}")
    if not layer.eps >= 0:
        raise ValueError(f"eps must be at least 0; got {layer.eps!r}")
    if layer.batch_norm and layer.batch_statistics and layer.eps == 0:
        raise ValueError(f"eps must be positive in training; got {layer.eps!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}; got {activation!r}")
    if not isinstance(layer.slope, int | float):
        raise TypeError(f"negative_slope must be a number; got {layer.slope!r}")
    if activation == "leaky_relu" and not layer.slope >= 0:
        raise ValueError(f"negative_slope must be at least 0; got {layer.slope!r}")
    if layer.activation_first and (activation is None or not layer.batch_norm):
        got = f"activation={activation!r} and {'a' if layer.batch_norm else 'no'} BatchNorm"
        raise ValueError(f"activation_first=True needs an activation and a BatchNorm after it; got {got}")


def _check_batch(x, layer, result):
    """Look at the number of images; result: (C, h, w) of what the layer makes of one."""
    images, groups = x.shape[0], layer.batch_groups
    if not is_integer(groups) or groups < 1 or images % groups:
        raise ValueError(f"batch_groups must divide the batch of {images} images; got {groups!r}")
    shared = layer.process_group is not None
    if shared and x.numel() == 0:
        raise ValueError(f"x must not be empty where processes share their statistics; got shape {tuple(x.shape)}")
    _, height, width = result
    if layer.batch_norm and layer.batch_statistics and not shared and images // groups * height * width == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got output size {(images // groups, *result)}: "
            "BatchNorm has no variance of one value"
        )


def _check_sizes(x, weight, layer):
    """The (h, w) of the layer's output."""
    transposed, stride, padding, output_padding = layer.conv_args()
    for extra, step in zip(output_padding, stride, strict=True):
        if extra and extra >= step:
            raise ValueError(f"output_padding must be less than stride {tuple(stride)}; got {tuple(output_padding)}")
    height, width = out_size(x, weight, transposed, stride, padding, output_padding)
    if height < 1 or width < 1:
        raise ValueError(
            f"x of {x.shape[2]}×{x.shape[3]} is too small for kernel {tuple(weight.shape[2:])}, stride "
            f"{tuple(stride)} and padding {tuple(padding)}: the output would be {height}×{width}"
        )
    return height, width
