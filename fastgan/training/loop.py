"""The training loop."""

from contextlib import closing

import torch

from fastgan.files import alone_in, remove_left_over
from fastgan.random_numbers import restore_rng
from fastgan.training.guards import FirstNonFinite, Interrupt
from fastgan.training.plots import plot_losses
from fastgan.training.records import PICTURES, Records

DIVERGED = "diverged.pt"


def train(run):
    """Train until ``run.last_step`` with records and saves on the way, or until SIGINT (Ctrl-C) or SIGTERM.

    A signal lets the step finish and be saved. Does nothing if the run is there already.

    Args:
        run: a Run, from ``new_run`` or ``resumed_run``.

    Returns:
        the number of the last step done: less than ``run.last_step`` if a signal came.

    Raises:
        whatever reading the images raises; the steps before it are saved.
        ValueError: a loss or a weight is not finite (the state is saved as diverged.pt; checkpoint.pt stays as it was),
            compilation fails, or another process is training in the folder, or was since the run was made.
    """
    if run.first_step >= run.last_step:
        return run.first_step
    restore_rng(run.rng, run.device)  # numbers may have been drawn since the run was made
    torch.backends.cudnn.benchmark = True  # worth it: all batches have one shape
    run.out.mkdir(parents=True, exist_ok=True)
    with alone_in(run.out):
        run.check_untouched()
        for folder in (run.out, run.out / PICTURES):
            remove_left_over(folder)
        if not run.first_step:
            run.save(0)  # before anything else is there: whatever ends the run from now on, it can go on
        run.write_config()
        return _train(run)


def _train(run):
    with Interrupt() as interrupt, closing(run.open_images()) as images, Records(run, images) as records:
        non_finite = FirstNonFinite(run.device)
        for step in range(run.first_step + 1, run.last_step + 1):
            losses = _update(run, _next_images(run, images, step, non_finite))
            non_finite.watch(step, losses)
            records.advance()

            last = interrupt.requested or step == run.last_step
            save = last or step % run.save_every == 0
            if save or step % run.config.log_every == 0:
                _stop_if_diverged(run, step, non_finite)
                records.log(step, losses)
            if save:
                run.save(step)  # first: what is written for people to look at may fail
                records.draw(step)
                records.restart_clock()
            if last:
                break
    plot_losses(run.out)
    return step


def _next_images(run, images, step, non_finite):
    """The images of ``step``. Where they cannot be had, the last whole step is saved before the error goes on."""
    try:
        return images.before_step()
    except Exception as error:
        if step - 1 == run.first_step:
            raise
        _stop_if_diverged(run, step - 1, non_finite)
        run.save(step - 1)
        if isinstance(error, ValueError):  # one line for the user
            raise ValueError(f"{error}; step {step - 1} is saved, and --resume goes on with it") from error
        raise


def _update(run, images):
    try:
        return run.step(images)
    except RuntimeError as error:
        if not run.config.compile or not isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"compile does not work here ({reason}); --no-compile trains without it") from error


def _stop_if_diverged(run, step, non_finite):
    first = non_finite.first_step()
    if first is None and non_finite.in_weights(run.step):
        first = step
    if first is not None:
        run.save(step, DIVERGED)
        raise ValueError(
            f"training diverged: loss or weights are not finite at step {first}; the state after step {step} is in "
            f"{run.out / DIVERGED}, and the last good checkpoint is as it was. "
            "A smaller learning rate may help"
        )
