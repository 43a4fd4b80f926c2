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
        """What holds here. In compiled code, which cannot tell threads apart, and within a backward, which may run in
        another thread, it is the largest value that any thread holds."""
        if not self.values:
            return self._outside
        compiling = torch.compiler.is_compiling()
        own = None if compiling else self.values.get(threading.get_ident())
        if own is not None:
            return own
        return max(self.values.values()) if compiling or torch._C._current_graph_task_id() != -1 else self._outside
