"""What is tuned: the convolutions of a model or of a named shape, as Problems, and one run of each."""

import copy
import importlib
import re

import torch
from torch import nn

from fastgan.fusing.patterns import padding_of
from fastgan.fusion import fuse, fused_groups
from fastgan.models import IMAGE_SIZES, Discriminator, Generator
from fastgan.ops import implementations
from fastgan.ops.choice import conv_problem, weight_grad_problem
from fastgan.ops.geometry import conv_size, conv_transpose_size, output_padding_for

LATENT = 100
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "tf32": torch.float32}
_SHAPE = re.compile(
    r"(?P<type>convt|conv):(?P<cin>\d+)-(?P<cout>\d+):k(?P<k>\d+)s(?P<s>\d+)p(?P<p>\d+)(?:o(?P<o>\d+))?"
    r":(?P<h>\d+)x(?P<w>\d+)(?P<then>\+bn|\+act)?"
)
SHAPE_HELP = "conv:3-64:k4s2p1:64x64+act (input and output channels, kernel, stride, padding, input size; +bn or +act)"


def problems_of(names, batches, dtypes, input_shape=None):
    """The Problems of everything named on the command line, each once, those of one layer next to each other.

    Args:
        names: "dcgan64" and the like, "module:callable" (called without arguments, it gives a model), or shapes as in
            SHAPE_HELP.
        batches, dtypes: which to measure; a discriminator of ours also at twice each batch, because a training step
            can run it on real and fake images together.
        input_shape: (C, H, W) of one input of the models named as "module:callable".

    Raises:
        ValueError: a name that means nothing, or a model that cannot be run.
    """
    problems = []
    for name in names:
        for dtype in dtypes:
            problems += _problems_of(name, batches, dtype, input_shape)
    return sorted(dict.fromkeys(problems), key=lambda p: (p.dtype, p.shape, p.operation, p.kind, p.batch))


def _problems_of(name, batches, dtype, input_shape):
    dcgan = re.fullmatch(r"dcgan(\d+)", name)
    if dcgan:
        return _problems_of_dcgan(int(dcgan[1]), batches, dtype)
    shape = _SHAPE.fullmatch(name)
    if shape:
        return [p for batch in batches for p in _problems_of_shape(shape, batch, dtype)]
    if ":" not in name or name.startswith(("conv:", "convt:")):
        raise ValueError(f"{name!r} is none of: dcgan64, package.module:callable, {SHAPE_HELP}")
    if input_shape is None:
        raise ValueError(f"{name}: --input C,H,W must say what the model is called with")
    return problems_of_model(_import_model(name), [(batch, *input_shape) for batch in batches], dtype)


def _problems_of_dcgan(size, batches, dtype):
    """G's and D's, as `scripts/train.py` builds them for images of this size."""
    if size not in IMAGE_SIZES:
        raise ValueError(f"dcgan{size}: image sizes are {', '.join(map(str, IMAGE_SIZES))}")
    width, channels = (64, 3) if size >= 64 else (32, 1)
    with torch.device("meta"):
        generator = Generator(image_size=size, nc=channels, nz=LATENT, ngf=width)
        discriminator = Discriminator(image_size=size, nc=channels, ndf=width)
    latents = [(batch, LATENT, 1, 1) for batch in batches]
    images = [(batch, channels, size, size) for batch in sorted({*batches, *(2 * batch for batch in batches)})]
    # Nobody wants the gradient of latent vectors; that of images is the generator's.
    return [
        *problems_of_model(generator, latents, dtype, input_grad=False),
        *problems_of_model(discriminator, images, dtype),
    ]


def _import_model(name):
    module, _, attribute = name.partition(":")
    try:
        model = getattr(importlib.import_module(module), attribute)()
    except Exception as error:
        raise ValueError(f"{name}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name}: gives a {type(model).__name__}, not an nn.Module")
    return model


