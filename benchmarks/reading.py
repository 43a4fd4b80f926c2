"""Reading the JSON of `pytest benchmarks/` and of `python -m benchmarks.profiling`, and refusing any other."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from fastgan.ops.tables import slug

PROFILE_SUFFIX = "-profile"
# What the tables read of an entry's extra_info: of every group, of every one with a speed, and of some.
_FIELDS = ("variant", "dtype", "device", "torch")
_FIELDS_OF = {
    "train step": ("image_size", "flops_per_image", "bytes_per_image", "bytes_per_step"),
    "layers": ("layer", "direction", "microseconds", "flops", "bytes"),
    "models": ("network", "image_size", "microseconds"),
    "losses": ("loss", "launched", "microseconds"),
}
_FIELDS_OF_PROFILE = ("variant", "batch", "image_size", "step_us", "kernel_us", "launches", "gpu_busy")
_TEXTS = {*_FIELDS, "triton", "group", "note", "layer", "direction", "network", "loss", "launched"}
_POSITIVE = {"batch", "seconds", "images_per_sec", "tflops", "tb_per_sec", "step_us", "launches"}  # and finite
_POSITIVE |= {"against_eager", "eager_microseconds", "eager_images_per_sec"}
_POSITIVE |= {key for keys in _FIELDS_OF.values() for key in keys} - _TEXTS
_NUMBERS = {"peak_memory_mb", "gpu_busy", "gpu_busy_in_trace"}  # these may be 0


def is_cpu(device):
    """Whether a device of that name is one; GPUs have the names that torch gives them."""
    return device.startswith("CPU")


@dataclass
class BenchmarkRun:
    """One run of the benchmarks on one device: ``entries`` are dicts of what each benchmark noted, with ``group``,
    ``fullname`` and ``seconds`` (the median of a call); ``not_run`` has the same without times, and ``reason``;
    ``note`` is what somebody who changed the file by hand says of it."""

    device: str
    date: str
    torch: str
    triton: str | None
    entries: list = field(default_factory=list)
    not_run: list = field(default_factory=list)
    note: str | None = None

    @property
    def name(self):
        """The device's name as a file name."""
        return slug(self.device)

    @property
    def on_gpu(self):
        return not is_cpu(self.device)

    def lacks(self, other):
        """The groups of which another run has times, and of which no benchmark was even tried in this one."""
        groups, files = {e["group"] for e in self.entries}, {_file_of(e) for e in self.not_run}
        return sorted({e["group"] for e in other.entries if e["group"] not in groups and _file_of(e) not in files})

    def of(self, group, **wanted):
        """The entries of a group whose fields have these values."""
        return [e for e in self.entries if e["group"] == group and all(e.get(k) == v for k, v in wanted.items())]

    def steps_by_batch(self, image_size):
        """{variant: its training steps with images of this size, the smallest batch first}."""
        entries = sorted(self.of("train step", image_size=image_size), key=lambda e: e["batch"])
        variants = dict.fromkeys(e["variant"] for e in self.of("train step", image_size=image_size))
        return {variant: [e for e in entries if e["variant"] == variant] for variant in variants}

    def ceiling(self, name, dtype=None):
        """A measured ceiling ("tflops" of a dtype, or "tb_per_sec"), or None."""
        values = [e[name] for e in self.of("ceilings") if name in e and dtype in (None, e["dtype"])]
        return values[0] if values else None

    def arithmetic_ceiling(self, dtype):
        """The most TFLOP/s for numbers of a dtype, or None; half precision may be computed in float32."""
        own, of_float32 = (self.ceiling("tflops", name) for name in (dtype, "float32"))
        return own and max(own, of_float32 or own)


@dataclass
class Profile:
    """Where the time of some steps goes on one device; ``profiles`` are dicts as ``profiling.summary`` makes them."""

    device: str
    date: str
    torch: str
    triton: str | None
    profiles: list
    note: str | None = None

    @property
    def name(self):
        return slug(self.device) + PROFILE_SUFFIX


def load(path):
    """The BenchmarkRun or the Profile in a JSON file.

    Raises:
        ValueError: there is no such file, or it is neither.
    """
    content = _json(path)
    if isinstance(content, dict) and "profiles" in content:
        return _profile(path, content)
    if isinstance(content, dict) and isinstance(content.get("benchmarks"), list):
        return _run(path, content)
    raise ValueError(f"{path} is no JSON of pytest-benchmark (it has no list named benchmarks), and no profile either")


