"""Every kernel compiles for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")
KERNELS = {
    "up_kernel",
    "down_kernel",
    "weight_grad_kernel",
    "sum_rows_kernel",
    "merge_statistics_kernel",
    "normalize_activate_kernel",
    "batch_norm_grad_sums_kernel",
    "batch_norm_input_grad_kernel",
    "activation_input_grad_kernel",
    "bce_kernel",
    "update_running_kernel",
    "next_batch_kernel",
}


@pytest.mark.parametrize("capability, instruction", ((80, "mma.sync"), (90, "wgmma.mma_async")))
def test_compiles(capability, instruction):
    # Another process: in this one the interpreter has taken the place of the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for dtype in ("float32", "float16", "bfloat16"):
        compiled = [row for row in rows if row["dtype"] == dtype]
        assert {row["kernel"] for row in compiled} == KERNELS
        assert all(row["cubin_bytes"] > 0 for row in compiled)
        matrix = [row for row in compiled if row["kernel"] in ("up_kernel", "down_kernel", "weight_grad_kernel")]
        # Tensor cores: on Hopper only tiles of 64 rows and more take wgmma, and these all have them.
        assert all(instruction in row["matrix_instructions"] for row in matrix), matrix
