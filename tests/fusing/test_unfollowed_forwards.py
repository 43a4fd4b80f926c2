"""Forwards with more in them than a trace can stand for: fuse leaves them as they are, and runs none of it itself."""

import functools
import logging
import random
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastgan
from tests.forwards import Layers
from tests.pairs import assert_same, count_operator_calls, make_pair

SEEN, FOUND = [], {"calls": 0}


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return -grad


reverse = Reversed.apply


def gained(x):
    return F.relu(x)


gained.gain = 2.0


class Nothing(nn.Module):
    def forward(self, x):
        return None


class Base(Layers):
    def __init__(self):
        super().__init__()
        self.maybe = Nothing()
        self.child = nn.Identity()
        self.child.outs, self.nested, self.reverse, self.gained = [], {"a": []}, reverse, gained
        self.register_buffer("on", torch.tensor(False))

    @property
    def on_cpu(self):
        return self.on.is_cpu

    def head(self, x):
        return F.relu(self.bn1(self.conv1(x)))


def buffer_decides(self, x):
    return self.head(x) * 3 if self.on else self.head(x)


def parameters_dtype(self, x):
    return self.head(x.to(next(self.parameters()).dtype))


def parameters_frozen(self, x):
    return self.head(x) if next(self.parameters()).requires_grad else self.head(x).detach()


def function_of_autograd(self, x):
    return Reversed.apply(self.head(x))


def function_of_autograd_by_name(self, x):
    return reverse(self.head(x))


def function_of_autograd_in_an_attribute(self, x):
    return self.reverse(self.head(x))


def helper_asks(x):
    return x * 2 if isinstance(x, torch.Tensor) else x


def asks_in_a_helper(self, x):
    return helper_asks(self.head(x))


def asks_is_tensor(self, x, y=1.0):
    return self.head(x) + (y if torch.is_tensor(y) else 2.0 if torch.is_tensor(x) else 3.0)


def noise_of_its_own(self, x):
    x = self.head(x)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return x + torch.randn_like(x)


def checkpoints(self, x):
    return checkpoint(self.child, self.head(x), use_reentrant=False)


def hooks_of_saved_tensors(self, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (SEEN.append(1), t)[1], lambda t: t):
        return self.head(x)


def sets_on_child(self, x):
    x = self.head(x)
    self.child.last = x.shape
    return self.child(x)


def appends_to_list_of_child(self, x):
    x = self.head(x)
    self.child.outs.append(x)
    return x


def appends_to_nested(self, x):
    x = self.head(x)
    self.nested["a"].append(x)
    return x


def appends_to_global(self, x):
    x = self.head(x)
    SEEN.append(x)
    return x


def counts_in_global(self, x):
    FOUND["calls"] += 1
    return self.head(x)


def logs(self, x):
    logging.getLogger("tests.unfollowed").warning("called")
    return self.head(x)


def warns(self, x):
    warnings.warn("called", stacklevel=1)
    return self.head(x)


def catches(self, x):
    try:
        return self.head(x) if x.sum() > 0 else x
    except Exception:
        return self.head(x) * 2


def appends_to_an_argument(self, x, outs=()):
    x = self.head(x)
    [outs.append(x) for _ in range(len(outs) > 0)]
    return x


def has_no_gradient(self, x):
    return self.head(x) * 2 if x.grad is None else self.head(x)


def draws_by_name(self, x):
    return self.head(x) * random.uniform(0, 1)


def asks_a_result(self, x):
    y = self.maybe(self.head(x))
    return x if y is None else y


def names_by_text(self, x):
    return self.head(x) * len(f"{x}")


def looks_in_a_set(self, x):
    return self.head(x) * (2 if x.shape[1] in {1, 3} else 1)


def looks_in_a_dictionary(self, x):
    return self.head(x) * {"cpu": 3.0, "cuda": 2.0}.get(x.device.type, 1.0)


def counts_in_a_set(self, x):
    return self.head(x) * len({x.shape[2], x.shape[3]})


def asks_for_true(self, x):
    return self.head(x) * (2 if x.is_contiguous() is True else 1)


def asks_a_property(self, x):
    return self.head(x) * (2 if self.on_cpu is True else 1)


