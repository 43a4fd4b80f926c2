"""checkpoint.pt: everything that a run needs to go on, or a generator to draw."""

import io
import os
import reprlib
import zipfile
from pathlib import Path

import torch

from fastgan.checks import check_integer, is_out_of_memory
from fastgan.files import written_whole
from fastgan.models import Generator
from fastgan.random_numbers import rng_state
from fastgan.training.config import config_from_dict
from fastgan.training.weights import load_weights

CHECKPOINT = "checkpoint.pt"
_FORMAT = "fastgan checkpoint 1"
_KEYS = {
    *("format", "step", "config", "nc", "images", "fixed_latent", "rng"),
    *("generator", "discriminator", "optimizer_g", "optimizer_d", "scaler"),
}


def write_checkpoint(path, *, step, config, nc, images, fixed_latent, train_step):
    """Write ``path`` whole or not at all: to a temporary file beside it first, which then takes its name.

    Args:
        path: the file; an older one is replaced.
        step: updates done.
        config: the run's options as plain values (``dataclasses.asdict``), ``image_size`` filled in.
        nc, images: channels and number of the data set's images.
        fixed_latent: the latent vectors of the run's sample pictures.
        train_step: the TrainStep.
    """
    state = {
        "format": _FORMAT,
        "step": step,
        "config": config,
        "nc": nc,
        "images": images,
        "fixed_latent": fixed_latent,
        "rng": rng_state(train_step.device),
        **train_step.state_dict(),
    }
    content = io.BytesIO()  # torch would tell of a full disk by a RuntimeError that does not say so
    torch.save(state, content)
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())


def read_checkpoint(path):
    """The contents of a checkpoint (a file, or the run folder that holds it), with tensors on the CPU.

    Raises:
        ValueError: there is none, it is damaged, or it is something else.
    """
    path = checkpoint_path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever bytes that are no checkpoint lead the unpickler to
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{path} is not a fastgan checkpoint, or it is damaged: it cannot be loaded") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT or not _KEYS <= set(state):
        raise ValueError(f"{path} is not a fastgan checkpoint: it holds something else")
    _check_values(path, state)
    return state


def _check_values(path, state):
    """Raise ValueError for numbers that are not as they were written, of which torch says nothing."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            part = file.testzip()
        if part is not None:
            raise ValueError(f"{path} is damaged: the checksum of its part {part} is wrong")
    try:
        for name, least in dict(step=0, nc=1, images=1).items():
            check_integer(name, state[name], least)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: its {error}") from error
    latent, rng = state["fixed_latent"], state["rng"]
    if not (isinstance(latent, torch.Tensor) and latent.dim() == 2 and latent.is_floating_point()):
        raise ValueError(f"{path} is damaged: its fixed_latent is {reprlib.repr(latent)}")
    if not (isinstance(rng, dict) and isinstance(rng.get("cpu"), torch.Tensor)):
        raise ValueError(f"{path} is damaged: its rng is {reprlib.repr(rng)}")


def checkpoint_path(path, name="checkpoint"):
    """``path`` itself, or the checkpoint.pt in it if it is a folder.

    Raises:
        ValueError: there is no such file; the message begins with ``name``.
    """
    if not os.fspath(path):
        raise ValueError(f"{name} must be the name of a file or of a run's folder; got ''")
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        if not (path / CHECKPOINT).is_file():
            raise ValueError(f"{name} {str(path)!r} holds no {CHECKPOINT}")
        return path / CHECKPOINT
    if not path.is_file():
        raise ValueError(f"{name} {str(path)!r} {'is no file' if path.exists() else 'does not exist'}")
    return path


def checkpoint_config(path, state):
    """The TrainConfig in a checkpoint's ``state``; ``path`` is for the message of the ValueError."""
    try:
        config = config_from_dict(state["config"])
    except ValueError as error:
        raise ValueError(f"{path} is not a checkpoint of this version: {error}") from error
    if state["fixed_latent"].shape[1] != config.nz:
        shape = tuple(state["fixed_latent"].shape)
        raise ValueError(f"{path} is damaged: its fixed_latent has shape {shape}, and latents have {config.nz} numbers")
    return config


def load_generator(path, device="cpu"):
    """The trained generator of a checkpoint, in eval mode, on ``device``. Its ``nz`` is the length of a latent.

    Raises:
        ValueError: the checkpoint cannot be used; see ``read_checkpoint``.
    """
    path = checkpoint_path(path)
    state = read_checkpoint(path)
    config = checkpoint_config(path, state)
    try:
        generator = Generator(image_size=config.image_size, nc=state["nc"], nz=config.nz, ngf=config.ngf)
        load_weights(generator, state["generator"])
    except ValueError as error:
        raise ValueError(f"{path} holds weights of another architecture than its options say: {error}") from error
    return generator.eval().to(device)
