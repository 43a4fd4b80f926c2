"""Where the time of a step goes, kernel by kernel: `python -m benchmarks.profiling FOLDER`, on a GPU.

Profiles the best stock step and the fused step and writes into the folder torch.profiler's traces and `profile.json`,
a summary of them. A process of its own, because a profiler that has run once can slow down what is timed after it.
"""

import argparse
import json
import sys
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks.stock import VARIANTS, WARM_UP, Setting
from benchmarks.timing import ON_GPU, clock, forget, versions

SETTING = Setting(64, 128)
PROFILED = ("compile-graph-bf16", "fused-bf16")
_STEPS = 5
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


def profile(step, trace, *, step_seconds):
    """Profile a few calls of ``step()``, which is warm, and keep the trace.

    Args:
        trace: where the Chrome trace (JSON) goes.
        step_seconds: what a step takes without the profiler, which slows the gaps between kernels down.

    Returns:
        ``summary`` of the trace.
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        for _ in range(_STEPS):
            step()
        torch.cuda.synchronize()
    Path(trace).parent.mkdir(parents=True, exist_ok=True)
    record.export_chrome_trace(str(trace))
    return summary(json.loads(Path(trace).read_text()), steps=_STEPS, step_seconds=step_seconds)


def summary(trace, *, steps, step_seconds):
    """What a Chrome trace of ``steps`` equal steps says of one.

    Returns:
        dict: ``kernel_us``, name of a kernel → microseconds a step, longest first, each kernel from when those before
        it have ended (it may start earlier, and wait); ``launches``, kernels and copies a step; ``gpu_busy``, the share
        of an unprofiled step in which a kernel runs; ``gpu_busy_in_trace``, the same within the trace, whose gaps are
        longer than they are without the profiler.

    Raises:
        ValueError: the trace has no GPU work in it.
    """
    events = [e for e in trace.get("traceEvents", []) if e.get("ph") == "X" and e.get("cat") in _ON_GPU]
    if not events:
        raise ValueError("the trace has no kernels in it: was the profiler's CUDA activity on?")
    microseconds, first = defaultdict(float), min(event["ts"] for event in events)
    ended = first
    for event in sorted(events, key=lambda event: event["ts"]):
        end = event["ts"] + event["dur"]
        microseconds[event["name"]] += max(0.0, end - max(event["ts"], ended)) / steps
        ended = max(ended, end)
    longest_first = sorted(microseconds.items(), key=lambda item: -item[1])
    busy, wall = steps * sum(microseconds.values()), ended - first
    return {
        "kernel_us": {name: round(value, 2) for name, value in longest_first},
        "launches": round(len(events) / steps),
        "gpu_busy": round(min(busy / steps / (step_seconds * 1e6), 1.0), 3),
        "gpu_busy_in_trace": round(busy / wall, 3),
    }


def profile_variant(variant, folder):
    """The ``summary`` of one variant's step, with what it says of every entry of a benchmark."""
    forget()
    images = SETTING.images()
    step = VARIANTS[variant](SETTING.networks(), images)
    for _ in range(WARM_UP):
        step(images)
    times = []
    for _ in range(20):
        start = clock()
        for _ in range(20):
            step(images)
        times.append((clock() - start) / 20)
    seconds = sorted(times)[len(times) // 2]
    trace = folder / f"{variant}-{SETTING}.json"
    row = {"variant": variant, "batch": SETTING.batch, "image_size": SETTING.image_size, "step_us": seconds * 1e6}
    return {**row, **profile(lambda: step(images), trace, step_seconds=seconds)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the traces and profile.json go")
    folder = parser.parse_args(argv).folder
    if not ON_GPU:
        print("error: there is no CUDA GPU to profile", file=sys.stderr)
        return 2
    torch.backends.cudnn.benchmark = True
    rows = []
    for variant in PROFILED:
        try:
            rows.append(profile_variant(variant, folder))
        except Exception as error:  # the other one is worth having
            print(f"{variant} could not be profiled: {type(error).__name__}: {error}", file=sys.stderr)
    if not rows:
        return 1
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "profile.json").write_text(json.dumps({"datetime": date, **versions(), "profiles": rows}, indent=1))
    print(f"{len(rows)} of {len(PROFILED)} steps profiled: {folder / 'profile.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
