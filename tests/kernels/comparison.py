"""The fused convolutions beside stock layers: inputs for a case, both ways to its results, and how they compare."""

import torch
from torch.nn import functional as F

from fastgan import functional as fused
from tests.accuracy import assert_as_accurate_as_stock
from tests.kernels.cases import Case

PLAIN = Case(
    transposed=True,
    kernel=4,
    stride=2,
    padding=1,
    output_padding=0,
    in_channels=18,
    out_channels=17,
    size=(5, 7),
    activation="leaky_relu",
    activation_first=False,
    batch_norm=True,
    bias=False,
    training=True,
    memory="channels_last",
    dtype="float32",
)
_NAMES = ("x", "weight", "bias", "gamma", "beta", "running_mean", "running_var")
_SLOPE = 0.2


def draw(case, batch, device, seed=0):
    """Fresh random (x, weight, bias, gamma, beta, running_mean, running_var) in the case's dtype and layout."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    channels = (case.in_channels, case.out_channels) if case.transposed else (case.out_channels, case.in_channels)
    x = normal(batch, case.in_channels, *case.size)
    weight = normal(*channels, case.kernel, case.kernel) / (case.in_channels * case.kernel**2) ** 0.5
    vectors = [normal(case.out_channels) for _ in range(4)]
    vectors[3] = vectors[3].abs() + 0.5
    dtype = getattr(torch, case.dtype)
    x, weight, bias = (tensor.to(device, dtype) for tensor in (x, weight, normal(case.out_channels)))
    if case.memory == "channels_last":
        x, weight = (tensor.to(memory_format=torch.channels_last) for tensor in (x, weight))
    elif case.memory == "sliced":
        x, weight = (torch.stack([tensor, -tensor], dim=-1)[..., 0] for tensor in (x, weight))
    vectors = [tensor.to(device) for tensor in vectors] if case.batch_norm else [None] * 4
    return [x, weight, bias if case.bias else None, *vectors]


def stock(case, tensors, activation):
    """The stock layers one after the other."""
    if case.activation_first:
        return stock_batch_norm(case, activate(stock_convolution(case, tensors), activation), tensors)
    return activate(stock_batch_norm(case, stock_convolution(case, tensors), tensors), activation)


def stock_convolution(case, tensors):
    x, weight, bias, *_ = tensors
    if case.transposed:
        return F.conv_transpose2d(x, weight, bias, case.stride, case.padding, case.output_padding)
    return F.conv2d(x, weight, bias, case.stride, case.padding)


def stock_batch_norm(case, y, tensors):
    *_, gamma, beta, running_mean, running_var = tensors
    return F.batch_norm(y, running_mean, running_var, gamma, beta, case.training, 0.3, 1e-3) if case.batch_norm else y


def activate(z, activation):
    if activation == "leaky_relu":
        return F.leaky_relu(z, _SLOPE)
    return getattr(torch, activation)(z) if activation else z


def ours(case, tensors, activation):
    operator = fused.conv_transpose2d_bn_act if case.transposed else fused.conv2d_bn_act
    options = dict(output_padding=case.output_padding) if case.transposed else {}
    return operator(
        *tensors,
        training=case.training,
        momentum=0.3,
        eps=1e-3,
        stride=case.stride,
        padding=case.padding,
        activation=activation,
        negative_slope=_SLOPE,
        activation_first=case.activation_first,
        **options,
    )


def results(forward, case, tensors, grad, dtype=None):
    """{name: tensor} of the output, every gradient and the running statistics."""
    copies = [None if t is None else t.detach().clone().to(dtype or t.dtype) for t in tensors]
    for tensor in copies[:5]:
        if tensor is not None:
            tensor.requires_grad_()
    out = forward(case, copies, case.activation)
    out.backward(grad.to(out.dtype))
    found = dict(out=out.detach(), **dict(zip(_NAMES[5:], copies[5:], strict=True)))
    found.update({f"grad of {name}": t.grad for name, t in zip(_NAMES, copies[:5], strict=False) if t is not None})
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def gradient_away_from_kinks(case, exact):
    """A random gradient for the output, of which nothing reaches an activation near its kink.

    There the derivative of a rounded value is either side's. `exact` are the tensors in float64.
    """
    with torch.no_grad():
        z = stock_convolution(case, exact)
        if not case.activation_first:
            z = stock_batch_norm(case, z, exact)
    grad = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z)
    near = z.abs() < (1e-3 if case.dtype == "float32" else 0.05)
    if not (case.activation_first and case.training):
        return torch.where(near, 0.0, grad)
    # BatchNorm takes the gradient's mean, and its part along x̂, off it: what is nothing else gives no gradient.
    x_hat = F.batch_norm(activate(z, case.activation), None, None, training=True, eps=1e-3)
    for _ in range(50):
        mean, along = grad.mean((0, 2, 3), keepdim=True), (grad * x_hat).mean((0, 2, 3), keepdim=True)
        grad = torch.where(near, mean + x_hat * along, grad)
    return grad


def check(case, tensors):
    """Compare all results with float64's, allowing what stock in the case's own precision is allowed."""
    exact = [None if t is None else t.double().clone() for t in tensors]
    grad = gradient_away_from_kinks(case, exact).to(getattr(torch, case.dtype))
    reference = results(stock, case, tensors, grad.double(), torch.float64)
    plain = results(stock, case, tensors, grad)
    actual = results(ours, case, tensors, grad)
    assert actual.keys() == reference.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == plain[name].dtype
        assert_as_accurate_as_stock(name, tensor, plain[name], reference[name], getattr(torch, case.dtype))


def leaves(tensors, dtype=None):
    """Copies of (x, weight, bias, gamma, beta, running statistics): all but the last two learn."""
    copies = [None if t is None else t.detach().clone().to(dtype or t.dtype) for t in tensors]
    return [t if t is None or i > 4 else t.requires_grad_() for i, t in enumerate(copies)]


def gradient_of_norms(out, x):
    """The norm of each image's gradient of a weighted sum of `out`."""
    weights = torch.cos(torch.arange(out.numel(), device=out.device)).view_as(out).to(out.dtype)
    (grad,) = torch.autograd.grad((out * weights).sum(), x, create_graph=True)
    return grad, grad.flatten(1).norm(2, dim=1)
