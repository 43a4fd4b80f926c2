"""A run of training: made anew in an empty folder, or taken up again from its checkpoint."""

import dataclasses
import json
import os
import shlex
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from fastgan import data
from fastgan.backend import PRECISIONS, select
from fastgan.checks import is_out_of_memory
from fastgan.files import check_writable, version_of, write_text
from fastgan.models import Discriminator, Generator
from fastgan.random_numbers import restore_rng, rng_state
from fastgan.training.allocation import keep_freed_memory
from fastgan.training.checkpoints import (
    CHECKPOINT,
    checkpoint_config,
    checkpoint_path,
    read_checkpoint,
    write_checkpoint,
)
from fastgan.training.config import TrainConfig, continued
from fastgan.training.devices import check_precision, pick_device
from fastgan.training.records import METRICS, PICTURES, check_packages
from fastgan.training.samples import draw_latents
from fastgan.training.step import TrainStep

CONFIG = "config.json"
_OF_A_RUN = (CONFIG, METRICS, CHECKPOINT, PICTURES, "loss.png")  # what is in its folder; samples is one itself
SAMPLES = 64


@dataclass
class Run:
    """What the loop needs. ``first_step`` updates are done already; it goes on until ``last_step`` are."""

    config: TrainConfig
    out: Path  # the folder of the run
    dataset: object  # what `data.load` returns
    device: torch.device
    step: TrainStep
    fixed_latent: torch.Tensor  # (SAMPLES, nz): the sample pictures are of these
    rng: dict  # the `rng_state` that it goes on with
    first_step: int = 0
    resident: data.ResidentImages | None = None  # the images, where they are on the GPU: the step's source
    found: tuple | None = None  # `version_of` checkpoint.pt when the run was made; of a new one: None

    @property
    def steps_per_epoch(self):
        return data.steps_per_epoch(self.dataset, self.config.batch_size)

    @property
    def last_step(self):
        steps = self.config.epochs * self.steps_per_epoch
        return steps if self.config.max_steps is None else min(steps, self.config.max_steps)

    @property
    def save_every(self):
        return self.config.save_every or min(self.steps_per_epoch, 1000)

    def open_images(self):
        """Where the steps from ``first_step`` on get their images; to be closed.

        Its ``before_step()``, called before each step, returns the images to call the step with, or None where the step
        draws them itself. ``seconds_waited()`` says for how long steps have waited for images since the last call.
        """
        if self.resident is not None:
            self.resident.seek(self.first_step)
            return self.resident
        return data.HostImages(
            self.dataset,
            device=self.device,
            first_step=self.first_step,
            workers=self.config.workers,
            **_batch_options(self.config),
        )

    def check_untouched(self):
        """Raise ValueError if another process has trained in the folder since this run was made."""
        if version_of(self.out / CHECKPOINT) != self.found:
            raise ValueError(
                f"another process has trained in {self.out} since this run was loaded; "
                f"its files were left as they are: --resume {shlex.quote(str(self.out))} goes on from there"
            )

    def write_config(self):
        """Write config.json, into a folder that is there: every option, the data and what computes."""
        values = {
            **dataclasses.asdict(self.config),
            "nc": self.dataset.nc,
            "images": len(self.dataset),
            "images_on": "host" if self.resident is None else "gpu",
            "torch": torch.__version__,
            "device_name": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
        }
        write_text(self.out / CONFIG, json.dumps(values, indent=2) + "\n")

    def save(self, step, name=CHECKPOINT):
        """Write the state after ``step`` updates to the checkpoint ``name`` in the run's folder."""
        write_checkpoint(
            self.out / name,
            step=step,
            config=dataclasses.asdict(self.config),
            nc=self.dataset.nc,
            images=len(self.dataset),
            fixed_latent=self.fixed_latent,
            train_step=self.step,
        )


def new_run(config, out=None):
    """A run from the beginning. Nothing is written before ``train``.

    Sets the seed of torch's global random generators.

    Args:
        config: a TrainConfig.
        out: folder of the run, by default runs/<dataset>.

    Raises:
        ValueError: an option that this machine or the data do not allow, or a folder that holds a run or cannot be
            written to.
    """
    out = Path("runs", config.dataset) if out is None else os.path.expanduser(out)
    device = _check_machine(config)
    _check_unused(out)
    out = Path(out)
    dataset = _load(config)
    config = config.for_images(dataset.image_size)
    torch.manual_seed(config.seed)
    resident = _resident(config, dataset, device)
    step = _train_step(config, dataset.nc, device, resident)
    latent, rng = draw_latents(SAMPLES, config.nz, config.seed), rng_state(device)
    return Run(config, out, dataset, device, step, latent, rng, resident=resident)


