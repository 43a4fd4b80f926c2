"""Where the time of a step goes, kernel by kernel, from torch.profiler's trace."""

import json
from collections import defaultdict
from pathlib import Path

import torch

_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


def profile(step, trace, *, step_seconds, steps=5):
    """Profile ``steps`` calls of ``step()``, which is warm, and keep the trace.

    Args:
        trace: where the Chrome trace (JSON) goes.
        step_seconds: what a step takes without the profiler, which slows the gaps between kernels down.

    Returns:
        ``summary`` of the trace.
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    Path(trace).parent.mkdir(parents=True, exist_ok=True)
    record.export_chrome_trace(str(trace))
    return summary(json.loads(Path(trace).read_text()), steps=steps, step_seconds=step_seconds)


def summary(trace, *, steps, step_seconds):
    """What a Chrome trace of ``steps`` equal steps says of one.

    Returns:
        dict: ``kernel_us``, name of a kernel → microseconds a step, longest first; ``launches``, kernels and copies a
        step; ``gpu_busy``, the share of an unprofiled step in which a kernel runs; ``gpu_busy_in_trace``, the same
        within the trace, whose gaps are longer than they are without the profiler.

    Raises:
        ValueError: the trace has no GPU work in it.
    """
    events = [e for e in trace.get("traceEvents", []) if e.get("ph") == "X" and e.get("cat") in _ON_GPU]
    if not events:
        raise ValueError("the trace has no kernels in it: was the profiler's CUDA activity on?")
    microseconds = defaultdict(float)
    for event in events:
        microseconds[event["name"]] += event["dur"] / steps
    longest_first = sorted(microseconds.items(), key=lambda item: -item[1])
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events)
    busy, wall = _union(spans), max(end for _, end in spans) - spans[0][0]
    return {
        "kernel_us": {name: round(value, 2) for name, value in longest_first},
        "launches": round(len(events) / steps),
        "gpu_busy": round(min(busy / steps / (step_seconds * 1e6), 1.0), 3),
        "gpu_busy_in_trace": round(busy / wall, 3),
    }


def _union(spans):
    """The total length of what sorted (start, end) spans cover."""
    covered, reached = 0.0, float("-inf")
    for start, end in spans:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
