"""What the operators say of bad input: one message with the argument's name, what came and what is allowed."""

import torch

from fastgan.ops.geometry import out_size

ACTIVATIONS = ("relu", "leaky_relu", "tanh", "sigmoid", None)


def check_integer(name, value, least, most=None):
    """Raise ValueError unless ``value`` is an integer of at least ``least``, 0 or 1, and at most ``most``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        allowed = (
            f"an integer from {least} to {most}" if most else ("a non-negative integer", "a positive integer")[least]
        )
        raise ValueError(f"{name} must be {allowed}; got {value!r}")


def is_out_of_memory(error):
    """Whether an exception says that the machine's memory, or the GPU's, does not suffice."""
    said = ("out of memory", "can't allocate memory", "not enough memory")  # GPUs; CPUs; CPUs with Windows
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in said)
    )


def in_short(error):
    """An exception in a part of a line: its type and the first sentence of what it says."""
    return f"{type(error).__name__}: {error}".partition("\n")[0].partition(". ")[0]


def pair(name, value):
    """An int or a pair of ints as a pair."""
    values = value if isinstance(value, list | tuple) else [value, value]
    if len(values) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise ValueError(f"{name} must be an int or a pair of ints; got {value!r}")
    least = 1 if name == "stride" else 0
    if min(values) < least:
        raise ValueError(f"{name} must be at least {least}; got {value!r}")
    return tuple(values)


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
    """Raise ValueError or TypeError for what the operators of a `fastgan.ops.constants.Layer` cannot take."""
    _check_tensors(x=x, weight=weight)
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions; got shape {tuple(tensor.shape)}")
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
    for name, vector in vectors.items():
        if vector is not None:
            _check_tensors(**{name: vector})
            if vector.shape != (out_channels,):
                raise ValueError(f"{name} must have shape ({out_channels},); got {tuple(vector.shape)}")
    for name, tensor in dict(weight=weight, **vectors).items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}; got {tensor.device}")

    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given both or neither")
    if layer.batch_norm and not layer.batch_statistics and running_mean is None:
        raise ValueError("running_mean and running_var are needed when training is False; got None")
    _check_numbers(layer)
    if not isinstance(layer.groups, int) or layer.groups < 1 or x.shape[0] % layer.groups:
        raise ValueError(f"batch_groups must divide the batch of {x.shape[0]} images; got {layer.groups!r}")
    shared = layer.process_group is not None
    if shared and x.numel() == 0:
        raise ValueError(f"x must not be empty where processes share their statistics; got shape {tuple(x.shape)}")
    height, width = _check_sizes(x, weight, layer)
    images = x.shape[0] // layer.groups
    if layer.batch_norm and layer.batch_statistics and not shared and images * height * width == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got output size "
            f"{(images, out_channels, height, width)}: BatchNorm has no variance of one value"
        )


def _check_numbers(layer):
    """Look at the constants that are no sizes."""
    activation, momentum = layer.activation, layer.momentum
    # Not by getattr: what torch.compile has made of a number is none, and has no attributes.
    if not isinstance(momentum, int | float) and not (isinstance(momentum, torch.Tensor) and momentum.ndim == 0):
        raise TypeError(f"momentum must be a number or a 0-dim tensor; got {momentum!r}")
    if not isinstance(layer.eps, int | float):
        raise TypeError(f"eps must be a number; got {layer.eps!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}; got {activation!r}")
    if activation == "leaky_relu" and not layer.slope >= 0:
        raise ValueError(f"negative_slope must be at least 0; got {layer.slope!r}")
    if layer.activation_first and (activation is None or not layer.batch_norm):
        got = f"activation={activation!r} and {'a' if layer.batch_norm else 'no'} BatchNorm"
        raise ValueError(f"activation_first=True needs an activation and a BatchNorm after it; got {got}")


def _check_sizes(x, weight, layer):
    """The (h, w) of the layer's output."""
    transposed, stride, padding, output_padding = layer.where()
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


def check_loss(**arguments):
    """Raise for logits that are not floating point, empty or on different devices, and targets outside [0, 1]."""
    tensors = {name: value for name, value in arguments.items() if name.endswith("logits")}
    _check_tensors(**tensors)
    for name, logits in tensors.items():
        if logits.numel() == 0:
            raise ValueError(f"{name} must not be empty; got shape {tuple(logits.shape)}")
    if len({logits.device for logits in tensors.values()}) > 1:
        raise ValueError(f"logits must be on one device; got {', '.join(str(t.device) for t in tensors.values())}")
    for name in arguments.keys() - tensors.keys():
        if not 0.0 <= arguments[name] <= 1.0:
            raise ValueError(f"{name} must be between 0 and 1; got {arguments[name]!r}")


def check_loss_of_parts(logits, targets):
    """`check_loss` of logits that consist of one part or two equal ones, each with its target."""
    if not isinstance(targets, list | tuple) or len(targets) not in (1, 2):
        raise ValueError(f"targets must be one or two numbers in a tuple; got {targets!r}")
    fits = isinstance(logits, torch.Tensor) and logits.is_floating_point() and logits.numel() > 0
    if not (fits and all([0.0 <= target <= 1.0 for target in targets])):  # asked at each step, so not by their names
        check_loss(logits=logits, **{f"targets[{i}]": target for i, target in enumerate(targets)})
    if len(targets) == 2 and (logits.dim() == 0 or len(logits) % 2):
        raise ValueError(f"logits must have two equal parts for two targets; got shape {tuple(logits.shape)}")


def _check_tensors(**named):
    for name, value in named.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating point; got {value.dtype}")
