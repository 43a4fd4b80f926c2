"""Compiling the kernels of all candidates beforehand, in as many processes as there are cores.

The processes need no GPU: Triton's cache on disk takes the kernels from them to the process that starts them.
"""

import os
import signal
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context

import torch

from fastgan.checks import in_short
from fastgan.kernels.offline import compile_launch, compiling_for, record
from fastgan.tune.workloads import operands, run

_for_life = ExitStack()  # what holds as long as the process lives


def launches(problem, choice):
    """The Launches of one run of a Problem; its tensors have no data."""
    tensors = operands(problem, torch.device("meta"))
    return record(lambda: run(problem, choice, tensors))


def usable_cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Compiler:
    """Compiles in the background; use it in a `with` statement.

    Args:
        capability: of the GPU, 90 for sm_90.
        processes: how many; the cores that this process may use, but one, by default.
    """

    def __init__(self, capability, processes=None):
        self._pool = ProcessPoolExecutor(
            processes or max(1, usable_cores() - 1),
            mp_context=get_context("spawn"),  # a fork of a process that uses CUDA cannot be relied on
            initializer=_prepare_quietly,
            initargs=(capability,),
        )
        self._started = {}  # key of a Launch → Future

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self, problem, choice):
        """Begin to compile the kernels that a Problem starts with this Choice: the list of their Futures."""
        try:
            return [self._start(launch) for launch in launches(problem, choice)]
        except Exception as error:  # a launcher that refuses a tile: a candidate that failed
            failed = Future()
            failed.set_result(in_short(error))
            return [failed]

    def _start(self, launch):
        if launch.key not in self._started:
            self._started[launch.key] = self._pool.submit(_compile, launch)
        return self._started[launch.key]


def prepare(capability):
    """Make this process one that compiles for a GPU which it never touches."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    _for_life.enter_context(compiling_for(capability))


def _prepare_quietly(capability):
    """`prepare`, and leave Ctrl-C to the process that started this one: it ends the pool, and says what was kept."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare(capability)


def _compile(launch):
    """None, or what went wrong."""
    try:
        compile_launch(launch)
    except Exception as error:
        return in_short(error)
    return None
