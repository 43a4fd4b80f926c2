"""What a table of measured convolutions says of one that may not be in it.

That of the same layer is taken as it is. What was measured of a convolution like it decides for ours only if ours was
ahead by a MARGIN for each way in which the two differ. Between the tables of an H100 and an H200, whose memory is half
again as fast, the lead of ours differs by 16 % at most; and each row of either table told from the other rows, ours is
never chosen where it is 3 % slower (tests/ops/test_nearest.py).
"""

import math
from typing import NamedTuple

from fastgan.ops.tables import Measurement, Problem

# Of a Problem that was not measured with what follows it: by how much our kernel, which has that inside, may be slower
# than cuDNN, which needs a pass of its own. On the way back to an activation the pass is worth 40 % of ours; on the way
# back to BatchNorm our epilogue takes about as long as the pass (both as an H200's table has it). For an epilogue that
# reads nothing but vectors cuDNN stays the safe choice.
LEADS = {"epilogue": 1.0, "activated": 1.3, "normalized": 1.0, "float32": 1.05}
FARTHEST_BATCH = 2  # the largest factor between a batch and the measured one whose choice it takes
FARTHEST_SIZE = 2  # and between heights, or widths: a program of an image's layers takes whole rows
MARGIN = 1.25
MOST_DIFFERENCES = 3
MOST_NARROW = 8  # channels of high: MOST_CHANNELS of kernels/narrow.py
_HALF = {"float16", "bfloat16"}


class Evidence(NamedTuple):
    """A measurement, what it was measured of, and in how many ways that differs from what was asked for."""

    measurement: Measurement
    problem: Problem
    differences: int = 0

    @property
    def implementation(self):
        """Ours, "triton", if that was the faster and, of another convolution, by far enough; else "cudnn"."""
        measured = self.measurement
        if self.differences and measured.implementation == "triton":
            return "triton" if measured.triton_us * MARGIN**self.differences <= measured.cudnn_us else "cudnn"
        return measured.implementation


def nearest(table, problem):
    """The Evidence in {layer: {batch: Measurement}} that decides `problem`, or None.

    It is of the same layer, or of one like it: a convolution of the same channels, kernel, stride and padding, at sides
    of half or twice the length, or in the other half precision. `differences` counts 1 for other sides, 1 for the other
    precision, and 1 for each factor of two beyond the first between the numbers of low positions (batch × height ×
    width).
    """
    if measured := find(table, problem):
        return Evidence(measured, problem._replace(batch=measured.batch))
    found = [
        Evidence(measured, like, differences)
        for measured, like in _alike(table, problem)
        if (differences := _differences(like, problem)) <= MOST_DIFFERENCES
    ]
    return min(found, key=lambda one: (one.differences, _factor(one.problem, problem)), default=None)


def find(table, problem):
    """The Measurement of the same layer that decides `problem`, or None.

    That at the same batch, else at the nearest one within a factor of FARTHEST_BATCH (of two as near, the larger). If
    the convolution was measured only without what follows it here: that, with ours chosen where it takes at most
    LEADS[problem.then] times as long as cuDNN, unless it was another kernel of ours. If a weight gradient was measured
    only with a float32 result: that.
    """
    batches = table.get(problem.layer)
    if batches is None and problem.kind == "weight_grad":
        batches = table.get(problem.layer._replace(kind="weight_grad+float32"))
    if batches is None:
        if problem.then not in LEADS or _is_of_another_kernel(problem):
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

    nearest_batch = min(batches, key=distance)
    return batches[nearest_batch] if distance(nearest_batch)[0] <= FARTHEST_BATCH else None


def _is_of_another_kernel(problem):
    """Whether our kernel for so few channels (single.py, narrow.py) does not do what follows the convolution here."""
    if problem.operation == "down":
        return problem.a == 1 and problem.then in ("activated", "normalized")
    return problem.operation == "up" and problem.b <= MOST_NARROW and problem.then == "normalized"


def _alike(table, problem):
    """(Measurement, Problem) of what is like `problem` in the table, each at a batch that was measured."""
    for layer, batches in table.items():
        like = layer._replace(kind=problem.kind)
        if _is_like(like, problem):
            for one in (like._replace(batch=batch) for batch in batches):
                if (measured := find(table, one)) and measured.batch == one.batch:
                    yield measured, one


def _is_like(layer, problem):
    one = problem._replace(batch=0, dtype=layer.dtype, low=layer.low, high=layer.high)
    return (
        one == layer
        and (layer.dtype == problem.dtype or {layer.dtype, problem.dtype} <= _HALF)
        # A single position is a matrix product, and stays one.
        and ((1, 1) == layer.low) == ((1, 1) == problem.low)
        and all(
            max(a, b) in (min(a, b), FARTHEST_SIZE * min(a, b)) for a, b in zip(layer.low, problem.low, strict=True)
        )
        and all(a * d == b * c for a, b, c, d in zip(layer.low, layer.high, problem.low, problem.high, strict=True))
    )


def _differences(like, problem):
    sizes, dtypes = (like.low, like.high) != (problem.low, problem.high), like.dtype != problem.dtype
    return sizes + dtypes + max(0, math.ceil(math.log2(_factor(like, problem))) - 1)


def _factor(like, problem):
    """By which the numbers of low positions of both differ."""
    here, there = (one.batch * math.prod(one.low) for one in (like, problem))
    return max(here, there) / min(here, there)
