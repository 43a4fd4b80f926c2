"""What the compiler made of every kernel, for a GPU that need not be there: registers, spills, memory, instructions."""

import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from fastgan.checks import in_short
from fastgan.kernels import adam, batch_norm, cast, data, losses, running, statistics
from fastgan.kernels.offline import compile_launch, record
from fastgan.ops.choice import Choice
from fastgan.ops.tables import read_table
from fastgan.tune.compiling import launches, prepare, usable_cores
from fastgan.tune.workloads import problems_of

# Of one multiprocessor: bytes of shared memory, and of those the most that one program can have.
_SHARED = {80: (164 << 10, 163 << 10), 90: (228 << 10, 227 << 10), 100: (228 << 10, 227 << 10)}
TARGETS = tuple(_SHARED)
_BATCH = 128  # of the defaults
_REGISTERS, _WARPS, _PROGRAMS, _SHARED_RESERVED = 65536, 64, 32, 1024  # the same on all of them


def launches_of_tables(paths):
    """The Launches of every configuration in the tables: of each Problem with our fastest tile, whoever won."""
    found = []
    for path in paths:
        for problem, measured in read_table(path).items():
            if measured.tile is not None:
                found += launches(problem, Choice("triton", measured.tile))
    return found


def launches_of_defaults(dtypes):
    """The Launches of every kernel as a training step of the DCGAN has them: default tiles, and all other passes."""
    found = []
    for problem in problems_of(("dcgan64",), (_BATCH,), dtypes):
        found += launches(problem, Choice("triton")) + launches(problem, Choice("cudnn"))
    for dtype in dtypes:
        found += record(lambda dtype=dtype: _passes(dtype))
    return found


def _passes(dtype):
    """The kernels around the convolutions."""
    with torch.device("meta"):
        y = torch.empty(_BATCH, 64, 32, 32, dtype=dtype).to(memory_format=torch.channels_last)
        logits, vector = torch.empty(_BATCH, dtype=dtype), torch.empty(64)
        images, order = torch.empty(1000, 64, 64, 3, dtype=torch.uint8), torch.empty(1000, dtype=torch.int32)
        act = dict(activation="relu", slope=0.0)
        batch_norm.normalize_activate(y, vector, vector, vector, vector, **act)
        batch_norm.batch_norm_grad(y, y, vector, vector, vector, vector, batch_statistics=True, **act)
        batch_norm.activation_input_grad(y, y, activation="tanh", slope=0.0)
        statistics.tile_statistics(y, vector, activation="leaky_relu", slope=0.2)
        statistics.merge_statistics(statistics.TileStatistics.empty(2, 2000, 64, y.device), 1e-5)
        running.update_running(vector, vector, torch.empty(2, 64), torch.empty(2, 64), None, 0.1)
        cast.Cast()([torch.empty(64, 8)], [torch.empty(64, 8, dtype=dtype)])
        averaged = [[torch.empty(64, 8)] for _ in range(4)]
        adam.AdamUpdate()(*averaged, [torch.empty(())], lr=torch.empty(()), betas=(0.5, 0.999), eps=1e-8)
        losses.bce(logits, logits, 1.0, 0.0, dtype)
        losses.bce(logits, None, 1.0, 0.0, dtype)
        drawn = torch.empty(data.programs(_BATCH, images), dtype=torch.int32)
        data.next_batch(images, order, None, drawn, _BATCH, dtype)
        data.next_batch(images, order, order.to(torch.uint8), drawn, _BATCH, dtype)


def _plain(value):
    """A compile-time constant as JSON has it: Triton's own dtypes by their names."""
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def inspect(found, capability, processes=None):
    """[dict] of each different kernel among the Launches `found`, compiled for `capability` (90 for sm_90)."""
    different = list({launch.key: launch for launch in found}.values())
    pool = ProcessPoolExecutor(
        processes or usable_cores(), get_context("spawn"), initializer=prepare, initargs=(capability,)
    )
    with pool:
        return list(pool.map(_report, different, [capability] * len(different)))


def _report(launch, capability):
    """What is known of one kernel; of one that does not compile, `error` says why."""
    dtype = next((value for value in launch.arguments if isinstance(value, torch.dtype)), None)
    row = dict(
        kernel=launch.kernel,
        config={name: _plain(value) for name, value in launch.options.items()},
        dtype=str(dtype).removeprefix("torch."),
        target=f"sm_{capability}",
    )
    try:
        compiled = compile_launch(launch)
    except Exception as error:
        return {**row, "error": in_short(error)}
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    registers, spilled = _resources(compiled.asm["cubin"])
    return dict(
        row,
        registers=registers,
        spill_bytes=spilled,
        shared_bytes=shared,
        matrix_instruction=_first(ptx, {"wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05", "mma.sync": "mma"}),
        async_copy=_first(ptx, {"cp.async.bulk": "tma", "cp.async": "cp.async"}),
        occupancy=_occupancy(capability, registers, shared, compiled.metadata.num_warps),
    )


def _first(ptx, names):
    """The name of the first instruction that occurs in the code, or None."""
    return next((name for instruction, name in names.items() if instruction in ptx), None)


def _resources(cubin):
    """(registers of a thread, bytes of its stack: nothing but spilled registers is kept there)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _occupancy(capability, registers, shared, warps):
    """The share of a multiprocessor's warps that can be there at once; 0.0 where not even one program fits."""
    total, most = _SHARED[capability]
    if shared > most:
        return 0.0
    of_warp = -(-registers * 32 // 256) * 256  # registers are handed out in 256s
    programs = min(_PROGRAMS, _WARPS // warps, _REGISTERS // (of_warp * warps), total // (shared + _SHARED_RESERVED))
    return round(programs * warps / _WARPS, 3)
