"""Train a DCGAN: `python scripts/train.py --fused` learns handwritten digits, with nothing to download.

Exit status: 0 when the run is complete, 130 after Ctrl-C (the run is saved), 2 for anything wrong with the input.
"""

import argparse
import dataclasses
import os
import shlex
import signal
import sys

if __name__ == "__main__":
    # Notebooks name one that this Python may not have, and it is not needed to draw into a file.
    os.environ["MPLBACKEND"] = "agg"
    on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_DFL)  # while torch is imported: an end without a traceback

import torch

import fastgan
from fastgan.command_line import run_command, say
from fastgan.ops.choice import has_table, relatives
from fastgan.training import TrainConfig, new_run, resumed_run, train
from fastgan.training.config import MOST_SEED, add_options


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--out", metavar="FOLDER", help="folder of the run (default: runs/<dataset>)")
    parser.add_argument("--resume", metavar="PATH", help="go on with the run in this folder (or its checkpoint.pt)")
    parser.add_argument("--explain", action="store_true", help="first say which layers are fused, and why others not")
    options = vars(parser.parse_args(argv))
    return options, options.pop("out"), options.pop("resume"), options.pop("explain")


def describe(run):
    config, side = run.config, run.config.image_size
    how = "fused" if config.fused else "stock layers"
    how += ", compiled" if config.compile else ""
    how += ", in a CUDA graph" if config.cuda_graph and run.device.type == "cuda" else ""
    where = "" if run.resident is None else ", images on the GPU"
    say(
        f"{config.dataset}: {len(run.dataset):,} images of {side}x{side}, {run.steps_per_epoch} steps of "
        f"{config.batch_size} an epoch; {how}, {config.precision} on {run.device}{where}; run folder {run.out}"
    )
    if config.fused and run.device.type == "cuda":
        advise_tuning(run.device)
    if run.first_step:
        say(f"going on after step {run.first_step} of {run.last_step}")


def advise_tuning(device):
    """Say so if nobody has measured convolutions on a GPU of this name."""
    gpu = torch.cuda.get_device_name(device)
    if has_table(gpu):
        return
    meanwhile = "cuDNN computes them"
    if others := relatives(device.index or 0):
        meanwhile += f", but for those in which our kernels are far ahead on {' and '.join(others)}"
    say(
        f"nobody has measured convolutions on {gpu} yet, so {meanwhile}: `python -m fastgan.tune` finds, in some "
        "minutes, where our kernels are faster"
    )


def explain(run):
    latent = torch.zeros(run.config.batch_size, run.config.nz, device=run.device)
    images = torch.zeros(run.config.batch_size, run.dataset.nc, *[run.config.image_size] * 2, device=run.device)
    dtype = run.step.autocast_dtype
    with torch.autocast(run.device.type, dtype, enabled=dtype is not None):
        say(fastgan.explain(run.step.generator, latent))
        say(fastgan.explain(run.step.discriminator, images))


def run_training(options, out, resume, wants_explanation):
    run = new_run(TrainConfig(**options), out) if resume is None else resumed_run(resume, options, out)
    if run.first_step >= run.last_step:
        say(
            f"the run in {run.out} has finished its {run.last_step} steps (--epochs {run.config.epochs}, "
            f"--max-steps {run.config.max_steps}): a larger --epochs or --max-steps goes on with it"
        )
        return 0
    describe(run)
    if wants_explanation:
        explain(run)

    step = train(run)
    if step < run.last_step:
        say(f"interrupted; step {step} is saved. To go on: python scripts/train.py --resume {quoted(run.out)}")
        return 130
    say(f"done: {step} steps. Pictures: {run.out}/samples/step-{step:06d}.png; losses: {run.out}/loss.png")
    another = (run.config.seed + 1) % (MOST_SEED + 1)  # the run's own seed would draw the pictures of the samples again
    checkpoint, more = quoted(run.out / "checkpoint.pt"), quoted(run.out / "more.png")
    say(f"more: python scripts/generate.py {checkpoint} --out {more} --seed {another}")
    return 0


def quoted(path):
    return shlex.quote(str(path))


def main(argv=None):
    parsed = parse(argv)
    options = [option.name for option in dataclasses.fields(TrainConfig)]
    return run_command(lambda: run_training(*parsed), [*options, "out", "resume"], root="dataroot")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_ctrl_c)
    sys.exit(main())
