"""One tuning: kernels are compiled in the background while those that are ready are measured."""

import time

import torch

from fastgan import backend
from fastgan.ops import choice
from fastgan.ops.choice import Choice
from fastgan.tune.candidates import candidates
from fastgan.tune.compiling import Compiler
from fastgan.tune.measure import Clock, measure

SAVE_EVERY = 20.0  # seconds: an interrupted tuning keeps what it has


def tune(problems, *, report, save, processes=None):
    """Measure every Problem on the current CUDA device.

    Args:
        report: called with (Problem, Result, seconds since the start) after each.
        save: called with {Problem: Measurement} now and then, and at the end.
        processes: see `Compiler`.

    Returns:
        {Problem: Measurement}, and how many candidates and Problems failed.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    measured, failures, began, saved = {}, 0, time.perf_counter(), time.perf_counter()
    clock = Clock()
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        with Compiler(backend.capability(device.index), processes) as compiler, torch.no_grad():
            tiles = {problem: candidates(problem) for problem in problems}
            compiled = {}
            for problem in problems:
                compiled[problem, None] = compiler.start(problem, Choice("cudnn"))
                for tile in tiles[problem]:
                    compiled[problem, tile] = compiler.start(problem, Choice("triton", tile._asdict()))

            def failed(problem, tile):
                return next(filter(None, (future.result() for future in compiled[problem, tile])), None)

            for problem in problems:
                failed(problem, None)  # what cannot be compiled there fails in the run, and says so
                result = measure(problem, tiles[problem], device, clock, lambda tile, p=problem: failed(p, tile))
                failures += sum(bool(candidate.failure) for candidate in result.candidates) + bool(result.failure)
                if result.measurement is not None:
                    measured[problem] = result.measurement
                report(problem, result, time.perf_counter() - began)
                if measured and time.perf_counter() - saved > SAVE_EVERY:
                    save(measured)
                    saved = time.perf_counter()
    finally:
        torch.backends.cudnn.benchmark = benchmark
        if measured:
            save(measured)
        choice.forget()
    return measured, failures