def load_folder(folder, new=None):
    """(Runs, Profiles, names of JSON files that are neither) in a folder, by file name.

    Args:
        new: {path in the folder: (file, what `load` made of it)} of files that are to be copied there, taken as if they
            were there already.

    Raises:
        ValueError: a file of ours is broken, or two are from one device.
    """
    runs, profiles, others, known, new = [], {}, [], {}, new or {}
    for path in sorted({*Path(folder).glob("*.json"), *new}):
        if path in new:
            path, loaded = new[path]
        else:
            content = _json(path)
            if not (isinstance(content, dict) and ("benchmarks" in content or "profiles" in content)):
                others.append(path.name)
                continue
            loaded = load(path)
        if loaded.name in known:
            raise ValueError(f"{known[loaded.name]} and {path} are both from {loaded.device}: remove one of them")
        known[loaded.name] = path
        if isinstance(loaded, BenchmarkRun):
            runs.append(loaded)
        else:
            profiles[slug(loaded.device)] = loaded
    return runs, profiles, others


def _json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def _run(path, content):
    entries = [_entry(path, benchmark) for benchmark in content["benchmarks"]]
    # What failed after its timing has no speed; its reason is in not_run.
    entries = [e for e in entries if is_timed(e["group"], e)]
    try:
        not_run = [
            {**(item["extra_info"] or {}), "fullname": str(item["fullname"]), "reason": str(item["reason"])}
            for item in content.get("not_run", [])
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} has a list named not_run that is not one of ours: {error!r}") from error
    for item in not_run:
        _check(path, f" of {item['fullname']} in not_run", item)
    if not entries:
        raise ValueError(f"{path} holds no timings: every benchmark was skipped or failed")
    devices = sorted({entry["device"] for entry in entries})
    if len(devices) > 1:
        raise ValueError(f"{path} must come from one device; it has {', '.join(devices)}")
    _check(path, "", content)
    first, date = entries[0], str(content.get("datetime", ""))[:10] or "of unknown date"
    return BenchmarkRun(
        first["device"], date, first["torch"], first.get("triton"), entries, not_run, content.get("note")
    )


def is_timed(group, about):
    """Whether a benchmark of a group has its result in what it noted about itself."""
    return group == "ceilings" or bool(about.get("images_per_sec"))


def _entry(path, benchmark):
    try:
        name = benchmark["name"]
        entry = {**benchmark["extra_info"], "group": benchmark["group"], "seconds": benchmark["stats"]["median"]}
        entry["fullname"] = str(benchmark.get("fullname", name))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds a benchmark that is incomplete: {error!r}") from error
    needed = ("group", "seconds", *_FIELDS)
    if entry.get("images_per_sec") is not None:
        needed += ("batch", *_FIELDS_OF.get(str(entry["group"]), ()))
    missing = [key for key in needed if key not in entry]
    if missing:
        raise ValueError(f"{path}: benchmark {name} has no {', '.join(missing)} in its extra_info: is it one of ours?")
    _check(path, f" of benchmark {name}", entry, needed)
    return entry


def _check(path, of, about, needed=()):
    """Refuse texts and numbers that are none, lest the tables break on them; null may stand where none is needed."""
    for key, value in about.items():
        if value is None and key not in needed:
            continue
        if key in _TEXTS and not (isinstance(value, str) and slug(value)):
            raise ValueError(f"{path}: {key}{of} must be a text of letters or digits; got {value!r}")
        if key in _POSITIVE and not (_is_number(value) and value > 0):
            raise ValueError(f"{path}: {key}{of} must be a positive number; got {value!r}")
        if key in _NUMBERS and not _is_number(value):
            raise ValueError(f"{path}: {key}{of} must be a number, 0 or more; got {value!r}")
        if key == "kernel_us" and not (isinstance(value, dict) and all(map(_is_number, value.values()))):
            raise ValueError(f"{path}: {key}{of} must have a number for each kernel; got {str(value)[:60]}")


def _is_number(value):
    """Whether it is a finite one, and not below 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _file_of(entry):
    """The file of a benchmark: benchmarks/bench_layers.py."""
    return entry["fullname"].partition("::")[0]


def _profile(path, content):
    try:
        for row in content["profiles"]:
            for key in _FIELDS_OF_PROFILE:
                row[key]
            _check(path, f" of the profile of {row['variant']}", row, _FIELDS_OF_PROFILE)
        _check(path, "", content, ("device", "torch"))
        about = content["device"], str(content["datetime"])[:10], content["torch"], content.get("triton")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is a profile that is incomplete: {error!r}") from error
    if not content["profiles"]:
        raise ValueError(f"{path} is a profile of no step at all")
    return Profile(*about, content["profiles"], content.get("note"))
