"""Pieces that several kernels share: activations, the epilogue of a convolution, statistics of a tile."""

import triton
import triton.language as tl

from fastgan.backend import interpreted

NOWHERE = tl.constexpr(-(2**30))  # a position that lies outside of every image, whatever tap is added to it


@triton.jit
def _wait_for_previous():
    """Wait for the end of the kernels before; when all programs of this one have come so far, the next may start."""
    if tl.target_info.cuda_capability_geq(9, 0):  # as `launch.compiler_options` has it
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _starts_in_turn():
    pass


# The first thing in every kernel.
wait_for_previous = _starts_in_turn if interpreted() else _wait_for_previous


@triton.jit
def program_from_the_end(AXIS: tl.constexpr):
    """This program's number along AXIS, counted from the last one.

    A convolution writes its first rows first. A pass over a result that is larger than L2 begins where it ended, with
    what is still there, and leaves the first rows in L2 for the next convolution.
    """
    return tl.num_programs(AXIS) - 1 - tl.program_id(AXIS)


@triton.jit
def steps_of(steps, MOST: tl.constexpr, images):
    """The number of steps of a loop, MOST at most, for `images` ≥ 1; where they are many, hidden from the compiler.

    ptxas unrolls a loop of some 8 to 16 steps if it knows how many, and takes up to 70 registers more for it: one
    program less on a multiprocessor. A loop of one step or two is best known to be that.
    """
    return steps * tl.minimum(images, 1) if MOST > 4 else steps


@triton.jit
def load_block(pointers, row_ok, column_ok):
    """A (rows, columns) block, zero where a row or a column is not there; None: all of them are."""
    if row_ok is None:
        if column_ok is None:
            block = tl.load(pointers)
        else:
            block = tl.load(pointers, mask=column_ok[None, :], other=0.0)
    elif column_ok is None:
        block = tl.load(pointers, mask=row_ok[:, None], other=0.0)
    else:
        block = tl.load(pointers, mask=row_ok[:, None] & column_ok[None, :], other=0.0)
    return block


@triton.jit
def round_to_tf32(x):
    """The nearest TF32 value: tensor cores drop the 13 low bits of a float32, and that bias would add up."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < float("inf"), rounded, x)  # NaN and infinity stay what they are


@triton.jit
def new_accumulator(ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Zeros for a (ROWS, COLUMNS) sum, or for its transpose.

    Hopper's matrix units leave a thread few of their result's first dimension and many of its second. With the rows
    second, sums over rows are made in registers, and a column's bias, mean and so on are few values to keep. That takes
    64 columns at least, and 16-bit operands, which may lie either way in shared memory.
    """
    if TRANSPOSED:
        acc = tl.zeros((COLUMNS, ROWS), tl.float32)
    else:
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    return acc