def names_by_its_representation(self, x):
    return self.head(x) * (2 if "8" in f"{x.shape[2]!r}" else 1)


def names_by_old_format(self, x):
    return self.head(x) * (2 if "%r" % (x.dtype,) == "torch.float64" else 1)  # noqa: UP031


def function_with_attributes(self, x):
    return self.gained(self.head(x)) * self.gained.gain


def loops(self, x):
    return self.head(x) * sum(1 for _ in x)


REFUSED = {
    buffer_decides: "torch.fx cannot trace it",
    parameters_dtype: "it calls Module.parameters",
    parameters_frozen: "it calls Module.parameters",
    function_of_autograd: "it calls Reversed.apply",
    function_of_autograd_by_name: "it calls reverse",
    function_of_autograd_in_an_attribute: "self.reverse",
    asks_in_a_helper: "it calls isinstance",
    asks_is_tensor: "it calls torch.is_tensor",
    noise_of_its_own: "it calls torch.",
    checkpoints: "it calls checkpoint",
    hooks_of_saved_tensors: "it ",
    sets_on_child: "it sets .last",
    appends_to_list_of_child: "it sets self.child.outs",
    appends_to_nested: "it reads self.nested, a dict, which can change",
    appends_to_global: "it uses SEEN.append",
    counts_in_global: "it uses FOUND, a dict, which can change",
    logs: "it calls logging.getLogger",
    warns: "it calls warnings.warn",
    catches: "it catches exceptions",
    has_no_gradient: "it asks a tensor for grad",
    draws_by_name: "random numbers",
    asks_a_result: "it asks whether a result is None",
    names_by_text: "it writes a tensor as text",
    looks_in_a_set: "in a set or dictionary",
    looks_in_a_dictionary: "in a set or dictionary",
    counts_in_a_set: "in a set or dictionary",
    asks_for_true: "it asks whether two are the same object",
    asks_a_property: "it asks whether two are the same object, and reads self.on_cpu",
    names_by_its_representation: "it writes a tensor as text",
    names_by_old_format: "it writes a tensor as text",
    function_with_attributes: "it reads self.gained, a function with attributes",
    loops: "it loops over a tensor",
}


@pytest.mark.parametrize("function", REFUSED, ids=lambda f: f.__name__)
def test_refused(function, monkeypatch):
    del SEEN[:]
    FOUND["calls"] = 0
    lines = []
    monkeypatch.setattr(logging.getLogger("tests.unfollowed"), "handle", lines.append)
    stock, model = make_pair(type(function.__name__, (Base,), {"forward": function}))
    calls = count_operator_calls(monkeypatch)
    with warnings.catch_warnings(record=True) as warned:
        fastgan.fuse(model)
        rows = {row.path: row for row in fastgan.explain(model)}
    assert not rows["conv1"].fused and REFUSED[function] in rows["conv1"].reason
    assert (SEEN, FOUND["calls"], lines, warned) == ([], 0, [], [])
    assert model.nested == {"a": []} and model.child.outs == [] and "last" not in vars(model.child)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as warned:
        torch.manual_seed(0), random.seed(0)
        ours = [model(x) for _ in range(3)]
        seen = len(SEEN), FOUND["calls"], len(lines), len(model.nested["a"]), len(model.child.outs)
    assert calls == [] and not any(isinstance(value, torch.fx.Proxy) for value in SEEN)
    del SEEN[:], lines[:]
    FOUND["calls"] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0), random.seed(0)
        theirs = [stock(x) for _ in range(3)]
    torch.testing.assert_close(ours, theirs)
    assert seen == (len(SEEN), FOUND["calls"], len(lines), len(stock.nested["a"]), len(stock.child.outs))


class Worded(nn.Module):
    """Children and arguments with names that code can only spell in other ways."""

    def __init__(self):
        super().__init__()
        self.ways = nn.ModuleDict({"global": nn.Conv2d(3, 4, 3, padding=1), "class": nn.Conv2d(3, 4, 1)})
        self.plain = nn.Conv2d(3, 4, 1)

    def forward(self, x, classify=False):
        return F.relu(self.ways["class"](x)) if classify else F.relu(self.plain(x))


