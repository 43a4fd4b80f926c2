"""Forwards over the same layers: those that `fuse` can follow, and those that it refuses."""

import contextlib
import random
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Layers(nn.Module):
    """Layers for the forwards below, in an order of their own."""

    def __init__(self):
        super().__init__()
        self.act = nn.LeakyReLU(0.2)
        self.bn2 = nn.BatchNorm2d(3)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 3, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 3, 4, 2, 1)
        self.slope, self.depth, self.skips = 0.3, 2, []
        self.options = Namespace(slopes=[0.1, 0.2])
        self.options.first, self.options.second = SimpleNamespace(wide=True), SimpleNamespace(wide=False)


class Counting(nn.Module):
    """Counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x


def forward_of(function):
    """A module class with `function` as its forward."""
    parts = {"forward": function, "block": _block, "asks": _asks}
    return type(function.__name__, (Layers,), parts)


def functions(self, x):
    x = F.leaky_relu(self.bn1(self.conv1(x)), 0.1, inplace=True)
    return torch.tanh(self.bn2(self.conv2(x)).relu())


def methods(self, x):
    return self.conv2(self.bn1(self.conv1(x)).relu_()).sigmoid()


def residual(self, x):
    y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
    y += x
    return F.relu(y)


def residual_of_an_activation(self, x):
    y = self.act(self.conv2(self.act(self.conv1(x))))
    y += x
    return y


def told_by_position(self, x):
    y = F.relu(self.conv2(F.leaky_relu(self.conv1(x), 0.2)), True)
    return F.elu(F.leaky_relu(self.up(self.conv1(y)), 0.2), 1.0, True)


def skip(self, x):
    low = self.bn1(self.conv1(x))
    return torch.cat([self.up(self.act(low)), F.interpolate(low, scale_factor=2)], 1)


def used_twice(self, x):
    y = self.conv1(x)
    return self.conv2(self.bn1(y)) + y[:, :3].mean()


def normalised_used_twice(self, x):
    y = self.bn1(self.conv1(x))
    return self.conv2(F.relu(y)) - y.sum(1, keepdim=True)


def branches(self, x):
    left, right = self.conv1(x), self.conv1(x.flip(3))
    right, left = self.bn1(right), self.bn1(left)
    return self.conv2(F.relu(left) * torch.sigmoid(right))


def input_changed_in_between(self, x):
    x = x * 2
    y = self.conv1(x)
    x.relu_()
    return self.conv2(self.act(self.bn1(y))) + x


def shared_layers(self, x):
    for _ in range(self.depth):
        x = self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))
    return x


def dropout(self, x):
    x = F.dropout(self.act(self.bn1(self.conv1(x))), 0.0, self.training)
    return self.conv2(x) if self.training else torch.tanh(self.conv2(x))


def asks_for_a_flag(self, x):
    x = self.conv1(x)
    return self.conv2(self.act(x) if self.training is not False else torch.tanh(x))


def by_attribute(self, x):
    return self.conv2(F.leaky_relu(self.bn1(self.conv1(x)), self.slope))


def by_name(self, x):
    y = self.__getattr__("conv" + str(1))(x)
    return self.__getattr__("conv2")(F.relu(self.__getattr__("bn1")(y))) * self.__getattr__("bn1").weight.mean()


def by_shape(self, x):
    n, _, h, w = x.shape
    h += 0
    return self.conv2(F.relu(self.conv1(x))).view(n, 3, h * w).mean(2)


def method_of_its_own(self, x):
    return self.block(self.conv1, self.bn1, x).sum(1)


def _block(self, conv, bn, x):
    return self.act(bn(conv(x)))


def output_size(self, x):
    return self.up(self.act(self.conv1(x)), output_size=[x.shape[2] * 2, x.shape[3] * 2])


def swish(self, x):
    return F.silu(self.bn1(self.conv1(x))) @ torch.ones(8, 2, dtype=x.dtype)


def modules_of_its_own(self, x):
    x = nn.LeakyReLU(0.1)(self.bn1(self.conv1(x)))
    return nn.Sequential(nn.Sigmoid(), nn.Identity())(self.conv2(x))


def in_no_context(self, x):
    with contextlib.nullcontext():
        return F.relu(self.bn1(self.conv1(x)))


def own_functions(self, x):
    x = x.type(x.dtype)  # a method, and no question for a type
    return torch.relu_(self.conv2(F.elu(self.conv1(x))))


def numbers_of_numpy(self, x):
    return np.sqrt(2) * F.relu(self.bn1(self.conv1(x))) / np.sqrt(0.5)


def asks_for_an_attribute(self, x):
    x = self.act(self.conv1(x)) if hasattr(self, "conv1") else x
    return self.shortcut(x) if hasattr(self, "shortcut") else self.conv2(x)


def by_options(self, x):
    x = F.leaky_relu(self.bn1(self.conv1(x)), self.options.slopes[1] if self.options.first.wide else 0.4)
    return x if hasattr(self.options, "head") else self.conv2(x) * getattr(self.options, "gain", 2)


def upsampled(self, x):
    return F.relu(self.bn1(self.conv1(F.upsample(x, scale_factor=2))))


# How many calls of operators a forward is, and how many of the model's convolutions each computes with BatchNorm.
FOLLOWED = {
    asks_for_a_flag: 2,
    functions: 2,
    methods: 2,
    residual: 2,
    residual_of_an_activation: 2,
    told_by_position: 4,
    skip: 2,
    used_twice: 2,
    normalised_used_twice: 2,
    branches: 3,
    shared_layers: 4,
    dropout: 2,
    by_name: 2,
    by_attribute: 2,
    by_shape: 2,
    method_of_its_own: 1,
    output_size: 1,
    modules_of_its_own: 2,
    in_no_context: 1,
    own_functions: 2,
    numbers_of_numpy: 1,
    asks_for_an_attribute: 2,
    by_options: 2,
    upsampled: 1,
}


def data_dependent(self, x):
    return self.conv2(self.conv1(x)) if x.sum() > 0 else self.conv1(x)


def remembers(self, x):
    self.features = self.conv1(x)
    return self.conv2(self.features)


def collects(self, x):
    self.skips.append(self.conv1(x))
    return self.conv2(self.skips[-1])


def counts(self, x):
    self.depth += 1
    return self.conv2(self.conv1(x))


def draws_python(self, x):
    return self.conv2(self.conv1(x)) if random.random() < 0.5 else self.conv2(self.conv1(x)) * 2


def draws_numpy(self, x):
    return self.conv2(self.conv1(x)) * float(np.random.rand())


def draws_torch(self, x):
    return self.conv2(self.conv1(x)) * torch.rand(1).item()


def constant_noise(self, x):
    return self.conv2(self.conv1(x)) + torch.ones(1)


def asks_for_type(self, x):
    return self.conv2(self.conv1(x)) if isinstance(x, torch.Tensor) else self.conv1(x)


def prints(self, x):
    print("shape", x.shape)
    return self.conv2(self.conv1(x))


def no_gradient(self, x):
    with torch.no_grad():
        x = torch.relu(x)
    return self.conv2(self.conv1(x))


def asks_for_gradients(self, x):
    return self.conv2(self.conv1(x)) if torch.is_grad_enabled() else self.conv2(self.conv1(x)) * 2


def asks_in_a_method(self, x):
    return self.conv2(self.conv1(x)) if all(self.asks(y) for y in (x,)) else x


def _asks(self, x):
    return type(x) is torch.Tensor


def sets_an_option(self, x):
    self.options.gain = 2
    return self.conv2(F.relu(self.bn1(self.conv1(x))))


def compares_options(self, x):
    return self.conv2(self.conv1(x) if self.options.first == self.options.second else F.relu(self.conv1(x)))


def looks_into_options(self, x):
    return self.conv2(F.relu(self.conv1(x))) * (2 if "gain" in self.options else 3)


def changes_a_list_of_options(self, x):
    self.options.slopes.append(0.1)
    return self.conv2(F.relu(self.bn1(self.conv1(x))))


def hands_to_numpy(self, x):
    return self.conv2(F.relu(self.bn1(self.conv1(x + np.sqrt(x.detach())))))


def any_number(self, *inputs):
    return self.conv2(self.conv1(inputs[0]))


REFUSED = {
    data_dependent: "torch.fx cannot trace it",
    remembers: "it sets self.features",
    collects: "it sets self.skips",
    counts: "it sets self.depth",
    draws_python: "random numbers",
    draws_numpy: "random numbers",
    draws_torch: "random numbers",
    constant_noise: "makes tensors",
    asks_for_type: "it calls isinstance",
    prints: "it calls print",
    asks_in_a_method: "it calls type",
    no_gradient: "under no_grad",
    asks_for_gradients: "whether gradients",
    hands_to_numpy: "hands a tensor to NumPy",
    sets_an_option: "it sets .gain",
    compares_options: "it compares or prints a SimpleNamespace",
    looks_into_options: "it uses self.options.__dict__",
    changes_a_list_of_options: "it sets self.options.slopes",
}
