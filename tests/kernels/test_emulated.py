"""Kernels as they are compiled for a GPU, with warps, barriers and asynchronous copies, in the emulator of PTX."""

import re

import pytest

from tests.kernels.test_compile import KERNELS
from tests.processes import run_compiling

pytestmark = pytest.mark.slow

# Tests that are quick to compile and to emulate: every kernel, wgmma and mma, and several blocks.
SELECTION = (
    "tests/kernels/test_tiles.py::test_every_tile[float16-64x64x64x4x4]",
    "tests/kernels/test_tiles.py::test_every_tile[float16-16x16x128x4x4]",
    "tests/kernels/test_tiles.py::test_every_tile[float16-128x128x64x4x4]",
    "tests/kernels/test_batch_groups.py::test_tiles_end_with_their_group",
    "tests/kernels/test_convolutions.py::test_several_tiles_in_every_direction",
    "tests/kernels/test_convolutions.py::test_batch_norm_of_activated_values[False-False-triton]",
    "tests/kernels/test_hybrid.py::test_statistics_of_several_tiles_and_blocks",
    "tests/kernels/test_hybrid.py::test_images_in_eval_mode",
    "tests/kernels/test_special_layers.py::test_image_layers[(7, 4, (6, 5), 3, 3, 1, 2)-torch.float16]",
    "tests/kernels/test_special_layers.py::test_weight_gradients_of_image_layers"
    "[(7, 4, (6, 5), 3, 3, 1, 2)-torch.float16]",
    "tests/kernels/test_special_layers.py::test_layers_that_see_an_image[(5, 3, (9, 8), 3, 1, 1)-torch.float16]",
    "tests/kernels/test_special_layers.py::test_layers_of_one_output_channel[(64, (6, 5), 4, 1, 1)-torch.float16]",
    "tests/kernels/test_special_layers.py::test_tf32_is_rounded_to_nearest",
    "tests/kernels/test_losses.py::test_discriminator_loss",
    "tests/kernels/test_next_batch.py::test_equals_torch_bit_for_bit",
    "tests/test_weight_copies.py::test_one_launch_casts_all",
    "tests/kernels/test_adam.py",
)


def test_every_kernel_emulated():
    done = run_compiling("-m", "pytest", "-p", "tests.emulator.plugin", "-p", "no:cacheprovider", *SELECTION)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    emulated = re.search(r"kernels emulated for sm_\d+: (.*)", done.stdout).group(1)
    assert KERNELS <= set(re.findall(r"\w+_kernel", emulated)), emulated


def test_costs_of_a_block():
    done = run_compiling("-m", "tests.emulator.costs", "--batch", "264", "--only", "down to one")
    assert done.returncode == 0, done.stderr[-2000:]
    layer, kernel, blocks, issue, shared, matrix, l2 = re.split(r"  +", done.stdout.splitlines()[1])
    assert (layer, kernel, float(blocks), float(matrix)) == ("down to one", "down_single", 2.0, 0.0)
    # An image of 512×4×4 numbers and as large a weight: 32 KB through L2, in and out of shared memory.
    assert abs(float(l2) - 2 * 32768 / 64 / 1755) < 0.1
    assert float(shared) > 2 * 2 * 32768 / 128 / 1755
    assert float(issue) > 0


def test_costs_refuses_what_it_cannot_count():
    for arguments, message in (
        (("--batch", "3"), "even number of images"),
        (("--only", "x"), "must be part of one of"),
    ):
        done = run_compiling("-m", "tests.emulator.costs", *arguments)
        assert done.returncode == 2 and message in done.stderr
