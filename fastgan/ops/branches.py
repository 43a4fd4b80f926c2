"""Kernels side by side in a captured step: a weight's gradient beside the input's, running statistics beside a layer.

Small batches leave multiprocessors idle at the end of every kernel. In a CUDA graph two kernels of which neither waits
for the other fill those gaps; launched one by one from Python they would cost more in events than they give.
"""

import os
from contextlib import contextmanager

import torch

# An experiment, not timed yet (kernels/NOTES.md).
ENABLED = os.environ.get("FASTGAN_BRANCHES") == "1"

_stream = None  # within `branching`: where the other branch runs
_forked = False  # whether anything runs there that `join` has not waited for
_kept = []  # what it reads


@contextmanager
def branching(stream):
    """Around a capture: `beside` puts kernels on this stream; None for no branches."""
    global _stream, _forked
    before, _stream = _stream, stream
    try:
        yield
    finally:
        _stream, _forked = before, False
        _kept.clear()


@contextmanager
def beside(*read):
    """Within it kernels run beside those that come after it, until `join`: on a stream that has waited for all before.

    Until then nobody else reads what they write. Who may let go of a tensor that they read before, names it in `read`.
    """
    global _forked
    # Compiling is asked about first: a network compiled without branches would be compiled anew where there are some.
    if torch.compiler.is_compiling() or _stream is None:
        yield
        return
    _forked = True
    _kept.extend(read)
    _stream.wait_stream(torch.cuda.current_stream(_stream.device))
    with torch.cuda.stream(_stream):
        yield


def join():
    """What comes after it waits for what ran `beside`."""
    global _forked
    if _forked:  # a capture may not wait for a stream that is no part of it
        torch.cuda.current_stream(_stream.device).wait_stream(_stream)
        _forked = False
        _kept.clear()
