"""Calls that are replayed do what the function would, on their own tensors, and only where they are alike."""

import gc
import weakref

import pytest
import torch

from fastgan.kernels import launch as launching
from fastgan.kernels.batch_norm import activation_input_grad
from fastgan.ops import choice, replay
from fastgan.ops.replay import Plan, Replayed
from fastgan.training.graph import capturing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Counted(Replayed):
    """A Replayed whose function counts its calls."""

    def __init__(self, function):
        self.calls = 0

        def counted(*arguments):
            self.calls += 1
            return function(*arguments)

        super().__init__(counted)


def tanh_grad(grad, out):
    """A kernel; without a GPU the interpreter runs it."""
    return activation_input_grad(grad, out, activation="tanh", slope=0.0)


def draw(*shape, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return x.to(memory_format=torch.channels_last) if len(shape) == 4 else x


def pairs(count, *shape):
    return [(draw(*shape, seed=2 * i), draw(*shape, seed=2 * i + 1)) for i in range(count)]


def check(function, calls, runs=2):
    """The calls are replayed from the third on, and equal the function's own."""
    replayed = Counted(function)
    for arguments in calls:
        expected = function(*arguments)
        torch.testing.assert_close(replayed.replay(*arguments), expected, rtol=0, atol=0)
    assert replayed.calls == runs
    return replayed


def test_kernels(poisoned):
    check(tanh_grad, pairs(4, 2, 3, 4, 5))


def test_what_pytorch_does_besides(poisoned):
    """Copies, views, allocations, several results, what is written to, and a list of tensors."""

    def function(x, others, factor, total):
        dz = tanh_grad(x.to(torch.float16).float(), others[0].contiguous(memory_format=torch.channels_last))
        sums = torch.empty((2, x.shape[1]), device=x.device)
        sums.view(-1)[: x.shape[1]] = dz.sum((0, 2, 3))
        sums[1].copy_(others[1]).mul_(factor)
        total.add_(sums.sum())
        unused = torch.zeros(3, device=x.device)
        del unused
        return dz, sums.view(2, -1, 1), sums[1], None, torch.cat([sums, sums], 1)

    totals = torch.zeros(4, 4, device=DEVICE)  # rows begin at multiples of 16 bytes, as memory of its own does
    calls = [(x, [y, draw(3, seed=i)], 0.5, totals[i, :1]) for i, (x, y) in enumerate(pairs(4, 2, 3, 4, 5))]
    replayed = check(function, calls)
    assert totals[:, 1:].eq(0).all() and totals[:, 0].ne(0).all()
    (plan,) = replayed._plans.values()
    assert not any("zeros" in str(function) for function, *_ in plan._steps)  # nobody wants them


def test_an_operator_may_leave_out_results():
    """As cuDNN's backward does, of which only the weight's gradient is asked for."""

    def function(low, high, weight):
        where = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        _, grad, _ = torch.ops.aten.convolution_backward(low, high, weight, None, *where, [False, True, False])
        return tanh_grad(grad, weight)

    def operands(seed):
        shapes = (2, 4, 3, 3), (2, 3, 5, 5), (4, 3, 3, 3)
        return tuple(draw(*shape, seed=seed + i) for i, shape in enumerate(shapes))

    check(function, [operands(10 * i) for i in range(4)])


def test_another_kind_of_argument_is_another_plan():
    def function(x, out, slope):
        x = x.contiguous(memory_format=torch.channels_last)
        return activation_input_grad(x, out, activation="leaky_relu", slope=slope)

    replayed = Counted(function)
    kinds = [
        (draw(2, 3, 4, 5), 0.2),
        (draw(2, 3, 4, 6), 0.2),  # a size
        (draw(2, 3, 4, 5), 0.3),  # a constant
        (draw(2, 3, 4, 5).half(), 0.2),  # a dtype
        (draw(4, 3, 4, 5)[::2], 0.2),  # strides
        (draw(121)[1:].view(2, 4, 5, 3).permute(0, 3, 1, 2), 0.2),  # where memory begins
    ]
    for count, (x, slope) in enumerate(kinds):
        for i in range(4):
            out = (x + i).to(memory_format=torch.channels_last)
            expected = x * torch.where(out > 0, 1.0, slope).to(x.dtype)
            torch.testing.assert_close(replayed.replay(x, out, slope), expected)
        assert replayed.calls == 2 * count + 2


@pytest.mark.parametrize("change", ("precision", "backend", "tables", "cudnn"))
def test_what_a_function_asks_for_besides_is_another_plan(change, monkeypatch):
    replayed = check(tanh_grad, pairs(3, 1, 2, 3, 4))
    if change == "precision":
        torch.backends.cudnn.conv.fp32_precision = "tf32"  # tests/conftest.py undoes it
    elif change == "backend":
        monkeypatch.setenv("FASTGAN_BACKEND", "triton")
    elif change == "cudnn":
        monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    else:
        choice.forget()
    replayed.replay(*pairs(1, 1, 2, 3, 4)[0])
    assert replayed.calls == 3


def test_one_tensor_twice_is_never_replayed():
    """At the next call they may be two."""
    (x, _), replayed = pairs(1, 1, 2, 3, 4)[0], Counted(tanh_grad)
    for _ in range(4):
        torch.testing.assert_close(replayed.replay(x, x), tanh_grad(x, x), rtol=0, atol=0)
    assert replayed.calls == 4
    # Nor two views of one.
    memory = draw(48)
    halves = memory[:24].view(1, 2, 3, 4), memory[:24].view(1, 2, 3, 4)
    alike = Counted(lambda a, b: activation_input_grad(a, b, activation="relu", slope=0.0))
    for _ in range(4):
        alike.replay(*halves)
    assert alike.calls == 4


@pytest.mark.parametrize(
    "function",
    (
        lambda x, y: tanh_grad(x, y) * (x.sum().item() > 0),
        lambda x, y: x * y,
        lambda x, y: tanh_grad(x, y + OUTSIDE),
    ),
    ids=("decides by numbers", "starts no kernel", "a tensor from elsewhere"),
)
def test_what_cannot_be_replayed(function):
    check(function, pairs(4, 1, 2, 3, 4), runs=4)


OUTSIDE = torch.ones((), device=DEVICE)


def test_results_and_scratch_are_nobodys_afterwards():
    """A plan keeps no tensor, and lets go of each after the last step that reads it."""
    alive = []

    def function(x, y):
        first = tanh_grad(x, y)
        second = tanh_grad(first, y)
        return tanh_grad(second, y)

    replayed = check(function, pairs(3, 1, 2, 3, 4))
    (plan,) = replayed._plans.values()
    x, y = pairs(1, 1, 2, 3, 4)[0]
    ends = [ends for *_, ends in plan._steps]
    assert sum(map(len, ends)) >= 2  # of the three allocations one is the result
    result = replayed.replay(x, y)
    alive = [weakref.ref(tensor) for tensor in (result, x, y)]
    del result, x, y
    gc.collect()
    assert not any(reference() is not None for reference in alive)


def test_an_error_while_recording_leaves_everything_as_it_was():
    fails = []

    def function(x, y):
        if fails:
            raise ValueError("no")
        return tanh_grad(x, y)

    (first, second, third, fourth), replayed = pairs(4, 1, 2, 3, 4), Counted(function)
    replayed.replay(*first)
    fails.append(True)
    with pytest.raises(ValueError, match="no"):
        replayed.replay(*second)
    assert getattr(launching.thread, "on_launch", None) is None and not torch._C._len_torch_dispatch_stack()
    fails.clear()
    replayed.replay(*third)
    torch.testing.assert_close(replayed.replay(*fourth), tanh_grad(*fourth), rtol=0, atol=0)
    assert replayed.calls == 3


def test_plans_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(replay, "MOST_PLANS", 3)
    replayed = Replayed(tanh_grad)
    for size in (1, 2, 3, 4, 5):
        for arguments in pairs(3, 1, 1, 2, size):
            replayed.replay(*arguments)
        assert len(replayed._plans) <= 3
    assert type(list(replayed._plans.values())[-1]) is Plan


def test_a_cpu_runs_the_function():
    replayed = Counted(torch.mul)
    for _ in range(4):
        assert replayed(torch.ones(2), torch.ones(2)).tolist() == [1.0, 1.0]
    assert replayed.calls == 4 and not replayed._plans


@pytest.mark.gpu
def test_a_gpu_replays_and_a_capture_does_not():
    replayed = Counted(tanh_grad)
    for arguments in pairs(4, 2, 3, 4, 5):
        torch.testing.assert_close(replayed(*arguments), tanh_grad(*arguments), rtol=0, atol=0)
    assert replayed.calls == 2
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        captured = replayed(*arguments)
    graph.replay()
    assert replayed.calls == 3
    torch.testing.assert_close(captured, tanh_grad(*arguments), rtol=0, atol=0)
