"""Measuring one Problem: what is right first, and then what is fast."""

import math
import statistics
import time
from collections import deque
from contextlib import contextmanager
from typing import NamedTuple

import torch

from fastgan.checks import in_short
from fastgan.ops.choice import Choice
from fastgan.ops.tables import Measurement
from fastgan.tune.workloads import DTYPES, operands, reference, run

ROUNDS = 5
ROUND_MS = 0.8  # of GPU time, in some 3 to 30 calls
MOST_BUFFERS = 16
SUMMATION_TOLERANCE = 1e-5  # float32 sums of thousands of products in another order than the reference's
STATISTICS_TOLERANCE = 1e-3  # they are float32 sums, but cuDNN's are of rounded values


class Candidate(NamedTuple):
    """A tile that was tried: its time, or why it cannot be chosen."""

    tile: object
    us: float
    failure: str = ""


class Result(NamedTuple):
    """What came of one Problem."""

    measurement: Measurement | None
    candidates: list
    failure: str = ""


def measure(problem, tiles, device, clock, compile_error=lambda tile: None):
    """The Result of a Problem on a GPU.

    A candidate must be as accurate as cuDNN is (twice its error, and a little, against float32) before it is timed.

    Args:
        tiles: the MatrixTiles to try.
        device: of the GPU.
        clock: a Clock.
        compile_error: tile → why it could not be compiled, or None; waits for the compiler.
    """
    try:
        return _measure(problem, tiles, device, clock, compile_error)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return Result(None, [], "out of memory")
    except RuntimeError as error:
        if _is_fatal(error):
            raise
        return Result(None, [], in_short(error))


def _measure(problem, tiles, device, clock, compile_error):
    tensors = operands(problem, device)
    with _without_tf32():
        exact = reference(problem, tensors)
    cudnn = run(problem, Choice("cudnn"), tensors)
    # The first result is rounded to the Problem's dtype; the others, statistics, are not.
    rounding = max(4 * torch.finfo(DTYPES[problem.dtype]).eps, SUMMATION_TOLERANCE)
    slack = [rounding, *[STATISTICS_TOLERANCE] * (len(exact) - 1)]
    allowed = [2 * error + more for error, more in zip(errors(cudnn, exact), slack, strict=True)]
    if not all(map(math.isfinite, allowed)):
        return Result(None, [], "cuDNN's result is not finite")
    checked = [_check(problem, tile, tensors, exact, allowed, compile_error(tile)) for tile in tiles]
    shapes = [tensor.shape for tensor in exact]
    del exact, cudnn

    # Operands that fit in the cache would be found there; in training other layers' data come between.
    bytes_touched = sum(t.nbytes for t in tensors) + sum(s.numel() for s in shapes) * tensors[0].element_size()
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    buffers = min(MOST_BUFFERS, math.ceil(2 * cache / bytes_touched)) if bytes_touched < cache else 1
    sets = [tensors, *(operands(problem, device, seed=seed) for seed in range(1, buffers))]

    best, timed = math.inf, []
    for tile, failure in checked:
        if not failure:
            choice = Choice("triton", tile._asdict())
            us = clock.time(lambda i, choice=choice: run(problem, choice, sets[i]), buffers, hopeless=1.3 * best)
            best = min(best, us)
        timed.append(Candidate(tile, math.inf if failure else us, failure))
    winner, tile, ours_us = min(timed, key=lambda candidate: candidate.us, default=None), None, None
    if winner is not None and not winner.failure:
        # Once more, beside cuDNN: the least of many times is that of the luckiest.
        tile = winner.tile._asdict()
        ours_us = clock.time(lambda i: run(problem, Choice("triton", tile), sets[i]), buffers)
    cudnn_us = clock.time(lambda i: run(problem, Choice("cudnn"), sets[i]), buffers)
    implementation = "triton" if ours_us is not None and ours_us <= cudnn_us else "cudnn"
    return Result(Measurement(implementation, tile, ours_us, cudnn_us, problem.batch), timed)


def _check(problem, tile, tensors, exact, allowed, failure):
    """(tile, why it is no candidate or "")."""
    if failure:
        return tile, failure
    try:
        # The allocator gives this memory to the results: what a kernel leaves unwritten is NaN.
        poison = [torch.full_like(tensor, math.nan, dtype=tensors[0].dtype) for tensor in exact[:1]]
        del poison
        results = run(problem, Choice("triton", tile._asdict()), tensors)
        pairs = zip(errors(results, exact), allowed, strict=True)
        wrong = [f"{error:.1e} > {limit:.1e}" for error, limit in pairs if not error <= limit]
        return tile, f"wrong result: error {', '.join(wrong)}" if wrong else ""
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if _is_fatal(error):
            raise RuntimeError(f"{problem} in the tile {tile}: {in_short(error)}") from error
        return tile, in_short(error)


def _is_fatal(error):
    """After such an error CUDA works no more in this process."""
    return any(words in str(error) for words in ("illegal memory access", "misaligned address", "launch failure"))


def errors(results, exact):
    """Of each result the largest difference from the exact one, in units of that one's largest value."""
    found = []
    for result, expected in zip(results, exact, strict=True):
        if result.shape != expected.shape:
            found.append(math.inf)
            continue
        largest = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        found.append(((result.float() - expected).abs().max() / largest).item())
    return found


@contextmanager
def _without_tf32():
    """float32 as it is, and without a search for the fastest way to compute it once."""
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.benchmark
    cudnn.conv.fp32_precision, cudnn.benchmark = "ieee", False
    try:
        yield
    finally:
        cudnn.conv.fp32_precision, cudnn.benchmark = before


class Clock:
    """Times calls on the GPU alone: they wait in the stream behind a kernel that spins, and then run back to back.

    That is what a CUDA graph gives a training step, without a capture for each measurement.
    """

    CYCLES_PER_MS = 2_000_000  # no GPU's clock is faster, so that a spin lasts at least as long as asked

    def __init__(self):
        self._spin_ms = 1.0

    def time(self, call, buffers=1, *, hopeless=math.inf):
        """Median time of `call(i)`, i in range(buffers), in µs; one round only where it takes `hopeless` and more."""
        for i in range(min(buffers, 2)):
            call(i)
        torch.cuda.synchronize()
        first = self._round(call, buffers, 3)
        if first > hopeless:
            return first
        calls = max(3, min(30, round(ROUND_MS * 1000 / max(first, 1e-3))))
        return statistics.median(self._round(call, buffers, calls) for _ in range(ROUNDS))

    def _round(self, call, buffers, calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        results = deque(maxlen=buffers)  # kept, so that results go to different memory too
        for _ in range(6):
            torch.cuda._sleep(int(self._spin_ms * self.CYCLES_PER_MS))
            start.record()
            began = time.perf_counter()
            for i in range(calls):
                results.append(call(i % buffers))
            end.record()
            took_ms = (time.perf_counter() - began) * 1000
            waited = not start.query()  # else the GPU was there first, and waited for Python
            torch.cuda.synchronize()
            self._spin_ms = min(100.0, max(0.2, 1.5 * took_ms, 0.0 if waited else 2 * self._spin_ms))
            if waited:
                break
        return start.elapsed_time(end) * 1000 / calls
