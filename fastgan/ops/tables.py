"""Measured convolutions as they are kept in files: one JSON object for each, readable by people."""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fastgan.checks import is_integer
from fastgan.files import write_text

_FORMAT = 1
_OPERATIONS = {"weight_grad", "weight_grad+float32"} | {
    kind + then for kind in ("up", "down") for then in ("", "+statistics", "+epilogue", "+activated", "+normalized")
}
_TILE = ("block_m", "block_n", "block_k", "num_warps", "num_stages")


class Problem(NamedTuple):
    """One convolution of one size, named as the kernels name things (see `fastgan.kernels`)."""

    kind: str  # "up", "down" or "weight_grad", also with "+" and what follows: see `then`
    dtype: str  # "bfloat16", "float16", "float32", or "tf32" where float32 may be multiplied as TF32
    batch: int
    low: tuple[int, int]  # height and width of the two ends
    high: tuple[int, int]
    a: int  # channels of the low end
    b: int  # channels of the high end
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @property
    def operation(self):
        """The kind without what follows the convolution."""
        return self.kind.partition("+")[0]

    @property
    def then(self):
        """What follows the convolution: "statistics"; "epilogue" (bias, eval-mode BatchNorm, activation); "activated",
        the derivative of an activation that the gradient goes back through; "normalized", that and the sums of the
        BatchNorm before it; or "". Of a weight gradient in half precision "float32", if it is to come out in that."""
        return self.kind.partition("+")[2]

    @property
    def layer(self):
        """The same without its batch."""
        return self._replace(batch=0)

    def __str__(self):
        return f"{self.shape} {self.kind} {self.dtype} batch {self.batch}"

    @property
    def shape(self):
        """The layer's geometry: channels@size of both ends, kernel, stride and padding."""
        low, high = (f"{channels}@{h}×{w}" for channels, (h, w) in ((self.a, self.low), (self.b, self.high)))
        numbers = (str(x) if x == y else f"{x},{y}" for x, y in (self.kernel, self.stride, self.padding))
        return "{} {} k{} s{} p{}".format(low, high, *numbers)


class Measurement(NamedTuple):
    """What was measured of a Problem, in microseconds, and what follows from it."""

    implementation: str  # "triton" or "cudnn"
    tile: Mapping | None  # the fastest right tile of ours, whether it won or not: keyword arguments of MatrixTile
    triton_us: float | None  # None where no tile of ours was right
    cudnn_us: float
    batch: int


def slug(gpu):
    """The name of a GPU as a file name: "NVIDIA H100 80GB HBM3" → "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def read_table(path, gpu=None, versions=None):
    """{Problem: Measurement} of a file; nothing where there is none.

    A file that is not such a table, or is that of another GPU than `gpu` or of other `versions` (see `write_table`)
    where these are given, is ignored with a warning that names it.
    """
    table, why = load_table(path, gpu, versions)
    if why is not None:
        warnings.warn(f"ignoring the table of measured convolutions {path}: {why}", RuntimeWarning, stacklevel=2)
    return table


def why_no_table(path, gpu=None):
    """Why `read_table` would ignore a file, in words; None where it would not."""
    return load_table(Path(path), gpu)[1]


def load_table(path, gpu=None, versions=None):
    """What `read_table` gives, and why it ignores the file, in words, or None: without a warning."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        _check(isinstance(table, dict) and table.get("format") == _FORMAT, f'"format" is not {_FORMAT}')
        _check(gpu is None or table.get("gpu") == gpu, f"it was measured on {table.get('gpu')!r}")
        for name, version in (versions or {}).items():
            _check(table.get(name) == version, f"it was measured with {name} {table.get(name)}, not {version}")
        return dict(_parse(row) for row in table["measurements"]), None
    except (FileNotFoundError, NotADirectoryError):
        return {}, None
    except KeyError as error:
        return {}, f"KeyError: {error}"
    except (OSError, ValueError, TypeError) as error:
        return {}, str(error)


def _check(right, message):
    if not right:
        raise ValueError(message)


def _parse(row):
    """(Problem, Measurement) of one row."""
    kind, implementation, tile, cudnn_us = (row[name] for name in ("kind", "implementation", "tile", "cudnn_us"))
    triton_us = row["triton_us"]
    _check(kind in _OPERATIONS, f"unknown kind {kind!r}")
    _check(implementation in ("triton", "cudnn"), f"unknown implementation {implementation!r}")
    if tile is not None:
        counts = [*(tile[name] for name in _TILE), tile.get("share", 2)]
        _check(all(map(_is_count, counts)) and isinstance(tile.get("by_position", False), bool), f"no tile: {tile!r}")
    _check(triton_us is not None or implementation == "cudnn", "our kernel is chosen, but its time is missing")
    batch, a, b = (row[name] for name in ("batch", "a", "b"))
    _check(_is_count(batch) and _is_count(a) and _is_count(b), f"no counts: batch {batch!r}, a {a!r}, b {b!r}")
    pairs = [_pair(row[name]) for name in ("low", "high", "kernel", "stride", "padding")]
    problem = Problem(kind, str(row["dtype"]), batch, *pairs[:2], a, b, *pairs[2:])
    triton_us = None if triton_us is None else float(triton_us)
    return problem, Measurement(implementation, tile, triton_us, float(cudnn_us), batch)


def _is_count(value):
    return is_integer(value) and value > 0


def _pair(value):
    _check(len(value) == 2 and all(is_integer(n) and n >= 0 for n in value), f"no pair of sizes: {value!r}")
    return tuple(value)


def write_table(path, gpu, versions, measurements):
    """Write {Problem: Measurement} as the table of `gpu`; at no moment does `path` hold half a table.

    Args:
        versions: {"torch": "2.11.0", …}: what it was measured with.
    """
    head = {"format": _FORMAT, "gpu": gpu, **versions}
    rows = [json.dumps(_row(problem, measured), ensure_ascii=False) for problem, measured in measurements.items()]
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    text = "\n".join(["{", *lines, '  "measurements": [', ",\n".join(f"    {row}" for row in rows), "  ]", "}", ""])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def _row(problem, measured):
    """kind, shape, and what was measured, in this order."""
    times = {"triton_us": measured.triton_us, "cudnn_us": measured.cudnn_us}
    times = {name: None if time is None else round(time, 2) for name, time in times.items()}
    return {**problem._asdict(), "implementation": measured.implementation, "tile": measured.tile, **times}
