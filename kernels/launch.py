"""What every launch has in common: the device, the compiler options, and the sizes of tiles."""

import threading
from contextlib import nullcontext
from typing import NamedTuple

import torch

from fastgan import backend

INT32_ELEMENTS = 2**31  # tensors of more elements need 64-bit offsets
FEWEST_READERS = 1024  # programs that only read: a few for each multiprocessor of a large GPU
MOST_PARTS = 512  # partial results that one launch puts together

thread = threading.local()  # .on_launch: what this thread calls at each launch, if anybody wants to know
stood_in = False  # whether all kernels are started by something else: see `offline.started_by`

DEFAULTS = dict(num_warps=4, num_stages=2)  # of what is compiled and started without saying so


def launch(kernel, grid, *args, device, **options):
    """Start `kernel` on the device that holds its tensors, which need not be the current one.

    Args:
        options: its compile-time constants, and those of DEFAULTS that are to be others.
    """
    options = {**DEFAULTS, **compiler_options(_capability(device)), **options}
    with on(device):
        compiled = kernel[grid](*args, **options)
    report(kernel, compiled, grid, args, options)


def compiler_options(capability):
    """What every kernel is compiled and started with on a GPU of this compute capability, 90 for sm_90.

    From that one on, kernels that follow each other in a stream start while the one before ends, and wait for its end
    before they touch memory: CUDA's programmatic dependent launch (see `wait_for_previous` in pieces.py).
    """
    # Fused multiply-add is named explicitly because Triton's default for it differs between releases.
    return dict(enable_fp_fusion=True, **(dict(launch_pdl=True) if capability >= 90 else {}))


def _capability(device):
    """10 · major + minor of a GPU of NVIDIA's; 0 for another, and where Triton interprets."""
    return backend.capability(device.index) if device.type == "cuda" else 0


def report(*launched):
    """Say that a kernel was started: (kernel, compiled or None where Triton interprets, grid, args, options)."""
    if on_launch := getattr(thread, "on_launch", None):
        on_launch(*launched)