def problems_of_model(model, shapes, dtype, *, input_grad=True):
    """The Problems of every fused convolution of `model`, forward and backward, for inputs of each of `shapes`.

    Args:
        model: an nn.Module; a copy without data runs, in the mode in which it is.
        input_grad: whether the model's input needs a gradient.
    """
    try:
        model = fuse(copy.deepcopy(model).to("meta", dtype))
        calls = []
        for group in fused_groups(model).values():
            group.modules[0].register_forward_hook(_recorder(calls, group), with_kwargs=True)
        given = [torch.empty(shape, device="meta", dtype=dtype) for shape in shapes]
        for x in given:
            with torch.no_grad():
                model(x)
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be followed: {type(error).__name__}: {error}") from error
    problems, before = [], None
    for group, x, y in calls:
        conv = group.modules[0]
        weight_and_geometry = (conv.weight, isinstance(conv, nn.ConvTranspose2d), conv.stride, padding_of(conv))
        is_given = any(x is each or x._base is each for each in given)
        wanted = [""] if input_grad or not is_given else []
        if before is not None and before[2].shape == x.shape:
            # As a training step runs it.
            if before[0].ends_in_activation:
                wanted.append("activated")
            elif before[0].then == "statistics":
                wanted.append("normalized")
        problems += _problems_of_conv(x, y, *weight_and_geometry, then=group.then, input_grads=wanted)
        before = group, x, y
    return problems


def _recorder(calls, group):
    def hook(conv, args, kwargs, output):
        calls.append((group, args[0] if args else kwargs["input"], output))

    return hook


def _problems_of_shape(match, batch, dtype):
    cin, cout, k, s, p, o, h, w = (int(match[name] or 0) for name in ("cin", "cout", "k", "s", "p", "o", "h", "w"))
    if min(cin, cout, k, s, h, w) < 1:
        raise ValueError(f"{match[0]!r}: channels, kernel, stride and size must be at least 1")
    if o > 0 and (match["type"] == "conv" or o >= s):
        raise ValueError(f"{match[0]!r}: the output padding o is of convt, and must be less than the stride")
    transposed, sizes = match["type"] == "convt", ((k, k), (s, s), (p, p))
    size = conv_transpose_size((h, w), *sizes, (o, o)) if transposed else conv_size((h, w), *sizes)
    if min(size) < 1:
        raise ValueError(f"{match[0]!r}: the output would have no pixels")
    x = torch.empty((batch, cin, h, w), dtype=dtype, device="meta")
    y = torch.empty((batch, cout, *size), dtype=dtype, device="meta")
    weight = torch.empty((cin, cout, k, k) if transposed else (cout, cin, k, k), dtype=dtype, device="meta")
    then = {"+bn": "statistics", "+act": "epilogue", None: ""}[match["then"]]
    return _problems_of_conv(x, y, weight, transposed, *sizes[1:], then=then, input_grads=[""])


def _problems_of_conv(x, y, weight, transposed, stride, padding, *, then, input_grads):
    """Forward, weight gradient and, for each that `input_grads` names what follows it of, input gradient."""
    low, high = (x, y) if transposed else (y, x)
    problems = [
        conv_problem(x, weight, transposed, stride, padding, y.shape[2:], then=then),
        weight_grad_problem(low, high, weight.float(), stride, padding),  # as mixed precision keeps its weights
    ]
    backward = (y, weight, not transposed, stride, padding, x.shape[2:])
    return problems + [conv_problem(*backward, then=then) for then in input_grads]


