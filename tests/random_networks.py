"""A hypothesis strategy for the source of small networks, of parts that GANs consist of and of what breaks them."""

import collections
import textwrap

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

SMALLEST, LARGEST = 5, 9  # images
MODULES = {
    "relu": ("nn.ReLU()", "nn.ReLU(True)"),
    "leaky": (
        "nn.LeakyReLU(0.2)",
        "nn.LeakyReLU(0.2, True)",
        "nn.LeakyReLU()",
        "nn.LeakyReLU(0.0)",
        "nn.LeakyReLU(-0.1)",
    ),
    "tanh": ("nn.Tanh()",),
    "sigmoid": ("nn.Sigmoid()",),
    "other": ("nn.PReLU()", "nn.ELU()", "nn.ELU(inplace=True)", "nn.SiLU()", "nn.ReLU6()", "nn.Identity()"),
}
FUNCTIONS = {
    "relu": ("F.relu({})", "torch.relu({})", "{}.relu()", "F.relu({}, inplace=True)", "{}.relu_()"),
    "leaky": ("F.leaky_relu({}, 0.2)", "F.leaky_relu({}, negative_slope=0.1, inplace=True)", "F.leaky_relu({})"),
    "tanh": ("torch.tanh({})", "F.tanh({})", "{}.tanh()", "{}.tanh_()"),
    "sigmoid": ("torch.sigmoid({})", "F.sigmoid({})", "{}.sigmoid()"),
    "other": ("F.elu({})", "F.silu({})", "F.relu6({})", "{} * 2"),
}
ORDERS = [
    ("norm", "act"),
    ("act",),
    ("norm",),
    (),
    ("act", "norm"),
    ("act", "dropout", "norm"),
    ("norm", "act", "dropout"),
    ("norm", "dropout", "act"),
    ("instance", "act"),
    ("norm", "norm"),
    ("act", "act"),
    ("norm", "act", "norm"),
]
HOOKS = (
    "register_forward_hook(lambda module, args, out: 2 * out)",
    "register_forward_pre_hook(lambda module, args: (args[0] + 1,))",
    "register_forward_hook(lambda module, args, out: None)",
    "register_full_backward_hook(lambda module, grad_input, grad_output: None)",
)


@st.composite
def sources(draw):
    """Source code that defines `network` and the `size` of the square images of 3 channels that it takes."""
    return _Writer(draw).write()


def build(source):
    """(network, size) of what `sources` drew."""
    names = dict(nn=nn, F=F, torch=torch, OrderedDict=collections.OrderedDict)
    names |= dict(spectral_norm=spectral_norm, weight_norm=weight_norm)
    exec(source, names)
    return names["network"], names["size"]


