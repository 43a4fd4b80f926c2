"""Which implementation computes a convolution: our Triton matrix kernel or cuDNN, shape by shape, as it was measured.

The tables are `kernels/configs/<gpu>.json`, measured by `python -m fastgan.tune`; the user's own, in
`$FASTGAN_CACHE`, `$XDG_CACHE_HOME/fastgan` or `~/.cache/fastgan`, wins over the one that is shipped. What is not in
them is decided by what is like it (`nearest.py`), on this GPU or on a relative. For everything else cuDNN with our
fused passes around it is the safe choice.
"""

import functools
import os
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch

from fastgan import backend
from fastgan.ops.nearest import nearest
from fastgan.ops.tables import Problem, read_table, slug

# The GPUs with a table that comes with fastgan, by compute capability. GPUs of the same one are relatives: they run the
# same machine code, with as much shared memory and as many registers for it.
RELATIVES = {90: ("NVIDIA H100 80GB HBM3", "NVIDIA H200")}


class Choice(NamedTuple):
    """How a Problem is computed, and why."""

    implementation: str  # "triton" or "cudnn"
    tile: dict | None = None  # the matrix kernel's tile, as keyword arguments of MatrixTile; None for its default
    why: str = ""


def dtype_name(dtype):
    """The name under which tables keep a dtype."""
    if dtype == torch.float32 and backend.matmul_precision(dtype) == "tf32":
        return "tf32"
    return str(dtype).removeprefix("torch.")


def conv_problem(x, weight, transposed, stride, padding, out_size, *, then=""):
    """The Problem of conv(x, weight) with a result of `out_size`; then: see `Problem.then`."""
    low, high = (x.shape[2:], out_size) if transposed else (out_size, x.shape[2:])
    kind = ("up" if transposed else "down") + (then and "+" + then)
    return _problem(kind, x, weight, low, high, stride, padding)


def what_follows(statistics, *epilogue):
    """`Problem.then` of a layer's forward, which takes `statistics` of the batch or does what is not None."""
    if statistics:
        return "statistics"
    return "" if all(part is None for part in epilogue) else "epilogue"


def weight_grad_problem(low, high, weight, stride, padding):
    """The Problem of the gradient for `weight`, in its dtype; see `fastgan.ops.convolution.conv_weight_grad`."""
    kind = "weight_grad" if weight.dtype == low.dtype else "weight_grad+float32"
    return _problem(kind, low, weight, low.shape[2:], high.shape[2:], stride, padding)


def _problem(kind, x, weight, low, high, stride, padding):
    a, b, *kernel = weight.shape
    sizes = (tuple(kernel), tuple(stride), tuple(padding))
    return Problem(kind, dtype_name(x.dtype), x.shape[0], tuple(low), tuple(high), a, b, *sizes)


def choose(problem, device):
    """The Choice for `problem` on `device`.

    Measured ones come from the tables; FASTGAN_BACKEND=triton takes our kernels everywhere, and so do tensors that
    are not on CUDA, where nothing but the kernels themselves is of interest. Meant to be called at every launch: after
    the first call with a problem it costs a look into a dictionary.
    """
    if device.type != "cuda":
        return _NOT_ON_CUDA
    index = torch.cuda.current_device() if device.index is None else device.index
    return _choose(problem, index, backend.forces_triton())


def forget():
    """Read the tables anew at the next choice."""
    global _generation
    _generation += 1
    _choose.cache_clear()
    _tables.cache_clear()


def generation():
    """Another number after each `forget`: choices of the same one do not change."""
    return _generation


_generation = 0
_NOT_ON_CUDA = Choice("triton", None, "the tensors are not on CUDA")


@functools.lru_cache(maxsize=4096)
def _choose(problem, index, forced):
    gpu = torch.cuda.get_device_name(index)
    found, relative = _nearest(problem, index)
    if forced:
        return Choice("triton", found and found.measurement.tile, "FASTGAN_BACKEND=triton")
    if found is not None:
        return Choice(found.implementation, found.measurement.tile, _why(found, problem, relative))
    if has_table(gpu):
        return Choice("cudnn", None, f"not in the table of {gpu}, and nothing near it is: cuDNN is the safe choice")
    return Choice("cudnn", None, f"no table of {gpu} (python -m fastgan.tune measures one): cuDNN is the safe choice")


def _nearest(problem, index):
    """(Evidence or None, the relative where it was measured or "") of what decides `problem` on GPU number `index`."""
    found = [(nearest(_tables(torch.cuda.get_device_name(index)), problem), "")]
    for relative in relatives(index):
        one = nearest(_tables(relative), problem)
        found.append((one and one._replace(differences=one.differences + 1), relative))
    return min((one for one in found if one[0]), key=lambda one: one[0].differences, default=(None, ""))


def relatives(index):
    """The names of other GPUs with a table that comes with fastgan, which GPU number `index` is like."""
    gpu = torch.cuda.get_device_name(index)
    return [name for name in RELATIVES.get(backend.capability(index), ()) if name != gpu]


def _why(found, problem, relative):
    measured, of = found.measurement, found.problem
    if measured.triton_us is None:
        why = f"cuDNN {measured.cudnn_us:.1f} µs, no right kernel of ours, at batch {of.batch}"
    else:
        why = f"ours {measured.triton_us:.1f} µs, cuDNN {measured.cudnn_us:.1f} µs at batch {of.batch}"
    if (of.low, of.high) != (problem.low, problem.high):
        why += f" of {of.shape}"
    if of.dtype != problem.dtype:
        why += f" in {of.dtype}"
    if relative:
        why += f" on {relative}"
    if of != problem:
        why += ", the nearest measured"
    if found.implementation != measured.implementation:
        why += ": not far enough ahead to rely on here"
    return why


def has_table(gpu):
    """Whether any convolution was measured on a GPU of this name."""
    return bool(_tables(gpu))


def user_table_path(gpu):
    """Where the user's own table of `gpu` is kept; None where the system knows of no home folder."""
    folder = os.environ.get("FASTGAN_CACHE")
    if not folder:
        try:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgan"
        except RuntimeError:  # in a container, of a user without a name
            return None
    return Path(folder) / f"{slug(gpu)}.json"


def shipped_table_path(gpu):
    """Where the table of `gpu` that comes with fastgan is, if there is one."""
    return files("fastgan.kernels") / "configs" / f"{slug(gpu)}.json"


def shipped_tables():
    """The paths of all tables that come with fastgan."""
    folder = files("fastgan.kernels") / "configs"
    found = [path for path in folder.iterdir() if path.name.endswith(".json")] if folder.is_dir() else []
    return sorted(found, key=lambda path: path.name)


@functools.cache
def _tables(gpu):
    """{layer: {batch: Measurement}}, the shipped table of `gpu` overlaid with the user's."""
    merged = {}
    for path in filter(None, (shipped_table_path(gpu), user_table_path(gpu))):
        for problem, measured in read_table(path, gpu).items():
            merged.setdefault(problem.layer, {})[problem.batch] = measured
    return merged
