"""Right first, fast second: measuring a Problem, on the CPU with the interpreter, and with a clock that is told."""

import pytest
import torch

from fastgan.kernels.launch import MatrixTile
from fastgan.ops import implementations
from fastgan.tune import measure as measuring
from fastgan.tune.measure import Clock, errors, measure
from fastgan.tune.workloads import problems_of
from tests.conftest import HAS_GPU

TILES = [MatrixTile(16, 16, 16, 4, 2), MatrixTile(32, 16, 16, 4, 2), MatrixTile(16, 32, 16, 4, 2)]
DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")


class ToldClock:
    """The tiles are timed in their order, then the fastest again, and cuDNN."""

    def __init__(self, *times):
        self.times = list(times)

    def time(self, call, buffers=1, *, hopeless=float("inf")):
        call(0)
        return self.times.pop(0)


def problem(kind):
    name = "convt:5-20:k4s2p1o1:4x4+act" if kind in ("up+epilogue", "down+normalized") else "conv:20-5:k4s2p1:6x6+bn"
    found = {p.kind: p for p in problems_of([name], (3,), [torch.float16])}
    operation, _, then = kind.partition("+")
    return found[operation]._replace(kind=kind) if then in ("activated", "normalized") else found[kind]


@pytest.mark.parametrize(
    "kind", ("up+epilogue", "down+statistics", "up", "up+activated", "down+normalized", "weight_grad+float32")
)
def test_the_fastest_is_chosen(kind):
    result = measure(problem(kind), TILES, DEVICE, ToldClock(15.0, 10.0, 12.0, 11.0, 20.0))
    assert result.measurement == ("triton", TILES[1]._asdict(), 11.0, 20.0, 3)
    assert [c.us for c in result.candidates] == [15.0, 10.0, 12.0] and not any(c.failure for c in result.candidates)
    lucky = measure(problem(kind), TILES, DEVICE, ToldClock(15.0, 10.0, 12.0, 11.0, 10.5)).measurement
    assert lucky == ("cudnn", TILES[1]._asdict(), 11.0, 10.5, 3)


def wrong_for(tile, change, monkeypatch):
    """Our kernels give a wrong result in this tile."""
    original = implementations.run_conv_statistics

    def run_conv_statistics(choice, *args, **options):
        y, *statistics = original(choice, *args, **options)
        if choice.tile == tile._asdict():
            change(y, statistics)
        return y, *statistics

    monkeypatch.setattr(implementations, "run_conv_statistics", run_conv_statistics)


@pytest.mark.parametrize(
    "change",
    (
        lambda y, statistics: y[-1, -1, -1, -1].add_(3.0),
        lambda y, statistics: y[0, 0, 0, 0].fill_(float("nan")),
        lambda y, statistics: statistics[0].mul_(1.05),
        lambda y, statistics: statistics[1].mul_(1.01),
        lambda y, statistics: statistics[2].mul_(1.01),
    ),
)
def test_a_wrong_candidate_is_never_chosen(change, monkeypatch):
    wrong_for(TILES[1], change, monkeypatch)
    result = measure(problem("down+statistics"), TILES, DEVICE, ToldClock(15.0, 12.0, 12.0, 20.0))
    assert result.measurement.tile == TILES[2]._asdict()
    assert result.candidates[1].failure.startswith("wrong result")


def test_candidates_that_fail(monkeypatch):
    compile_error = {TILES[0]: "OutOfResources", TILES[1]: "CompilationError", TILES[2]: "no"}.get
    result = measure(problem("up"), TILES, DEVICE, ToldClock(20.0), compile_error)
    assert result.measurement == ("cudnn", None, None, 20.0, 3)
    assert [c.failure for c in result.candidates] == ["OutOfResources", "CompilationError", "no"]

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measuring, "reference", out_of_memory)
    assert measure(problem("up"), TILES, DEVICE, ToldClock()).failure == "out of memory"


def test_an_error_without_a_message(monkeypatch):
    def failing(*_):
        raise AssertionError

    result = measure(problem("up"), [], DEVICE, ToldClock(20.0))
    assert result.measurement == ("cudnn", None, None, 20.0, 3)
    run = measuring.run
    monkeypatch.setattr(measuring, "run", lambda p, c, t: failing() if c.implementation == "triton" else run(p, c, t))
    result = measure(problem("up"), TILES[:1], DEVICE, ToldClock(20.0))
    assert result.candidates[0].failure.startswith("AssertionError")


def test_errors_are_relative_to_the_largest_value():
    exact = (torch.tensor([0.0, 4.0]),)
    assert errors((torch.tensor([1.0, 4.0]),), exact) == [0.25]
    assert errors((torch.zeros(3),), exact) == [float("inf")]
    assert errors((torch.tensor([float("nan"), 4.0]),), exact)[0] != 0.25


def test_float32_stays_as_the_user_set_it():
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision, torch.backends.cudnn.benchmark
    with measuring._without_tf32():
        assert conv.fp32_precision == "ieee" and not torch.backends.cudnn.benchmark
    assert (conv.fp32_precision, torch.backends.cudnn.benchmark) == before


@pytest.mark.gpu
def test_clock():
    x = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    one = Clock().time(lambda i: y.copy_(x))
    two = Clock().time(lambda i: (y.copy_(x), y.copy_(x)))
    assert two == pytest.approx(2 * one, rel=0.2)
    tiny = Clock().time(lambda i: y[:16].copy_(x[:16]))
    assert tiny < 8.0, "Python's pace must not show"
