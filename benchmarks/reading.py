"""Reading the JSON of `pytest benchmarks/` and of `python -m benchmarks.profiling`, and refusing any other."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from fastgan.ops.tables import slug

PROFILE_SUFFIX = "-profile"
# What the tables read of an entry's extra_info: of every group, and of some.
_FIELDS = ("variant", "batch", "dtype", "device", "torch")
_FIELDS_OF = {
    "train step": ("image_size", "flops_per_image", "bytes_per_image", "bytes_per_step"),
    "layers": ("layer", "direction", "microseconds", "flops", "bytes"),
    "models": ("network", "image_size", "microseconds"),
    "losses": ("loss", "launched", "microseconds"),
}
_NUMBERS = {"batch", "image_size", "images_per_sec", "microseconds", "flops", "bytes"} | set(_FIELDS_OF["train step"])


def is_cpu(device):
    """Whether a device of that name is one; GPUs have the names that torch gives them."""
    return device.startswith("CPU")


@dataclass
class Run:
    """One run of the benchmarks on one device: ``entries`` are dicts of what each benchmark noted, with ``group`` and
    ``seconds`` (the median of a call); ``not_run`` has the same without times, and ``reason``."""

    device: str
    date: str
    torch: str
    triton: str | None
    entries: list = field(default_factory=list)
    not_run: list = field(default_factory=list)

    @property
    def name(self):
        """The device's name as a file name."""
        return slug(self.device)

    @property
    def on_gpu(self):
        return not is_cpu(self.device)

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

    @property
    def name(self):
        return slug(self.device) + PROFILE_SUFFIX


def load(path):
    """The Run or the Profile in a JSON file.

    Raises:
        ValueError: there is no such file, or it is neither.
    """
    content = _json(path)
    if isinstance(content, dict) and "profiles" in content:
        return _profile(path, content)
    if isinstance(content, dict) and isinstance(content.get("benchmarks"), list):
        return _run(path, content)
    raise ValueError(f"{path} is no JSON of pytest-benchmark (it has no list named benchmarks), and no profile either")


def load_folder(folder):
    """(Runs, Profiles, names of JSON files that are neither) in a folder, by file name.

    Raises:
        ValueError: a file of ours is broken, or two are from one device.
    """
    runs, profiles, others, known = [], {}, [], {}
    for path in sorted(Path(folder).glob("*.json")):
        content = _json(path)
        if not (isinstance(content, dict) and ("benchmarks" in content or "profiles" in content)):
            others.append(path.name)
            continue
        loaded = load(path)
        if loaded.name in known:
            raise ValueError(f"{known[loaded.name]} and {path} are both from {loaded.device}: remove one of them")
        known[loaded.name] = path
        if isinstance(loaded, Run):
            runs.append(loaded)
        else:
            profiles[slug(loaded.device)] = loaded
    return runs, profiles, others


def _json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
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
    if not entries:
        raise ValueError(f"{path} holds no timings: every benchmark was skipped or failed")
    devices = sorted({entry["device"] for entry in entries})
    if len(devices) > 1:
        raise ValueError(f"{path} must come from one device; it has {', '.join(devices)}")
    first = entries[0]
    date = str(content.get("datetime", ""))[:10] or "of unknown date"
    return Run(first["device"], date, first["torch"], first.get("triton"), entries, not_run)


def is_timed(group, about):
    """Whether a benchmark of a group has its result in what it noted about itself."""
    return group == "ceilings" or bool(about.get("images_per_sec"))


def _entry(path, benchmark):
    try:
        name = benchmark["name"]
        entry = {**benchmark["extra_info"], "group": benchmark["group"], "seconds": float(benchmark["stats"]["median"])}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds a benchmark that is incomplete: {error!r}") from error
    has_speed = bool(entry.get("images_per_sec"))
    needed = _FIELDS + (_FIELDS_OF.get(entry["group"], ()) if has_speed else ())
    missing = [key for key in needed if key not in entry]
    if missing:
        raise ValueError(f"{path}: benchmark {name} has no {', '.join(missing)} in its extra_info: is it one of ours?")
    for key in sorted(_NUMBERS & entry.keys()) if has_speed else ():
        if not _is_number(entry[key]) and (key, entry[key]) != ("image_size", None):
            raise ValueError(f"{path}: {key} of benchmark {name} must be a number; got {entry[key]!r}")
    return entry


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def _profile(path, content):
    try:
        for row in content["profiles"]:
            for key in ("variant", "batch", "image_size", "step_us", "kernel_us", "launches", "gpu_busy"):
                row[key]
        date = str(content["datetime"])[:10]
        return Profile(content["device"], date, content["torch"], content.get("triton"), content["profiles"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is a profile that is incomplete: {error!r}") from error
