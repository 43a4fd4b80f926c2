"""What holds within a `with` block of one thread, where torch.compile has to see it."""

import threading
from contextlib import contextmanager


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