def on(device):
    """A context in which `device` is the current one, if it is a GPU."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


class MatrixTile(NamedTuple):
    """One program's share of a matrix product: block_m × block_n outputs, block_k of the sum at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    # Of a weight gradient only: its sum over positions is cut into parts until each multiprocessor has programs for
    # `share` times 128×128 outputs.
    share: int = 2
    # Of `up` and `down`: whether its rows are one position of block_m images, where these divide a batch, and not
    # positions in a row. Taps that lie outside of the image are then left out.
    by_position: bool = False

    def __str__(self):
        return "×".join(map(str, self[:6])) + (" by position" if self.by_position else "")

    def options(self):
        """The tile as keyword arguments of a launch."""
        blocks = dict(BLOCK_M=self.block_m, BLOCK_N=self.block_n, BLOCK_K=self.block_k)
        return dict(blocks, num_warps=self.num_warps, num_stages=self.num_stages)

    def has_room(self):
        """Whether threads have 64 outputs at most, for an epilogue that needs as many registers again, and more."""
        return self.block_m * self.block_n <= 64 * 32 * self.num_warps

    def rows_again(self):
        """Of a tile without room: the rows that its threads take again at a time, 16 numbers each."""
        return max(1, 16 * 32 * self.num_warps // self.block_n)

    def with_room(self):
        """The same, or a smaller one, with room: what nobody has tuned."""
        if self.has_room():
            return self
        if self.num_warps < 8:
            return self._replace(num_warps=8)
        longer = "block_m" if self.block_m >= self.block_n else "block_n"
        return self._replace(**{longer: getattr(self, longer) // 2}).with_room()


# What a tuner may try, by the operands' bytes an element. Each fits in Hopper's shared memory and spills no registers
# in any of the matrix kernels, statistics included (tests/kernels/test_compile.py).
TILES = {
    2: (
        MatrixTile(128, 128, 64, 4, 3),
        MatrixTile(128, 128, 64, 4, 4),
        MatrixTile(128, 128, 64, 8, 3),
        MatrixTile(256, 128, 64, 8, 3),
        MatrixTile(256, 128, 64, 8, 4),
        MatrixTile(128, 256, 64, 8, 3),
        MatrixTile(128, 256, 64, 8, 4),
        MatrixTile(256, 64, 64, 4, 3),
        # Two programs on a multiprocessor, where the one above leaves room for one.
        MatrixTile(256, 64, 64, 4, 2),
        MatrixTile(256, 64, 32, 4, 4),
        MatrixTile(256, 64, 64, 8, 3),
        MatrixTile(128, 64, 64, 4, 3),
        MatrixTile(128, 64, 64, 4, 4),
        MatrixTile(128, 64, 64, 8, 3),
        MatrixTile(128, 64, 64, 8, 4),
        MatrixTile(64, 128, 64, 4, 4),
        # Where a multiprocessor has one program only, more of its steps under way.
        MatrixTile(128, 64, 64, 4, 6),
        MatrixTile(128, 128, 64, 8, 6),
        MatrixTile(64, 64, 64, 4, 4),
        MatrixTile(64, 64, 128, 4, 3),
        MatrixTile(64, 32, 64, 4, 4),
        MatrixTile(16, 16, 128, 4, 4),
    ),
    4: (
        MatrixTile(128, 128, 32, 8, 3),
        MatrixTile(128, 64, 32, 4, 3),
        MatrixTile(128, 64, 32, 8, 3),
        MatrixTile(64, 128, 32, 8, 3),
        MatrixTile(64, 64, 32, 4, 3),
        MatrixTile(64, 64, 32, 4, 4),
        MatrixTile(16, 16, 64, 4, 4),
    ),
}
WINDOW = 2**24  # bytes that tiles side by side may read again and again, of an L2 cache of some 50 MB
FEWEST_PROGRAMS = 100  # what should run side by side on a large GPU before a program takes more


def matrix_tile(rows, columns, depth, dtype, copies):
    """An untuned tile for a (rows × depth) · (depth × columns) product; 16 is the least that matrix units take.

    Args:
        copies: how many such products run side by side.
    """
    half = dtype.itemsize == 2
    block_m = clamped_power_of_2(rows, 16, 128)
    block_n = clamped_power_of_2(columns, 16, 128)
    block_k = clamped_power_of_2(depth, 16, 64 if half else 32)
    # Hopper's matrix units take 64 rows at least; a handful of columns is bound by memory, not by them.
    fewest_rows = 64 if block_n >= 64 else 16
    wanted = FEWEST_PROGRAMS / (copies * cdiv(columns, block_n))
    while block_m > fewest_rows and cdiv(rows, block_m) < wanted:
        block_m //= 2
    # Float32 operands pass through registers to be rounded to TF32: they need more threads.
    return MatrixTile(block_m, block_n, block_k, 8 if not half and block_m * block_n >= 128 * 128 else 4, 3)


def geometry(low, weight, high, stride, padding):
    """The compile-time constants that every convolution kernel takes: with the sizes among them, the many divisions
    that find an image and a position from a row are multiplications, and shifts where sizes are powers of two."""
    a, b, kh, kw = weight.shape
    sizes = dict(H=low.shape[2], W=low.shape[3], HO=high.shape[2], WO=high.shape[3])
    return dict(A=a, B=b, KH=kh, KW=kw, SH=stride[0], SW=stride[1], PH=padding[0], PW=padding[1], **sizes)


def blocks_together(block_m, images, row_bytes):
    """`together` of `rows_of_tile` for tiles of one position of block_m images.

    Args:
        images: of one group; block_m divides them.
        row_bytes: what is read of an image for a row of positions.
    """
    return max(1, min(WINDOW // (block_m * row_bytes), images // block_m))


def rows_tile(rows, columns):
    """(block_rows, block_columns) for passes over a (rows, columns) matrix: some 4,096 elements a program."""
    block_columns = clamped_power_of_2(columns, 1, 128)
    return clamped_power_of_2(rows, 1, 4096 // block_columns), block_columns


def reduction_tile(rows, columns):
    """(block_rows, block_columns) for sums over many rows of activations: small, so that many loads are in flight."""
    return clamped_power_of_2(rows, 1, 32), clamped_power_of_2(columns, 1, 64)


def warps_for(block_rows, block_columns):
    """The warps of a program that changes such a block in place: four, or as many as it has elements for.

    More would do again what others do, and might read what those have already changed.
    """
    return clamped_power_of_2(block_rows * block_columns // 32, 1, 4)


def merge_tile(parts, columns):
    """(block_parts, block_columns) for putting (parts, columns) partial results together.

    Up to MOST_PARTS at once, by narrow programs: that takes less than a second launch.
    """
    block_parts = next_power_of_2(parts) if parts <= MOST_PARTS else 64
    return block_parts, clamped_power_of_2(columns, 1, max(16, 4096 // block_parts))


def statistics_tile(rows, columns, groups):
    """(block_rows, block_columns, blocks a program) to read `groups` matrices of (rows, columns) once.

    8,192 elements at a time, 128 bytes and more of a row: that keeps enough loads in flight. Small matrices are cut
    finer, so that every multiprocessor has work; of large ones a program takes several blocks, to leave few tiles.
    """
    block_columns = clamped_power_of_2(columns, 1, 64)
    block_rows = clamped_power_of_2(rows, 1, 8192 // block_columns)
    across = groups * cdiv(columns, block_columns)
    while block_rows > 16 and across * cdiv(rows, block_rows) < FEWEST_READERS:
        block_rows //= 2
    blocks = 1
    while across * cdiv(rows, 2 * blocks * block_rows) >= 2 * FEWEST_READERS:
        blocks *= 2
    return block_rows, block_columns, min(blocks, 16)


def needs_int64(*tensors):
    """Whether element offsets into any of the tensors pass 2^31."""
    return any(tensor.numel() >= INT32_ELEMENTS for tensor in tensors)


# Triton has both of these for kernels too, and takes a few microseconds for each call because of it.
def cdiv(n, divisor):
    """n / divisor, rounded up."""
    return -(-n // divisor)


def next_power_of_2(n):
    """The power of two at or above n, 1 at least."""
    return 1 << max(n - 1, 0).bit_length()


def clamped_power_of_2(n, least, most):
    """The power of two at or above n, within these bounds, powers of two themselves."""
    return min(max(next_power_of_2(n), least), most)


def empty_nhwc(shape, like):
    """An unwritten (N, C, H, W) tensor in channels_last memory, with the dtype and device of `like`."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def channels_last(tensor):
    """The tensor in channels_last memory: for a weight, (A, KH, KW, B), where each tap's matrix is as it stands."""
    return tensor.contiguous(memory_format=torch.channels_last)
