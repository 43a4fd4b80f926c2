"""`python -m pytest -p tests.emulator.plugin tests/kernels`: the tests' kernels run in the emulator.

This must be imported before the kernels and before tests/conftest.py, which chooses Triton's interpreter: there would
be nothing to compile then. Afterwards the interpreter is what operators believe in, so that they take tensors on a CPU.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests keep their tensors on the CPU

from triton import JITFunction

from fastgan.kernels import cast
from fastgan.kernels.addresses import Tables
from fastgan.kernels.offline import started_by
from tests.emulator import launch as emulation


def _tables_that_say_where_they_lead():
    """A kernel may touch the tensors whose addresses it gets from a table, too."""
    call = Tables.__call__

    def declared(self, *lists):
        made = call(self, *lists)
        made[0].leads_to = [tensor for tensors in lists for tensor in tensors]
        return made

    Tables.__call__ = declared


_emulating = started_by(emulation.launch)  # kept, or it would end with its last reference
_emulating.__enter__()
_tables_that_say_where_they_lead()
if not isinstance(cast.cast_kernel, JITFunction):
    raise ImportError("the kernels were imported, for Triton's interpreter, before the emulator")
os.environ["TRITON_INTERPRET"] = "1"


def pytest_terminal_summary(terminalreporter):
    launches = ", ".join(f"{name} {count}" for name, count in sorted(emulation.launches.items()))
    if launches:  # none in the process that only hands tests out to others
        terminalreporter.write_line(f"kernels emulated for sm_{emulation.CAPABILITY}: {launches}")
