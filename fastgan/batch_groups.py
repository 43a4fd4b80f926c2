"""In how many parts the BatchNorms of fused modules take a batch: see `batch_groups`."""

from contextlib import contextmanager

_groups = 1


@contextmanager
def batch_groups(groups):
    """Within it, fused modules in training take a batch as that many equal parts, one after the other.

    The results, the gradients and the running statistics are those of a call for each part, in that order. Only fused
    BatchNorms know of it: whoever uses it makes sure that the model holds no other layer that mixes images.
    """
    global _groups
    before, _groups = _groups, groups
    try:
        yield
    finally:
        _groups = before


def current_groups():
    """What the innermost `batch_groups` says, 1 outside of any."""
    return _groups
