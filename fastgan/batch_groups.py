"""In how many parts the BatchNorms of fused modules take a batch: see `batch_groups`."""

from fastgan.scopes import Scope

_groups = Scope(1)


def batch_groups(groups):
    """Within it, fused BatchNorms that take a batch's own statistics take it as that many equal parts, one by one.

    The results, the gradients and the running statistics are those of a call for each part, in that order. Only fused
    BatchNorms know of it: whoever uses it makes sure that the model holds no other layer that mixes images. It holds
    for calls of the thread that entered it, and for what their backward recomputes (checkpointing), although on a GPU
    autograd does that in another thread. Compiled code cannot tell threads apart, and obeys it in each.
    """
    return _groups.holding(groups)


def current_batch_groups():
    """What the innermost `batch_groups` says, 1 outside of any."""
    return _groups.current()
