"""What holds within a `with` block of one thread, where torch.compile has to see it."""

import threading
from contextlib import contextmanager

import torch


class Scope:
    """A value for as long as a thread is in the block of `holding`; `values` is {thread: value} of those that are.

    Not a threading.local: torch.compile would take what it reads there for a constant. It guards what it reads in
    `values`.
    """

    def __init__(self):
        self.values = {}

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

    def current(self, outside):
        """What holds here, or `outside`. Compiled code cannot tell threads apart, and a backward runs in any thread:
        there it is what holds for any of them."""
        if not self.values:
            return outside
        compiling = torch.compiler.is_compiling()
        own = None if compiling else self.values.get(threading.get_ident())
        if own is not None:
            return own
        return max(self.values.values()) if compiling or torch._C._current_graph_task_id() != -1 else outside