def resumed_run(path, given=None, out=None):
    """The run of a checkpoint, at the checkpoint's step, with all random generators as they were then.

    Args:
        path: the folder of the run, or the checkpoint in it.
        given: options (name → value) to change; only those may differ that leave the training itself as it was.
        out: None, or the folder of the run once more.

    Raises:
        ValueError: no usable checkpoint there, options that contradict it, or the reasons of ``new_run``.
    """
    path = checkpoint_path(path, "resume")
    if out is not None and Path(os.path.expanduser(out)).resolve() != path.parent.resolve():
        raise ValueError(f"out {str(out)!r} contradicts the run to resume, which is in {str(path.parent)!r}")
    found = version_of(path.parent / CHECKPOINT)  # before the reading: it may be replaced meanwhile
    state = read_checkpoint(path)
    if state["step"] and not (path.parent / CONFIG).is_file():  # a run that was ended before its first step may lack it
        raise ValueError(f"resume {str(path.parent)!r} holds no run to go on with: it has no {CONFIG}")
    before = checkpoint_config(path, state)
    config = continued(before, given or {})
    device = _check_machine(config)
    check_writable("resume", path.parent, folder=True)
    for name in _OF_A_RUN:
        if (path.parent / name).exists() and (path.parent / name).is_dir() != (name == PICTURES):
            kind = "folder" if name == PICTURES else "file"
            raise ValueError(f"resume {str(path.parent)!r} cannot go on: its {name} is no {kind}")
    dataset = _load(config)
    if dataset.nc != state["nc"]:
        raise ValueError(f"the images have {dataset.nc} channels now; the run to resume has {state['nc']}")
    if len(dataset) != state["images"]:
        warnings.warn(
            f"the data set has {len(dataset)} images now and had {state['images']}: the order of images is another one",
            stacklevel=2,
        )
    resident = _resident(config, dataset, device)
    try:
        step = _train_step(config, dataset.nc, device, resident)
        step.load_state_dict(state)
        restore_rng(state["rng"], device)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{path} does not fit its own options: {error}") from error
    _tell_of_edits(path.parent / CONFIG, before, config)
    latent, rng = state["fixed_latent"], state["rng"]
    return Run(config, path.parent, dataset, device, step, latent, rng, state["step"], resident, found)


def _tell_of_edits(path, before, config):
    """Warn where the file of options, which runs write and never read, has others than these and those before."""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        written = None
    options, allowed = dataclasses.asdict(before), dataclasses.asdict(config)
    if not isinstance(written, dict):
        warnings.warn(f"{path} cannot be read: the run goes on with the checkpoint's options", stacklevel=3)
    elif edited := [name for name in options if written.get(name, options[name]) not in (options[name], allowed[name])]:
        said = ", ".join(f"{name}={written[name]!r} for {options[name]!r}" for name in edited)
        warnings.warn(
            f"{path} has {said}: the run goes on with the checkpoint's options, and what the command line changes",
            stacklevel=3,
        )


def _check_machine(config):
    check_packages()
    device = pick_device(config.device)
    check_precision(config.precision, device)
    select(device, PRECISIONS[config.precision])  # whether FASTGAN_BACKEND is possible here
    if config.data_on == "gpu" and device.type != "cuda":
        raise ValueError(f"data_on 'gpu' needs a CUDA device; the run's is {device.type!r}")
    return device


def _check_unused(given):
    out = Path(given)
    if os.path.exists(out) and not out.is_dir():
        raise ValueError(f"out {str(out)!r} is not a folder")
    check_writable("out", given, folder=True)
    for name in _OF_A_RUN:
        if (out / name).exists():
            raise ValueError(
                f"out {str(out)!r} holds another run (it has {name}): go on with that one by "
                f"--resume {shlex.quote(str(out))}, or choose another folder by --out"
            )


def _load(config):
    dataset = data.load(
        config.dataset,
        root=config.dataroot,
        image_size=config.image_size,
        workers=config.workers,
        seed=config.seed,
    )
    data.steps_per_epoch(dataset, config.batch_size)  # fails where there is not one whole batch
    return dataset


def _resident(config, dataset, device):
    """The data set on the GPU, if that is asked for, or allowed and possible; else None."""
    if config.data_on == "host":
        return None
    insists = config.data_on == "gpu"
    obstacle = data.why_not_resident(dataset, device, 1.0 if insists else data.MEMORY_SHARE)
    if obstacle is None:
        return data.ResidentImages(dataset.images, device=device, **_batch_options(config))
    if insists:
        raise ValueError(f"data_on 'gpu' is not possible: {obstacle}")
    return None


def _batch_options(config):
    return {
        "batch_size": config.batch_size,
        "dtype": PRECISIONS[config.precision],  # what the first layers compute in: nothing for autocast to convert
        "seed": config.seed,
        "flip": config.flip,
    }


def _train_step(config, nc, device, source):
    if device.type == "cpu":
        keep_freed_memory()
    generator = Generator(image_size=config.image_size, nc=nc, nz=config.nz, ngf=config.ngf)
    discriminator = Discriminator(image_size=config.image_size, nc=nc, ndf=config.ndf)
    return TrainStep(
        generator.to(device),
        discriminator.to(device),
        latent_dim=config.nz,
        lr=config.lr,
        betas=(config.beta1, 0.999),
        precision=config.precision,
        fused=config.fused,
        compile=config.compile,
        cuda_graph=config.cuda_graph,
        one_pass=None if config.one_pass else False,
        source=source,
    )
