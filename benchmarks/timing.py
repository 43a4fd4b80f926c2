"""Clocks, graphs and memory: how every benchmark is measured.

Times are taken by pytest-benchmark with a clock that waits for the GPU, over rounds of many calls, after warm-up; the
figure to quote is the median. Memory is what torch's allocator held at its highest, less what it held before.
"""

import gc
import math
import platform
import statistics
import time
from contextlib import contextmanager
from importlib import metadata

import pytest
import torch

from fastgan.backend import HAS_TRITON, PRECISIONS
from fastgan.cpu.capabilities import lacks_avx512
from fastgan.training.graph import capturing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
SHORT = 2e-3  # seconds: calls that feel what ran right before them, by a percent or two
DTYPES = {name: PRECISIONS[name] for name in ("fp32", "bf16")}


@contextmanager
def cudnn_benchmark(enabled):
    """Within it cuDNN looks for its best algorithms, or does not."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def device_name():
    """The GPU's name, or "CPU, N threads of NAME", with what tells apart the kinds of CPU that have one name."""
    if ON_GPU:
        return torch.cuda.get_device_name()
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    return f"CPU, {torch.get_num_threads()} threads of {name}{_kind_of_cpu()}"


def _kind_of_cpu():
    """What an x86 CPU computes with, if that is not vectors of AVX-512 that know bfloat16."""
    capabilities = torch.cpu.get_capabilities()
    if lacks_avx512():
        return " without AVX-512"
    if capabilities.get("amx_tile"):
        return " with AMX"
    knows_bf16 = capabilities.get("architecture") != "x86_64" or capabilities.get("avx512_bf16")
    return "" if knows_bf16 else " without AVX-512 for bf16"


def versions():
    """What extra_info of every entry says about the machine: device, torch, triton."""
    triton = metadata.version("triton") if HAS_TRITON else None
    return {"device": device_name(), "torch": torch.__version__, "triton": triton}


def describe(benchmark, *, variant, batch, precision, image_size=None, **more):
    """Say what an entry is about, before anything can fail, so that a failure's record says it too."""
    dtype = str(DTYPES[precision]).removeprefix("torch.")
    benchmark.extra_info.update(variant=variant, batch=batch, image_size=image_size, dtype=dtype, **more, **versions())
    benchmark.extra_info.update(images_per_sec=None, peak_memory_mb=None)


def clock():
    """Seconds, once the GPU has done everything it was given. For ``pytest.mark.benchmark(timer=clock)``."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def gpu_is_lost():
    """Whether an error has left this process without its GPU: whatever it asks of it from now on fails."""
    try:
        clock()
    except RuntimeError:
        return True
    return False


def measure(benchmark, call, *, seconds=0.6, setup=None):
    """Time ``call()`` through pytest-benchmark.

    Args:
        benchmark: the fixture of a test that is marked with ``timer=clock``.
        call: warm already; works by itself, without arguments.
        seconds: about how long to measure.
        setup: called before every round and not timed; then a round is one call. For the CPU.

    Returns:
        median seconds per call.
    """
    probes = 3
    start = clock()
    for _ in range(probes):
        call()
    once = max((clock() - start) / probes, 1e-7)
    # On a GPU a round is long against the wait at its end, and has three calls at least, so that what Python does for
    # one call may go on beside the kernels of another. On a CPU nothing waits, but others take their turns with it:
    # there the median is of more and shorter rounds, over a longer time.
    fewest, round_seconds, least_seconds = (3, 0.02, seconds) if ON_GPU else (1, 0.002, 4 * seconds)
    iterations = 1 if setup else max(fewest, math.ceil(round_seconds / once))
    rounds = min(max(5, math.ceil(least_seconds / (once * iterations))), 400)
    benchmark.pedantic(call, setup=setup, rounds=rounds, iterations=iterations, warmup_rounds=1)
    if not benchmark.enabled:
        pytest.skip("timing is switched off (--benchmark-disable)")
    return benchmark.stats.stats.median


def measure_in_turn(benchmark, call, eager, *, seconds=0.6):
    """`measure` for a CPU, whose speed changes with whatever else it does: ``eager()`` runs before every ``call()``.

    Both then see the same machine, which two benchmarks need not. ``extra_info["against_eager"]`` gets the median of
    eager's time over call's, pair by pair. On a GPU, or where ``eager`` is None, it is `measure`.

    Returns:
        median seconds per call, and of ``eager()``; None for what did not run.
    """
    if ON_GPU or eager is None:
        return measure(benchmark, call, seconds=seconds), None
    times, start = [], clock()
    eager()
    is_short = clock() - start < SHORT

    def timed():
        if is_short:
            call()  # or pytest-benchmark's own work would come before eager, and eager before call
        start = clock()
        eager()
        times.append(clock() - start)

    median = measure(benchmark, call, seconds=seconds, setup=timed)
    ours = benchmark.stats.stats.data
    times = times[-len(ours) :]  # before these it ran for the warm-up
    benchmark.extra_info["against_eager"] = fixed(statistics.median(e / o for e, o in zip(times, ours, strict=True)))
    return median, statistics.median(times)


def fixed(value):
    """``value`` with four significant digits, for a JSON that people read."""
    return float(f"{value:.4g}")


def graphed(call, *, warm_up=3):
    """``call()`` captured in one CUDA graph: a function that replays it and returns the captured result.

    The warm-up, three calls at least, runs where a capture wants it: on a stream of its own.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        result = call()

    def replay():
        graph.replay()
        return result

    return replay


