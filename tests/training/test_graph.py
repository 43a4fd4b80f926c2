"""What a capture needs around it, as far as that can be seen without a GPU."""

import gc
import weakref

import pytest

from fastgan.training.graph import garbage_kept


class Cycle:
    """Garbage once nobody has it: it refers to itself."""

    def __init__(self):
        self.itself = self


@pytest.mark.parametrize("enabled", (True, False))
def test_garbage_goes_before_a_capture_and_not_within(enabled):
    before = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        dead = weakref.ref(Cycle())
        with pytest.raises(ZeroDivisionError), garbage_kept():
            assert dead() is None and not gc.isenabled()
            raise ZeroDivisionError
        assert gc.isenabled() == enabled
    finally:
        gc.enable() if before else gc.disable()
