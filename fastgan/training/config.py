"""The options of a training run: names, defaults, help texts and what is allowed, all in one place."""

import dataclasses
import os
from dataclasses import dataclass, field

from fastgan.backend import PRECISIONS
from fastgan.checks import check_choice, check_integer, check_positive, is_number
from fastgan.data import DATASETS, MEMORY_SHARE
from fastgan.models import IMAGE_SIZES

DATA_ON = ("auto", "gpu", "host")
MOST_SEED = 2**63 - 1
# Above these, networks and processes fit into no machine: 1,024 is sixteen times the width of the DCGAN.
_MOST_WIDTH, _MOST_NZ, _MOST_WORKERS = 1024, 2**16, 1024
_WIDTHS = "(default: 64, and 32 where images are smaller than 64 pixels)"


def _option(default, kind, help, *, metavar=None, resumable=False, later=False):
    """A field and its command-line option.

    ``resumable``: a resumed run may give another value. ``later``: checkpoints may be older than the option; they get
    its default, which is to say what was done before there was the option.
    """
    metadata = {"kind": kind, "help": help, "metavar": metavar or kind.__name__.upper()}
    return field(default=default, metadata={**metadata, "resumable": resumable, "later": later})


def _one_of(names):
    """How the help shows an option that takes one of these."""
    return "{" + ",".join(names) + "}"


def check_batch_size(batch_size):
    """Raise ValueError unless it is a number of images that BatchNorm can be trained with."""
    check_integer("batch_size", batch_size, 1)
    if batch_size == 1:
        raise ValueError("batch_size must be at least 2: BatchNorm compares the images of a batch; got 1")


@dataclass(frozen=True)
class TrainConfig:
    """Every option of a run; the help texts below say what each one is. Checked when made.

    Raises:
        ValueError: a value that is not allowed.
    """

    dataset: str = _option("digits", str, f"what to learn: {', '.join(DATASETS)}", metavar="NAME")
    dataroot: str | None = _option(
        None, str, "folder of the data set's files; digits and fake need none", metavar="FOLDER", resumable=True
    )
    image_size: int | None = _option(None, int, "side of the images, in pixels (default: the data set's own)")
    batch_size: int = _option(32, int, "images in a step")
    epochs: int = _option(16, int, "passes over the data set", resumable=True)
    max_steps: int | None = _option(None, int, "end after so many steps, if the epochs last longer", resumable=True)
    nz: int = _option(100, int, "length of the latent vector")
    ngf: int | None = _option(None, int, f"channels of the generator's last hidden layer {_WIDTHS}")
    ndf: int | None = _option(None, int, f"channels of the discriminator's first layer {_WIDTHS}")
    lr: float = _option(2e-4, float, "Adam's learning rate")
    beta1: float = _option(0.5, float, "Adam's first decay rate")
    precision: str = _option("fp32", str, "what to compute in; fp16 needs CUDA", metavar=_one_of(PRECISIONS))
    fused: bool = _option(
        True, bool, "fused layers and losses: Triton kernels on a GPU, plain torch on a CPU", resumable=True
    )
    compile: bool = _option(False, bool, "torch.compile both networks", resumable=True)
    cuda_graph: bool = _option(
        True,
        bool,
        "on a GPU replay each step as one CUDA graph; elsewhere without effect",
        resumable=True,
        later=True,
    )
    one_pass: bool = _option(
        True,
        bool,
        "with fused layers, run the discriminator on real and fake images in one pass; --no-one-pass takes less memory",
        resumable=True,
        later=True,
    )
    device: str = _option(
        "auto", str, "auto (CUDA if there is one), cpu, cuda or cuda:N", metavar="DEVICE", resumable=True
    )
    seed: int = _option(0, int, "decides initial weights, order of images and latent vectors")
    flip: bool = _option(
        False, bool, "mirror a random half of the images left to right, another in each epoch", later=True
    )
    data_on: str = _option(
        "auto",
        str,
        "where the images are kept; auto: on a GPU if they are in memory and take at most "
        f"{MEMORY_SHARE:.0%} of what is free there, else on the host. Batches are the same",
        metavar=_one_of(DATA_ON),
        resumable=True,
        later=True,
    )
    workers: int = _option(
        0,
        int,
        "decoders of pictures: threads before training for those that fit in memory (0: one a core, 8 at most), "
        "processes during training for others (0: none)",
        resumable=True,
    )
    log_every: int = _option(10, int, "steps between rows of metrics.jsonl", resumable=True)
    save_every: int | None = _option(
        None, int, "steps between sample pictures and checkpoints (default: an epoch, at most 1000)", resumable=True
    )

    def __post_init__(self):
        check_choice("dataset", self.dataset, DATASETS)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("data_on", self.data_on, DATA_ON)
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if option.metadata["kind"] is bool and not isinstance(value, bool):
                raise ValueError(f"{option.name} must be True or False; got {value!r}")
        if self.image_size is not None:
            check_choice("image_size", self.image_size, IMAGE_SIZES)
        check_batch_size(self.batch_size)
        for name in ("epochs", "log_every"):
            check_integer(name, getattr(self, name), 1)
        for name, least, most in (("nz", 1, _MOST_NZ), ("seed", 0, MOST_SEED), ("workers", 0, _MOST_WORKERS)):
            check_integer(name, getattr(self, name), least, most)
        for name, most in (("ngf", _MOST_WIDTH), ("ndf", _MOST_WIDTH), ("max_steps", None), ("save_every", None)):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1, most)
        check_positive("lr", self.lr)
        if not (is_number(self.beta1) and 0 <= self.beta1 < 1):
            raise ValueError(f"beta1 must be a number from 0 to below 1; got {self.beta1!r}")
        # As what checkpoints and config.json can hold: NumPy's numbers, paths and devices may come, too.
        plain = dict(lr=float(self.lr), beta1=float(self.beta1), device=str(self.device))
        if isinstance(self.dataroot, os.PathLike):
            plain["dataroot"] = os.fspath(self.dataroot)
        for name, value in plain.items():
            object.__setattr__(self, name, value)  # the way around `frozen`

    def for_images(self, image_size):
        """These options with everything filled in that depends on the side of the data set's images."""
        width = 64 if image_size >= 64 else 32
        return dataclasses.replace(self, image_size=image_size, ngf=self.ngf or width, ndf=self.ndf or width)


