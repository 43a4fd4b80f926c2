"""Small models whose layers `fuse` takes over, in every order and way of calling them, and some that it leaves."""

import torch
from torch import nn
from torch.nn.utils import parametrizations


class InOrder(nn.Module):
    """The layers called one after the other by a forward of its own."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 2, 1)
        self.bn1 = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 5, 4, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(5)
        self.last = nn.Conv2d(5, 2, 3)

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        return self.last(self.bn2(self.up(x)))


class SharedActivation(nn.Module):
    """One activation object after every layer, defined before them and called in another order."""

    def __init__(self):
        super().__init__()
        self.act = nn.LeakyReLU(0.2)
        self.tanh = nn.Tanh()
        self.bn = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 3, 3, bias=False)
        self.conv1 = nn.ConvTranspose2d(3, 4, 4, 2, 1)

    def forward(self, x):
        return self.tanh(self.conv2(self.act(self.bn(self.act(self.conv1(x))))))


class Nested(nn.Module):
    """A chain of a convolution and a Sequential, reached by attributes of attributes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.ReLU()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True))

    def forward(self, x):
        return self.body(self.act(self.first(x)))


class Residual(nn.Module):
    """The input comes back."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x):
        return x + self.act(self.conv(x))


class Functional(nn.Module):
    """A function stands between modules: the tutorials' order of a convolution, an activation and a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(torch.relu(self.conv(x)))


class DataDependent(nn.Module):
    """What fx cannot trace."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.conv(x)) if x.sum() > 0 else self.conv(x)


class ByMode(nn.Module):
    """Another chain in eval."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x):
        x = self.conv(x)
        return self.act(x) if self.training else x


class NoGradient(nn.Module):
    """The convolution without gradients: no part of what fx records."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        with torch.no_grad():
            x = self.conv(x)
        return self.bn(x)


class WithAutocastOff(nn.Module):
    """The convolution in full precision whatever surrounds it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.act(self.conv(x))