class _Writer:
    """Writes one network down, block by block: a convolution, and what follows it.

    In a Sequential all is modules. In a forward of its own an activation may be a function, every value may be used
    again, and modules may be called twice.
    """

    def __init__(self, draw):
        self.draw = draw
        self.in_sequential = self.flip()
        self.modules = []  # the source of each
        self.lines = []  # of forward
        self.size = self.first_size = draw(st.integers(SMALLEST, LARGEST))
        self.channels, self.value = 3, "x"
        self.values = [("x", self.channels, self.size)]
        self.convolutions, self.norms, self.plain = [], [], []  # indices of modules; plain: all that may get hooks
        self.shared = {}  # activation → index of the instance that is used again

    def pick(self, *options):
        return self.draw(st.sampled_from(options))

    def flip(self, one_in=2):
        """True once in so many; shrinks to False."""
        return self.draw(st.integers(1, one_in)) == one_in

    def write(self):
        for _ in range(self.draw(st.integers(1, 3))):
            self.block()
        afterwards = self.changes()
        text = "\n".join(self.sequential() if self.in_sequential else self.forward())
        return "\n".join([text, *afterwards, f"size = {self.first_size}"])

    # What the source consists of.

    def name(self, index):
        return f"network[{index}]" if self.in_sequential else f"network.m{index}"

    def sequential(self):
        colon = self.flip(3)
        yield "network = nn.Sequential(OrderedDict(["
        for i, module in enumerate(self.modules):
            yield f'    ("{i}{":" if colon else ""}", {module}),'
        yield "]))"

    def forward(self):
        yield "class Network(nn.Module):"
        yield "    def __init__(self):"
        yield "        super().__init__()"
        for i, module in enumerate(self.modules):
            yield f"        self.m{i} = {module}"
        yield "    def forward(self, x):"
        yield from textwrap.indent("\n".join(self.lines), " " * 8).split("\n")
        yield f"        return {self.result()}"
        yield "network = Network()"

    def result(self):
        earlier = self.pick(*[value for value, *_ in self.values])
        y = self.value
        return self.pick(
            y, f"{y}.view({y}.size(0), -1)", f"torch.flatten({y}, 1)", f"{y}.mean([2, 3])", f"{y}, {earlier}"
        )

    def call(self, index):
        self.then(f"self.m{index}({self.value})")

    def then(self, expression):
        """One line of forward: the next value."""
        self.value = f"y{len(self.values)}"
        self.lines.append(f"{self.value} = {expression}")
        self.values.append((self.value, self.channels, self.size))

    def module(self, source):
        self.modules.append(source)
        self.plain.append(len(self.modules) - 1)
        self.call(len(self.modules) - 1)
        return len(self.modules) - 1

    # The parts.

    def block(self):
        before = self.pick("", "", "", "nn.Upsample(scale_factor=2)", "nn.ReflectionPad2d(1)")
        if before and 1 < self.size <= LARGEST:
            self.size = 2 * self.size if "Upsample" in before else self.size + 2
            self.module(before)
        self.convolution()
        for part in self.pick(*ORDERS):
            getattr(self, part)()
            if not self.in_sequential and self.flip(6):
                self.join()
        if not self.in_sequential and self.flip(3):
            self.join()

    def join(self):
        """Use an earlier value again: a residual, or a concatenation."""
        fitting = [(value, c) for value, c, size in self.values if size == self.size]
        value, channels = self.pick(*fitting)
        sums = [f"{self.value} + {value}", f"torch.add({value}, {self.value})", f"{self.value} * {value}"]
        if channels == self.channels and self.flip():
            self.then(self.pick(*sums))
        elif self.channels + channels <= 8:
            self.channels += channels
            self.then(f"torch.cat([{self.value}, {value}], {self.pick('1', 'dim=1')})")

    def convolution(self):
        again = [i for i, c, kept in self.convolutions if kept and c == self.channels]
        if again and not self.in_sequential and self.flip(6):
            self.call(self.pick(*again))
            return
        keeps = self.flip(3)  # the shape, so that it can be added to what went in
        if keeps:
            k = self.pick(3, 1, 5)
            arguments, after, size = [f"{k}, 1, {k // 2}"], self.channels, self.size
            kind = self.pick("nn.Conv2d", "nn.ConvTranspose2d")
        elif self.size <= LARGEST and self.flip():
            kind, after = "nn.ConvTranspose2d", self.draw(st.integers(2, 4))
            arguments, size = self.transposed()
        else:
            kind, after = "nn.Conv2d", self.draw(st.integers(2, 4))
            arguments, size = self.strided()
        groups = self.pick(*[1] * 6, *[g for g in (2, 3, 4) if self.channels % g == after % g == 0])
        arguments += [f"groups={groups}"] * (groups > 1) + ["bias=False"] * self.flip()
        before, self.channels, self.size = self.channels, after, size
        source = f"{kind}({before}, {after}, {', '.join(arguments)})"
        norm = self.pick("spectral_norm", "weight_norm") if self.flip(6) else ""
        self.convolutions.append((self.module(f"{norm}({source})" if norm else source), before, keeps))

    def strided(self):
        """(arguments, size of the result) of a convolution."""
        k, s = self.pick(3, 4, 1, 2, 5, 7), self.pick(1, 2, 3)
        dilation = self.pick(1, 1, 1, 1, 2) if k <= 4 else 1
        extent = dilation * (k - 1) + 1
        smallest = max(0, (extent - self.size + 1) // 2)
        p = self.draw(st.integers(smallest, max(smallest, k // 2)))
        arguments = [f"{k}, {s}, {p}"] + [f"dilation={dilation}"] * (dilation > 1)
        size = (self.size + 2 * p - extent) // s + 1
        if p < self.size and self.flip(8):
            arguments.append('padding_mode="reflect"')
        elif s == 1 and self.flip(8):
            return [f'{k}, padding="same"', *arguments[1:]], self.size
        return arguments, size

    def transposed(self):
        k, s = self.pick(4, 3, 1, 2, 5, 7), self.pick(1, 2, 3) if self.size <= 5 else self.pick(1, 2)
        dilation = self.pick(1, 1, 1, 1, 2) if k <= 3 else 1
        output_padding = self.draw(st.integers(0, max(s, dilation) - 1))
        reach = (self.size - 1) * s + dilation * (k - 1) + output_padding + 1
        p = self.draw(st.integers(0, min(k // 2, (reach - 1) // 2)))
        arguments = [f"{k}, {s}, {p}"] + [f"output_padding={output_padding}"] * (output_padding > 0)
        return arguments + [f"dilation={dilation}"] * (dilation > 1), reach - 2 * p

    def norm(self):
        again = [i for i, c in self.norms if c == self.channels]
        if again and not self.in_sequential and self.flip(6):
            self.call(self.pick(*again))
            return
        arguments = [self.pick("", "0.8", "eps=0.1"), self.pick("", "momentum=None", "momentum=0.9", "momentum=0.0")]
        arguments += ["affine=False"] * self.flip(5) + ["track_running_stats=False"] * self.flip(5)
        source = ", ".join([str(self.channels), *filter(None, arguments)])
        self.norms.append((self.module(f"nn.BatchNorm2d({source})"), self.channels))

    def act(self):
        kind = self.pick("relu", "leaky", "tanh", "sigmoid", "other")
        if not self.in_sequential and self.flip():
            self.then(self.pick(*FUNCTIONS[kind]).format(self.value))
            return
        source = self.pick(*MODULES[kind])
        if source in self.shared and not self.in_sequential and self.flip():
            self.call(self.shared[source])
        else:
            self.shared[source] = self.module(source)

    def dropout(self):
        if not self.in_sequential and self.flip():
            self.then(f"F.dropout({self.value}, 0.5, self.training)")
        else:
            self.module(self.pick("nn.Dropout(0.5)", "nn.Dropout2d(0.5)", "nn.Dropout(0.5, inplace=True)"))

    def instance(self):
        if self.size > 1:
            self.module(f"nn.InstanceNorm2d({self.channels})")

    # What is done to the network afterwards.

    def changes(self):
        lines = []
        if self.flip(5):
            lines.append(f"{self.name(self.pick(*self.plain))}.requires_grad_(False)")
        if self.flip(5):
            lines.append(f"{self.name(self.pick(*self.plain))}.{self.pick(*HOOKS)}")
        if self.flip(5):
            first, *others = [self.name(i) for i, *_ in self.convolutions]
            for other in others:
                lines.append(f"if {first}.weight.shape == {other}.weight.shape and type({first}) is type({other}):")
                lines.append(f"    {other}.weight = {first}.weight")
        return lines
