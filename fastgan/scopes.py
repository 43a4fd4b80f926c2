"""What holds within a `with` block of one thread, where torch.compile has to see it."""

import threading
from contextlib import contextmanager

import torch


class Scope:
    """A value for as long as a thread is in the block of `holding`, and `outside` where it is not.

    `values` is {thread: value} of the threads that are in such a block. Not a threading.local: torch.compile would
    take what it reads there for a constant. It guards what it reads in `values`.
    """

    def __init__(self, outside):
        self.values, self._outside = {}, outside

    @contextmanager
    def holding(self, value):
        thread = threading.get_ident()
        before = self.values.get(thread)
        self.values[thread] = value
        try:
            yield
        finally:
            if before is None:
                del self.values[thread]
            else:
                self.values[thread] = before

    def current(self):
        """What holds here. In compiled code, which cannot tell threads apart, and in a thread of autograd's, which runs
        backward for another, it is the largest value that any thread holds."""
        if not self.values:
            return self._outside
        compiling = torch.compiler.is_compiling()
        own = None if compiling else self.values.get(threading.get_ident())
        if own is not None:
            return own
        return max(self.values.values()) if compiling or _is_of_autograd() else self._outside


def _is_of_autograd():
    """Whether this is a thread that autograd runs a backward in, and not one of Python's."""
    if torch._C._current_graph_task_id() == -1:
        return False
    own = threading.get_ident()
    of_python = [thread for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)]
    return all([thread.ident != own for thread in of_python])
