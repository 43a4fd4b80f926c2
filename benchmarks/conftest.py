"""Options of `pytest benchmarks/`, and what its JSON says beyond the timings: the machine, and what could not run.

An illegal access to memory, unlike other errors, leaves a process without its GPU, and all its later benchmarks would
fail for nothing. The run then stops, its JSON says `broke_off`, and `--go-on` does the rest in a new process.
"""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import timing
from benchmarks.reading import is_timed
from fastgan.training import keep_freed_memory

NOT_RUN = pytest.StashKey[list]()
BROKE_OFF = pytest.StashKey[bool]()
EARLIER = pytest.StashKey[dict]()


def pytest_addoption(parser):
    group = parser.getgroup("fastgan")
    group.addoption("--full", action="store_true", help="every batch and image size; some twenty minutes on a GPU")
    group.addoption("--go-on", metavar="JSON", help="do what the run that wrote JSON left undone, and keep what it did")


def _earlier(config):
    """The results in the file that --go-on names, {"benchmarks": entries, "not_run": entries}."""
    path = config.getoption("--go-on", default=None)
    if path is None:
        return {"benchmarks": [], "not_run": []}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        earlier = {kind: content[kind] for kind in ("benchmarks", "not_run")}
        of = {name: content["machine_info"][name] for name in timing.versions()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise pytest.UsageError(f"--go-on: {path} is no JSON of an earlier run: {error!r}") from error
    if of != timing.versions():
        raise pytest.UsageError(f"--go-on: {path} is of {of}, and this run of {timing.versions()}")
    return earlier


def pytest_collection_modifyitems(config, items):
    earlier = config.stash[EARLIER] = _earlier(config)
    done = {entry["fullname"] for entries in earlier.values() for entry in entries}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


@pytest.fixture(scope="session", autouse=True)
def _settings():
    """What every variant may count on: all batches have one shape, so cuDNN may look for its best algorithms, and the
    process keeps its memory, as ``scripts/train.py`` has it on a CPU."""
    if not timing.ON_GPU:
        keep_freed_memory()
    with timing.cudnn_benchmark(True):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Keep the reason of whatever was not timed: it belongs in the tables as much as the times do."""
    report = yield
    not_run = item.config.stash.setdefault(NOT_RUN, [])
    if report.outcome != "passed" and item.nodeid not in [entry["fullname"] for entry in not_run]:
        benchmark = getattr(item, "funcargs", {}).get("benchmark")
        entry = {"fullname": item.nodeid, "extra_info": dict(benchmark.extra_info) if benchmark else {}}
        entry["reason"] = _reason(call.excinfo)
        not_run.append(entry)
        if timing.gpu_is_lost() and item is not item.session.items[-1]:
            item.config.stash[BROKE_OFF] = True
            item.session.shouldstop = "this process has lost its GPU; --go-on does the rest in another"
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
    output_json["broke_off"] = config.stash.get(BROKE_OFF, False)
    # One that Ctrl-C broke off has no time.
    timed = [entry for entry in output_json["benchmarks"] if is_timed(entry["group"], entry["extra_info"])]
    output_json["benchmarks"] = timed
    for benchmark in timed:
        benchmark["stats"].pop("data", None)  # every single round: the file stays in the repository
    for kind, entries in config.stash[EARLIER].items():
        output_json[kind] = entries + output_json[kind]
