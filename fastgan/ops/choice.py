"""Which implementation computes a convolution: our Triton matrix kernel or cuDNN, shape by shape, as it was measured.

The tables are `kernels/configs/<gpu>.json`, measured by `python -m fastgan.tune`; the user's own, in
`$FASTGAN_CACHE`, `$XDG_CACHE_HOME/fastgan` or `~/.cache/fastgan`, wins over the one that is shipped. A batch that
was not measured takes the choice of the nearest measured one of the same layer, if that is within a factor of two.
For everything else cuDNN with our fused passes around it is the safe choice.
"""

import functools
import os
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch

from fastgan import backend
from fastgan.ops.tables import Problem, read_table, slug

# Of a Problem that was not measured with what follows it: by how much our kernel, which has that inside, may be slower
# than cuDNN, which needs a pass of its own. On the way back to an activation the pass is worth 40 % of ours; on the way
# back to BatchNorm our epilogue takes about as long as the pass (both as an H200's table has it). For an epilogue that
# reads nothing but vectors cuDNN stays the safe choice.
LEADS = {"epilogue": 1.0, "activated": 1.3, "normalized": 1.0, "float32": 1.05}
FARTHEST_BATCH = 2  # the largest factor between a batch and the measured one whose choice it takes


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


def weight_grad_problem(low, high, weight, stride, padding):
    kind = "weight_grad" if weight.dtype == low.dtype else "weight_grad+float32"
    return _problem(kind, low, weight, low.shape[2:], high.shape[2:], stride, padding)


def _problem(kind, x, weight, low, high, stride, padding):
    a, b, *kernel = weight.shape
    where = (tuple(kernel), tuple(stride), tuple(padding))
    return Problem(kind, dtype_name(x.dtype), x.shape[0], tuple(low), tuple(high), a, b, *where)


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
    measured = find(_tables(gpu), problem)
    if forced:
        tile = measured.tile if measured is not None else None
        return Choice("triton", tile, "FASTGAN_BACKEND=triton")
    if measured is not None:
        return Choice(measured.implementation, measured.tile, _why(measured, problem))
    if has_table(gpu):
        return Choice("cudnn", None, f"not in the table of {gpu}: cuDNN is the safe choice")
    return Choice("cudnn", None, f"no table of {gpu} (python -m fastgan.tune measures one): cuDNN is the safe choice")


def _why(measured, problem):
    if measured.triton_us is None:
        return f"cuDNN {measured.cudnn_us:.1f} µs, no right kernel of ours, at batch {measured.batch}"
    at = f"at batch {measured.batch}" + (", the nearest measured" if measured.batch != problem.batch else "")
    return f"ours {measured.triton_us:.1f} µs, cuDNN {measured.cudnn_us:.1f} µs {at}"


def has_table(gpu):
    """Whether any convolution was measured on a GPU of this name."""
    return bool(_tables(gpu))


def find(table, problem):
    """The measurement that decides `problem`, or None.

    That of the same layer at the same batch; else at the nearest batch, by their quotient and up to FARTHEST_BATCH (of
    two as near the larger). With something that follows, and was not measured with it, that without, but for LEADS; a
    weight gradient that was measured in float32 only, that.
    """
    batches = table.get(problem.layer)
    if batches is None and problem.kind == "weight_grad":
        batches = table.get(problem.layer._replace(kind="weight_grad+float32"))
    if batches is None:
        if problem.then not in LEADS:
            return None
        plain = find(table, problem._replace(kind=problem.operation))
        if plain is None or plain.triton_us is None:
            return plain
        ours = plain.triton_us <= LEADS[problem.then] * plain.cudnn_us
        return plain._replace(implementation="triton" if ours else "cudnn")
    if problem.batch in batches:
        return batches[problem.batch]

    def distance(batch):
        return max(batch, problem.batch) / min(batch, problem.batch), -batch

    nearest = min(batches, key=distance)
    return batches[nearest] if distance(nearest)[0] <= FARTHEST_BATCH else None


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
