import argparse
import dataclasses

import numpy as np
import pytest
import torch

from fastgan.training import TrainConfig
from fastgan.training.config import add_options, config_from_dict, continued


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return vars(parser.parse_args(arguments))


def test_every_option_has_a_default_a_flag_and_a_help_text():
    config = TrainConfig()
    assert (config.lr, config.beta1, config.nz) == (2e-4, 0.5, 100)
    parser = argparse.ArgumentParser()
    add_options(parser)
    text = parser.format_help()
    for option in dataclasses.fields(TrainConfig):
        assert "--" + option.name.replace("_", "-") in text
        assert option.metadata["help"]


def test_widths_follow_the_image_size_unless_given():
    celeba, digits = TrainConfig().for_images(64), TrainConfig(ngf=48).for_images(28)
    assert (celeba.image_size, celeba.ngf, celeba.ndf) == (64, 64, 64)
    assert (digits.image_size, digits.ngf, digits.ndf) == (28, 48, 32)


def test_only_what_is_given_is_parsed():
    assert parse() == {}
    assert parse("--no-fused", "--lr", "1e-3", "--batch-size", "8") == {"fused": False, "lr": 1e-3, "batch_size": 8}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dataset", "imagenet"),
        ("image_size", 30),
        ("image_size", 0),
        ("image_size", -28),
        ("batch_size", 1),
        ("batch_size", 0),
        ("batch_size", -4),
        ("epochs", 0),
        ("max_steps", 0),
        ("nz", 0),
        ("ngf", -1),
        ("ndf", 0),
        ("ndf", 2.0),
        ("lr", 0.0),
        ("lr", -1e-4),
        ("lr", float("inf")),
        ("lr", float("nan")),
        ("lr", 10**400),
        ("beta1", 1.0),
        ("beta1", -0.1),
        ("precision", "fp8"),
        ("data_on", "disk"),
        ("seed", -1),
        ("seed", 2**63),
        ("ngf", 100_000_000),
        ("ndf", 1025),
        ("nz", 2**16 + 1),
        ("workers", 1025),
        ("workers", -1),
        ("log_every", 0),
        ("save_every", 0),
        ("epochs", True),
        ("flip", "no"),
        ("one_pass", None),
        ("compile", 1),
    ],
)
def test_values_that_are_not_allowed_are_named(name, value):
    with pytest.raises(ValueError, match=name) as error:
        TrainConfig(**{name: value})
    assert str(value) in str(error.value)


def test_values_are_kept_as_files_can_hold_them(tmp_path):
    """Checkpoints are read by what knows neither NumPy's numbers nor paths."""
    config = TrainConfig(lr=np.float32(0.5), beta1=np.float64(0.25), dataroot=tmp_path, device=torch.device("cpu"))
    assert (config.lr, config.beta1, config.dataroot, config.device) == (0.5, 0.25, str(tmp_path), "cpu")
    assert {type(value) for value in dataclasses.asdict(config).values()} <= {str, int, float, bool, type(None)}


def test_a_dictionary_makes_the_config_again():
    config = TrainConfig(max_steps=7, lr=1e-3)
    assert config_from_dict(dataclasses.asdict(config)) == config
    with pytest.raises(ValueError, match="options"):
        config_from_dict({"lr": 1e-3})


def test_checkpoints_from_before_an_option_get_its_default():
    values = dataclasses.asdict(TrainConfig(max_steps=7))
    del values["flip"], values["data_on"]
    assert config_from_dict(values) == TrainConfig(max_steps=7, flip=False, data_on="auto")
    for wrong in ({**values, "mirror": True}, {name: value for name, value in values.items() if name != "nz"}):
        with pytest.raises(ValueError, match="options"):
            config_from_dict(wrong)


def test_a_continued_run_may_change_how_but_not_what():
    config = TrainConfig(image_size=28, ngf=32, ndf=32, max_steps=30)
    changed = continued(config, {"max_steps": 60, "epochs": 3, "device": "cpu", "fused": False, "data_on": "host"})
    assert (changed.max_steps, changed.epochs, changed.fused, changed.data_on) == (60, 3, False, "host")
    assert continued(config, {"lr": config.lr}) == config
    fixed = {
        **{"dataset": "fake", "image_size": 32, "batch_size": 8, "nz": 8, "ngf": 8, "ndf": 8},
        **{"lr": 1e-3, "beta1": 0.9, "precision": "bf16", "seed": 1, "flip": True},
    }
    for name, value in fixed.items():
        with pytest.raises(ValueError, match=name) as error:
            continued(config, {name: value})
        assert str(value) in str(error.value) and str(getattr(config, name)) in str(error.value)