def test_names_that_are_keywords(monkeypatch):
    """Only the calls that use them run stock."""
    stock, model = make_pair(Worded)
    calls = count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), stock(x))
    assert len(calls) == 1
    torch.testing.assert_close(model(x, classify=True), stock(x, classify=True))
    assert len(calls) == 1
    reasons = {row.path: row.reason for row in fastgan.explain(model, x, classify=True)}
    assert "keywords of Python" in reasons["ways.class"]


def test_an_argument_named_self(monkeypatch):
    stock, model = make_pair(type("Net", (Layers,), {"forward": lambda layers, self: layers.act(layers.conv1(self))}))
    count_operator_calls(monkeypatch)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(fastgan.fuse(model)(x), stock(x))
    assert "an argument named self" in fastgan.explain(model, x)[0].reason


def test_gradient_of_reversed(monkeypatch):
    stock, model = make_pair(type("Net", (Base,), {"forward": function_of_autograd}))
    count_operator_calls(monkeypatch)
    assert_same(fastgan.fuse(model), stock)


def test_list_among_the_arguments(monkeypatch):
    _, model = make_pair(type("Net", (Base,), {"forward": appends_to_an_argument}))
    count_operator_calls(monkeypatch)
    outs = [1.0]
    fastgan.fuse(model)(torch.randn(2, 3, 8, 8, dtype=torch.float64), outs)
    assert len(outs) == 2 and type(outs[1]) is torch.Tensor


def test_classes_that_take_notice_of_subclasses(monkeypatch):
    registry = {}

    class Registered(Base):
        def __init_subclass__(cls, *, name, **kwargs):
            super().__init_subclass__(**kwargs)
            assert name not in registry
            registry[name] = cls

    class Named(Registered, name="net"):
        def forward(self, x):
            return self.head(x)

    stock, model = make_pair(Named)
    calls = count_operator_calls(monkeypatch)
    assert_same(fastgan.fuse(model), stock)
    assert calls and registry == {"net": Named} and type(model) is Named
    assert "__getattribute__" not in vars(nn.Module)


class Parent(Base):
    def forward(self, x):
        return self.head(x)


class Child(Parent):
    def forward(self, x):
        return super().forward(x) * 2


class Grandchild(Child):
    def forward(self, x):
        return super(Grandchild, self).forward(x) + 1  # noqa: UP008


class Listed(nn.Sequential):
    def forward(self, x):
        return super().forward(x).sum(1)


@pytest.mark.parametrize(
    "make",
    [Grandchild, lambda: Listed(nn.Conv2d(3, 4, 3), nn.ReLU())],
    ids=["super", "sequential"],
)
def test_methods_of_parents_are_followed(make, monkeypatch):
    stock, model = make_pair(make)
    calls = count_operator_calls(monkeypatch)
    assert_same(fastgan.fuse(model), stock)
    assert calls


def test_packages_whose_names_begin_like_torch(monkeypatch):
    """Their code is somebody's, to be looked at: torchvision's."""
    resnet = pytest.importorskip("torchvision").models.resnet
    stock, model = make_pair(lambda: resnet.BasicBlock(3, 3))
    calls = count_operator_calls(monkeypatch)
    assert_same(fastgan.fuse(model), stock)
    assert calls and all(row.fused for row in fastgan.explain(model))


def test_own_call_of_a_child(monkeypatch):
    class Counting(nn.Identity):
        calls = 0

        def __call__(self, x):
            type(self).calls += 1
            return super().__call__(x)

    class Net(Base):
        def __init__(self):
            super().__init__()
            self.last = Counting()

        def forward(self, x):
            return self.last(self.head(x))

    _, model = make_pair(Net)
    count_operator_calls(monkeypatch)
    fastgan.fuse(model)
    assert Counting.calls == 0
    assert "__call__ of its own" in fastgan.explain(model)[0].reason


def cached(self, x):
    return F.relu(self.conv1(x))


@pytest.mark.parametrize(
    "forward", (functools.lru_cache(cached), property(lambda self: self.conv1.forward)), ids=("cached", "computed")
)
def test_forwards_that_are_no_functions(forward):
    stock, model = make_pair(type("Unusual", (Layers,), {"forward": forward}))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(fastgan.fuse(model)(x), stock(x))
    assert "its forward is a" in fastgan.explain(model)[0].reason
