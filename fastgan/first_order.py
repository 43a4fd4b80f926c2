"""Whether fused modules may take it that nobody differentiates their gradients: see `first_order`."""

from fastgan.scopes import Scope

_first_order = Scope(False)


def first_order():
    """Within it fused modules prepare for gradients, but not for gradients of gradients, which then fail clearly.

    Where a fused convolution with an activation, a BatchNorm or both hands its result straight to another one, the
    input gradient of the second comes with the derivative of that activation in it and with the sums that the
    BatchNorm's backward needs, and the first does without a pass of its own for them.

    As `batch_groups` it is for what one thread calls, and for what its backward runs again (checkpointing): on a GPU
    that is a thread of autograd's.
    """
    return _first_order.holding(True)


def only_first_order():
    """Whether a `first_order` is in force."""
    return _first_order.current()