class Remembers(nn.Module):
    """Keeps what it has seen in an attribute."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.act = nn.ReLU()
        self.features = None

    def forward(self, x):
        self.features = self.conv(x)
        return self.act(self.features)


def bn_dropped_statistics():
    bn = nn.BatchNorm2d(4)
    bn.track_running_stats = False  # the buffers stay
    return bn


def affine_false_dropped_statistics():
    bn = nn.BatchNorm2d(4, affine=False)
    bn.track_running_stats = False
    return bn


def frozen(module):
    return module.requires_grad_(False)


SHARED = nn.LeakyReLU(0.2)
STACKS = {
    "conv": lambda: [nn.Conv2d(3, 4, 3)],
    "conv_no_bias": lambda: [nn.Conv2d(3, 4, 3, bias=False)],
    "conv_relu": lambda: [nn.Conv2d(3, 4, 3), nn.ReLU()],
    "conv_relu_inplace": lambda: [nn.Conv2d(3, 4, 3), nn.ReLU(True)],
    "conv_tanh": lambda: [nn.Conv2d(3, 4, (3, 2), (2, 1), (0, 1), bias=False), nn.Tanh()],
    "padding_in_words": lambda: [
        nn.Conv2d(3, 4, (3, 5), padding="same"),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 2, 3, padding="valid"),
    ],
    "conv_sigmoid": lambda: [nn.Conv2d(3, 1, 8, 1, 0, bias=False), nn.Sigmoid()],
    "conv_bn": lambda: [nn.Conv2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4)],
    "conv_bn_leaky": lambda: [nn.Conv2d(3, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.LeakyReLU(0.2, True)],
    "conv_bias_bn_sigmoid": lambda: [nn.Conv2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.Sigmoid()],
    "leaky_zero_slope": lambda: [nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.0)],
    "transposed": lambda: [nn.ConvTranspose2d(3, 4, 4, 2, 1)],
    "transposed_bn_relu": lambda: [nn.ConvTranspose2d(3, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(True)],
    "transposed_bias_bn_tanh": lambda: [nn.ConvTranspose2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.Tanh()],
    "output_padding": lambda: [nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1), nn.BatchNorm2d(4), nn.ReLU()],
    "output_padding_pair": lambda: [nn.ConvTranspose2d(3, 4, 3, (3, 2), 1, output_padding=(2, 0)), nn.Sigmoid()],
    "affine_false": lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU()],
    "no_tracking": lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()],
    "affine_false_no_tracking": lambda: [
        nn.ConvTranspose2d(3, 4, 3),
        nn.BatchNorm2d(4, affine=False, track_running_stats=False),
        nn.Tanh(),
    ],
    "tracking_switched_off": lambda: [nn.Conv2d(3, 4, 3), bn_dropped_statistics(), nn.ReLU()],
    "affine_false_tracking_switched_off": lambda: [nn.Conv2d(3, 4, 3), affine_false_dropped_statistics()],
    "momentum_none": lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU()],
    "momentum_0": lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.0), nn.ReLU()],
    "momentum_1": lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=1.0), nn.ReLU()],
    "eps_as_momentum": lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, 0.8), nn.LeakyReLU(0.2, inplace=True)],
    "shared_activation": lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), SHARED, nn.Conv2d(4, 2, 3), SHARED],
    "frozen": lambda: [frozen(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU(), frozen(nn.Conv2d(4, 2, 3))],
    "elu": lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ELU(), nn.Conv2d(4, 2, 3)],
    "negative_slope_below_0": lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(-0.1)],
    "tutorial_order": lambda: [nn.Conv2d(3, 4, 3, 2, 1), nn.LeakyReLU(0.2, inplace=True), nn.BatchNorm2d(4, 0.8)],
    "dropout_eval_neighbours": lambda: [nn.Flatten(1), nn.Unflatten(1, (3, 8, 8)), nn.Conv2d(3, 4, 3), nn.ReLU()],
    "upsample": lambda: [nn.BatchNorm2d(3), nn.Upsample(scale_factor=2), nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4)],
    "leading_relu": lambda: [nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Tanh()],
    "instance_norm": lambda: [nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.ReLU()],
    "batch_norm_1d": lambda: [nn.Conv2d(3, 4, 8), nn.Flatten(), nn.BatchNorm1d(4), nn.ReLU()],
    "two_blocks": lambda: [
        nn.ConvTranspose2d(3, 4, 4, 2, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(True),
        nn.Conv2d(4, 3, 4, 2, 1),
        nn.BatchNorm2d(3),
        nn.LeakyReLU(0.2),
        nn.Conv2d(3, 1, 3),
        nn.Sigmoid(),
    ],
    "spectral_norm": lambda: [parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU()],
    "weight_norm": lambda: [parametrizations.weight_norm(nn.ConvTranspose2d(3, 4, 3)), nn.Tanh()],
    "old_spectral_norm": lambda: [nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), nn.LeakyReLU(0.2)],
    "tutorial_order_tanh": lambda: [nn.ConvTranspose2d(3, 4, 4, 2, 1), nn.Tanh(), nn.BatchNorm2d(4), nn.ReLU()],
    "sync_batch_norm": lambda: [nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.ReLU()],
    "nested_sequential": lambda: [nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.ReLU()],
}
MODELS = {
    **{name: lambda make=make: nn.Sequential(*make()) for name, make in STACKS.items()},
    "InOrder": InOrder,
    "SharedActivation": SharedActivation,
    "Nested": Nested,
    "Residual": Residual,
    "Functional": Functional,
    "ByMode": ByMode,
}
STAYS_STOCK = {
    "groups": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU()), "groups=3"),
    "dilation": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2), nn.BatchNorm2d(4)), r"dilation=\(2, 2\)"),
    "reflect": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU()),
        "padding_mode='reflect'",
    ),
    "same": (lambda: nn.Sequential(nn.Conv2d(3, 4, 4, padding="same"), nn.ReLU()), "padding='same'"),
    "conv1d": (lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 3), nn.ReLU()), "Conv1d"),
    "data_dependent": (DataDependent, "torch.fx cannot trace it"),
    "no_gradient": (NoGradient, "under no_grad or autocast of its own"),
    "autocast_off": (WithAutocastOff, "under no_grad or autocast of its own"),
    "remembers": (Remembers, "it sets self.features"),
}
