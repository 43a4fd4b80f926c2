"""Every kernel compiles for GPUs that are not here."""

import json

import pytest

from tests.kernels.compile_kernels import MATRIX_KERNELS
from tests.processes import run_compiling

KERNELS = {
    "up_kernel",
    "up_narrow_kernel",
    "down_kernel",
    "down_single_kernel",
    "weight_grad_kernel",
    "weight_grad_narrow_kernel",
    "sum_rows_kernel",
    "merge_statistics_kernel",
    "tile_statistics_kernel",
    "normalize_activate_kernel",
    "batch_norm_grad_sums_kernel",
    "batch_norm_input_grad_kernel",
    "activation_input_grad_kernel",
    "bce_kernel",
    "cast_kernel",
    "adam_factors_kernel",
    "adam_kernel",
    "update_running_kernel",
    "next_batch_kernel",
    "conv_epilogue_kernel",
}


def compiled(*arguments, **variables):
    done = run_compiling("-m", "tests.kernels.compile_kernels", *arguments, **variables)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "dtype", (*(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("float32", "float16")), "bfloat16")
)
@pytest.mark.parametrize(
    "capability, instruction", (pytest.param(80, "mma.sync", marks=pytest.mark.slow), (90, "wgmma.mma_async"))
)
def test_compiles(capability, instruction, dtype):
    rows = compiled(str(capability), "--dtype", dtype)
    assert {row["kernel"] for row in rows} == KERNELS
    assert all(row["cubin_bytes"] > 0 for row in rows)
    # From sm_90 on a kernel starts before the one before has ended: it waits for that before it touches memory.
    assert all(row["waits_first"] == (capability >= 90) for row in rows)
    matrix = [row for row in rows if row["kernel"] in MATRIX_KERNELS]
    # Tensor cores: on Hopper only tiles of 64 rows and more take wgmma, and these all have them.
    assert all(instruction in row["matrix_instructions"] for row in matrix), matrix


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
@pytest.mark.parametrize("rows_are", ("rows", "positions"))
def test_every_tile_fits_hopper(rows_are, dtype):
    for row in compiled("90", "--tiles", rows_are, "--dtype", dtype):
        assert row["stack_bytes"] == 0, row  # no spilled registers
        assert row["shared_bytes"] <= 227 * 1024, row
        if row["kernel"] == "down_single_kernel":
            continue
        if row["tile"][2] != 1 and row["kernel"] != "up_narrow_kernel":  # these two have no loop to copy ahead in
            assert row["copy_bytes"] == [16], row
        if row["tile"][0] != 16:  # fewer rows than the matrix units of Hopper take
            assert row["matrix_instructions"] == ["wgmma.mma_async"], row
