"""Options of `pytest benchmarks/`, and what its JSON says beyond the timings: the machine, and what could not run."""

import pytest
import torch

from benchmarks import timing
from fastgan.training.allocation import keep_freed_memory

NOT_RUN = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("fastgan")
    group.addoption("--full", action="store_true", help="every batch and image size; some twenty minutes on a GPU")


@pytest.fixture(scope="session", autouse=True)
def _settings():
    """What every variant may count on: all batches have one shape, so cuDNN may look for its best algorithms, and the
    process keeps its memory, as ``scripts/train.py`` has it on a CPU."""
    if not timing.ON_GPU:
        keep_freed_memory()
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    yield
    torch.backends.cudnn.benchmark = before


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Keep the reason of whatever was not timed: it belongs in the tables as much as the times do."""
    report = yield
    if report.outcome != "passed":
        benchmark = getattr(item, "funcargs", {}).get("benchmark")
        entry = {"fullname": item.nodeid, "extra_info": dict(benchmark.extra_info) if benchmark else {}}
        entry["reason"] = _reason(call.excinfo)
        item.config.stash.setdefault(NOT_RUN, []).append(entry)
    return report


def _reason(excinfo):
    """The first line that says something, with the kind of error unless it is a plain refusal."""
    lines = [line.strip() for line in str(excinfo.value).splitlines() if line.strip()] or ["no message"]
    plain = excinfo.errisinstance((pytest.skip.Exception, pytest.fail.Exception, AssertionError))
    return (lines[0] if plain else f"{excinfo.typename}: {lines[0]}")[:300]


def pytest_benchmark_update_machine_info(config, machine_info):
    """The hardware and the versions; not whose machine it is."""
    machine_info.pop("node", None)
    machine_info.get("cpu", {}).pop("flags", None)
    machine_info.update(timing.versions())
    if timing.ON_GPU:
        memory = torch.cuda.get_device_properties(timing.DEVICE).total_memory
        machine_info.update(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), memory_mb=memory >> 20)


def pytest_benchmark_update_commit_info(config, commit_info):
    for name in ("project", "branch"):
        commit_info.pop(name, None)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["not_run"] = config.stash.get(NOT_RUN, [])
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)  # every single round: the file stays in the repository