def in_fast_loop(call, inputs):
    """``call(*arguments)`` over a list of arguments as one function, a CUDA graph on a GPU, and the number of calls.

    With a graph around at least 20 calls, launching them does not count. ``inputs`` are gone through in turn; together
    they should be larger than the L2 cache (see ``copies_beyond_cache``).
    """
    calls = [inputs[i % len(inputs)] for i in range(max(20, len(inputs)))] if ON_GPU else inputs

    def all_calls():
        for arguments in calls:
            call(*arguments)

    return (graphed(all_calls) if ON_GPU else all_calls), len(calls)


def copies_beyond_cache(size):
    """How many inputs of ``size`` bytes to go through so that none is still in the L2 cache; at most 16."""
    if not ON_GPU:
        return 1
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return min(max(1, math.ceil(2 * cache / max(size, 1))), 16)


def forget():
    """Give back compiled code and memory of what was measured before."""
    torch._dynamo.reset()
    gc.collect()
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class PeakMemory:
    """The highest memory that a thing needs once it runs: ``before = PeakMemory()``, build it, then ``steady(call)``.

    What a CUDA graph uses while it replays, the allocator counted while it was captured and not since; so the peak of
    every capture in the ``with`` block is kept too. The warm-up's trials of cuDNN algorithms are not counted.
    """

    def __init__(self):
        self.before = torch.cuda.memory_allocated() if ON_GPU else 0
        self.captured = 0

    @contextmanager
    def watching_captures(self):
        """Within it the peak of each CUDA graph's capture counts."""
        begin, end = torch.cuda.CUDAGraph.capture_begin, torch.cuda.CUDAGraph.capture_end

        def capture_begin(graph, *args, **kwargs):
            torch.cuda.reset_peak_memory_stats()
            return begin(graph, *args, **kwargs)

        def capture_end(graph):
            self.captured = max(self.captured, torch.cuda.max_memory_allocated())
            return end(graph)

        torch.cuda.CUDAGraph.capture_begin, torch.cuda.CUDAGraph.capture_end = capture_begin, capture_end
        try:
            yield
        finally:
            torch.cuda.CUDAGraph.capture_begin, torch.cuda.CUDAGraph.capture_end = begin, end

    def steady(self, call):
        """MiB that ``call()`` needs at its highest, warm as it is by now; None on a CPU."""
        if not ON_GPU:
            return None
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        peak = max(self.captured, torch.cuda.max_memory_allocated())
        return round((peak - self.before) / 2**20, 1)