def continued(config, given):
    """The options of a run that goes on: those of ``config``, except where ``given`` (name → value) has others.

    Raises:
        ValueError: ``given`` contradicts what the run has been trained with, or has a value that is not allowed.
    """
    for option in dataclasses.fields(TrainConfig):
        old = getattr(config, option.name)
        new = given.get(option.name, old)
        if new != old and not option.metadata["resumable"]:
            raise ValueError(
                f"{option.name} {new!r} contradicts the run to resume, which has {old!r}: "
                f"leave the option out, or begin a new run"
            )
    return dataclasses.replace(config, **given)


def config_from_dict(values):
    """The TrainConfig that ``dataclasses.asdict`` made ``values`` of, in this version or before the ``later`` options.

    Raises:
        ValueError: names are missing or unknown, or a value is not allowed.
    """
    options = dataclasses.fields(TrainConfig)
    needed = {option.name for option in options if not option.metadata["later"]}
    if not isinstance(values, dict) or not needed <= set(values) <= {option.name for option in options}:
        raise ValueError("the options are not those of a training run of this version")
    return TrainConfig(**values)


def add_options(parser):
    """Add every option to an argparse ``parser``. Those that are not given are absent from the parsed namespace."""
    import argparse

    for option in dataclasses.fields(TrainConfig):
        flag = "--" + option.name.replace("_", "-")
        kind, help_text = option.metadata["kind"], option.metadata["help"].replace("%", "%%")
        if kind is bool:
            help_text += f" (default: {'yes' if option.default else 'no'})"
            how = {"action": argparse.BooleanOptionalAction}
        else:
            if option.default is not None:
                help_text += f" (default: {option.default})"
            how = {"type": kind, "metavar": option.metadata["metavar"]}
        parser.add_argument(flag, dest=option.name, default=argparse.SUPPRESS, help=help_text, **how)