def operands(problem, device, *, seed=0):
    """Random operands of a Problem: (x, weight) of a convolution; with the `activated` that its gradient goes back
    through, if any, or the (y, mean, invstd, gamma, beta) of BatchNorm; (low, high, weight) of a weight gradient.

    Means are away from zero, so that a wrong mean shows.
    """
    dtype = DTYPES[problem.dtype]
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(*shape, scale=1.0, shift=0.0):
        if generator is None:
            tensor = torch.empty(shape, device=device)
        else:
            tensor = torch.randn(shape, device=device, generator=generator)
        return (tensor * scale + shift).to(dtype).contiguous(memory_format=torch.channels_last)

    def end(channels, size):
        return normal(problem.batch, channels, *size, shift=0.3)

    depth = problem.a if problem.operation == "up" else problem.b
    taps = problem.kernel[0] * problem.kernel[1]
    weight = normal(problem.a, problem.b, *problem.kernel, scale=(depth * taps) ** -0.5)
    if problem.then == "float32":
        weight = weight.float()
    if problem.operation == "weight_grad":
        return end(problem.a, problem.low), end(problem.b, problem.high), weight
    low, high = (problem.a, problem.low), (problem.b, problem.high)
    x, result = (low, high) if problem.operation == "up" else (high, low)
    more = ()
    if problem.then == "activated":
        more = (torch.nn.functional.leaky_relu(end(*result), 0.2),)
    elif problem.then == "normalized":
        ones = torch.ones(1, result[0], device=device)
        more = (end(*result), 0.3 * ones, ones, *ones, 0.1 * ones[0])
    return end(*x), weight, *more


def run(problem, choice, tensors):
    """Compute a Problem by `choice`: the tuple of results, with statistics where they are wanted."""
    options = dict(stride=problem.stride, padding=problem.padding)
    if problem.operation == "weight_grad":
        return (implementations.run_weight_grad(choice, *tensors, **options),)
    transposed = problem.operation == "up"
    options.update(transposed=transposed)
    size = problem.high if transposed else problem.low
    if problem.then == "statistics":
        return implementations.run_conv_statistics(choice, *tensors, size, **options, eps=1e-5)
    x, weight, *before = tensors
    options.update(activation=_activation(problem), slope=0.2)
    if problem.then == "normalized":
        return implementations.run_conv_batch_norm_grad(choice, x, weight, size, before, **options)
    return (implementations.run_conv(choice, x, weight, size, **options, activated=before[0] if before else None),)


def _activation(problem):
    """A DCGAN's own: tanh ends its generator, leaky ReLU its discriminator's layers, whose gradients come back."""
    if problem.then == "epilogue":
        return "tanh" if problem.operation == "up" else "leaky_relu"
    return "leaky_relu" if problem.then in ("activated", "normalized") else None


def reference(problem, tensors):
    """The same results in float32 by plain torch."""
    tensors = [tensor.float() for tensor in tensors]
    stride_padding = (problem.stride, problem.padding)
    if problem.operation == "weight_grad":
        low, high, weight = tensors
        options = (None, *stride_padding, (1, 1), False, (0, 0), 1, (False, True, False))
        return (torch.ops.aten.convolution_backward(low, high, weight, *options)[1],)
    x, weight, *before = tensors
    transposed = problem.operation == "up"
    extra = output_padding_for(problem.high, problem.low, problem.kernel, transposed, *stride_padding)
    y = torch.ops.aten.convolution(x, weight, None, *stride_padding, (1, 1), transposed, extra, 1)
    if problem.then == "statistics":
        var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
        count = y.numel() // y.shape[1]
        return y, mean[None], (var + 1e-5).rsqrt()[None], (var * (count / max(count - 1, 1)))[None]
    activation = _activation(problem)
    if problem.then == "normalized":
        own, mean, _, _, beta = before  # γ and 1/std are one
        x_hat = own - mean[0, :, None, None]
        dz = y * torch.where(x_hat + beta[:, None, None] > 0, 1.0, 0.2)
        return dz, torch.stack([dz.sum((0, 2, 3)), (dz * x_hat).sum((0, 2, 3))])[None]
    if problem.then == "activated":
        y = y * torch.where(before[0] > 0, 1.0, 0.2)
    elif activation == "tanh":
        y = y.tanh_()
    elif activation == "leaky_relu":
        y = torch.nn.functional.leaky_relu_(y, 0.2)
    return (y,)