@triton.jit
def multiply_add(acc, x, y, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """acc + x · y in float32, where TRANSPOSED says that acc is that sum's transpose."""
    if PRECISION == "tf32" and x.dtype == tl.float32:
        x, y = round_to_tf32(x), round_to_tf32(y)
    if TRANSPOSED:
        acc = tl.dot(tl.trans(y), tl.trans(x), acc, input_precision=PRECISION)
    else:
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    return acc


@triton.jit
def tanh(z):
    # exp(−2|z|) never overflows; near zero, where 1 − t would cancel, the Taylor series is exact to float32.
    t = tl.exp(-2.0 * tl.abs(z))
    away = (1.0 - t) / (1.0 + t)
    z2 = z * z
    near = tl.abs(z) * (1.0 + z2 * (-1.0 / 3.0 + z2 * (2.0 / 15.0 - z2 * (17.0 / 315.0))))
    magnitude = tl.where(tl.abs(z) < 0.2, near, away)
    return tl.where(z < 0.0, -magnitude, magnitude)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """act(z) in float32. The comparisons let NaN through, so that a diverged network stays visible."""
    if ACTIVATION == "relu":
        z = tl.where(z <= 0.0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z <= 0.0, z * SLOPE, z)
    elif ACTIVATION == "tanh":
        z = tanh(z)
    elif ACTIVATION == "sigmoid":
        z = tl.sigmoid(z)
    return z


@triton.jit
def through_activation(grad, out, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """grad · act'(z) from out = act(z): all four activations can tell act' from their output (for SLOPE ≥ 0).

    As in ATen relu selects: nothing of an infinite gradient comes through where z < 0, and NaN lets all of it through.
    """
    if ACTIVATION == "relu":
        grad = tl.where(out <= 0.0, 0.0, grad)
    elif ACTIVATION == "leaky_relu":
        grad = tl.where(out > 0.0, grad, grad * SLOPE)
    elif ACTIVATION == "tanh":
        grad = grad * (1.0 - out * out)
    elif ACTIVATION == "sigmoid":
        grad = grad * (out * (1.0 - out))
    return grad


@triton.jit
def channel_vector(ptr, columns, column_ok, default):
    """A per-channel vector as a (1, BLOCK) float32 row."""
    return tl.load(ptr + columns, mask=column_ok, other=default).to(tl.float32)[None, :]


@triton.jit
def normalize(y, mean_ptr, invstd_ptr, columns, column_ok):
    """x̂ = (y − mean) · invstd. Subtracting before scaling keeps its precision where |mean| ≫ std."""
    return (y - channel_vector(mean_ptr, columns, column_ok, 0.0)) * channel_vector(invstd_ptr, columns, column_ok, 1.0)


@triton.jit
def scale_and_shift(x_hat, gamma_ptr, beta_ptr, columns, column_ok):
    """γ·x̂ + β, where a missing γ is 1 and a missing β is 0."""
    z = x_hat
    if gamma_ptr is not None:
        z = z * channel_vector(gamma_ptr, columns, column_ok, 1.0)
    if beta_ptr is not None:
        z = z + channel_vector(beta_ptr, columns, column_ok, 0.0)
    return z


@triton.jit
def conv_epilogue(
    acc,
    bias_ptr,
    mean_ptr,
    var_ptr,
    gamma_ptr,
    beta_ptr,
    eps,
    columns,
    column_ok,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """act(BatchNorm(acc + bias)) with known statistics; without a mean there is no BatchNorm."""
    if bias_ptr is not None:
        acc += channel_vector(bias_ptr, columns, column_ok, 0.0)
    if mean_ptr is not None:
        invstd = 1.0 / tl.sqrt_rn(channel_vector(var_ptr, columns, column_ok, 1.0) + eps)
        acc = (acc - channel_vector(mean_ptr, columns, column_ok, 0.0)) * invstd
        acc = scale_and_shift(acc, gamma_ptr, beta_ptr, columns, column_ok)
    return activate(acc, ACTIVATION, SLOPE)


@triton.jit
def column_sums(x, ACROSS_WARPS: tl.constexpr = True):
    """The sums of a tile over its rows. ACROSS_WARPS: the rows lie in several warps; that takes a few registers more.

    Between warps `sum` alone would hand over what a thread has, eight neighbouring columns, through one bank of shared
    memory. So a thread first adds up its own rows, and a gather of everything from its own place gives columns side by
    side to threads side by side.
    """
    if ACROSS_WARPS:
        COLUMNS: tl.constexpr = x.shape[1]
        PARTS: tl.constexpr = 16 if x.shape[0] > 16 else x.shape[0]
        parts = tl.sum(tl.reshape(x, (x.shape[0] // PARTS, PARTS, COLUMNS)), 0)
        parts = tl.gather(tl.reshape(parts, (PARTS * COLUMNS,)), tl.arange(0, PARTS * COLUMNS), 0)
        x = tl.reshape(parts, (PARTS, COLUMNS))
    return tl.sum(x, 0)


@triton.jit
def position(row, count_h, count_w, first_h, first_w, SH: tl.constexpr, SW: tl.constexpr):
    """(image, height, width) of rows that are count_h × count_w positions of each image, SH and SW apart.

    `maximum` keeps the divisions defined where an image has none.
    """
    per_row, per_image = tl.maximum(count_w, 1), tl.maximum(count_h * count_w, 1)
    return row // per_image, first_h + (row % per_image) // per_row * SH, first_w + row % per_row * SW


@triton.jit
def rows_of_tile(
    tile,
    N,
    count_h,
    count_w,
    first_h,
    first_w,
    SH: tl.constexpr,
    SW: tl.constexpr,
    together,
    BLOCK_M: tl.constexpr,
    BY_POSITION: tl.constexpr,
):
    """The rows of a tile, where rows are the positions of N images: see `position`.

    They follow each other or, BY_POSITION, are one position of BLOCK_M images, whose number divides N. Such tiles of
    `together` blocks of images run side by side, one position after the other, so that they share in L2 what they read.
    The last positions are those of an edge: with the fewest taps inside of the image they fill what is left at the end.

    Returns:
        The first row, from one row to the next; the rows, whether they are there, their images, heights and widths.
    """
    lane = tl.arange(0, BLOCK_M)
    if BY_POSITION:
        step = count_h * count_w
        first_block = tile // (together * step) * together
        blocks = tl.minimum(N // BLOCK_M - first_block, together)
        tile -= first_block * step
        place, block = tile // blocks, first_block + tile % blocks
        first = block * BLOCK_M * step + (place // count_w + 1) % count_h * count_w + (place % count_w + 1) % count_w
        ok = tl.full((BLOCK_M,), True, tl.int1)
        n, h, w = position(first, count_h, count_w, first_h, first_w, SH, SW)
        n += lane
    else:
        first, step = tile * BLOCK_M, 1
        ok = first + lane < N * count_h * count_w
        n, h, w = position(first + lane, count_h, count_w, first_h, first_w, SH, SW)
    return first, step, first + lane * step, ok, n, h, w


@triton.jit
def mean_and_m2(values, ok, count, ACROSS_WARPS: tl.constexpr = False):
    """Mean and centred sum of squares of each column, over its `count` rows that are ok.

    ACROSS_WARPS: a column's rows lie in several warps, as after a load; not so in a transposed accumulator.
    """
    rows = tl.maximum(count, 1.0)
    rough = column_sums(tl.where(ok, values, 0.0), ACROSS_WARPS) / rows
    centred = tl.where(ok, values - rough[None, :], 0.0)
    # The sum's own rounding error is what the centred values still average to.
    rest = column_sums(centred, ACROSS_WARPS) / rows
    return rough + rest, column_sums(centred * centred, ACROSS_WARPS) - rows * rest * rest


@triton.jit
def store_tile_statistics(
    acc,
    row_ok,
    count,
    tile,
    columns,
    column_ok,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    count_ptr,
    mean_ptr,
    m2_ptr,
):
    """Write a tile's count, mean and centred sum of squares per channel while it is still in registers.

    Rows past the end are masked before each sum; merge_statistics puts the tiles together. Where several columns are of
    one channel (COLUMNS is a multiple of CHANNELS), each is a tile of its own to that.
    """
    # count: (tiles,), mean, m2: (tiles, COLUMNS)
    mean, m2 = mean_and_m2(acc, row_ok[:, None], count)
    tl.store(mean_ptr + tile * COLUMNS + columns, mean, mask=column_ok)
    tl.store(m2_ptr + tile * COLUMNS + columns, m2, mask=column_ok)
    parts: tl.constexpr = COLUMNS // CHANNELS
    for part in range(parts):
        tl.store(count_ptr + tile * parts + part, count)
