"""Whether fused modules may take it that nobody differentiates their gradients: see `first_order`."""

from contextlib import contextmanager

_only_first_order = False


@contextmanager
def first_order():
    """Within it fused modules prepare for gradients, but not for gradients of gradients, which then fail clearly.

    Where a fused convolution with an activation, a BatchNorm or both hands its result straight to another one, the
    input gradient of the second comes with the derivative of that activation in it and with the sums that the
    BatchNorm's backward needs, and the first does without a pass of its own for them.
    """
    global _only_first_order
    before, _only_first_order = _only_first_order, True
    try:
        yield
    finally:
        _only_first_order = before


def only_first_order():
    """Whether a `first_order` is in force."""
    return _only_first_order
