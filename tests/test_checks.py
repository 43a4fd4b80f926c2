"""Bad input to the operators is refused, with the argument's name, before any work starts."""

import re

import pytest
import torch

from fastgan import functional as fused
from fastgan.checks import check_integer, first_few
from fastgan.losses import backward_bce, backward_bce_of_torch
from fastgan.ops.layer_checks import ACTIVATIONS


@pytest.fixture(autouse=True)
def _auto(monkeypatch):
    monkeypatch.delenv("FASTGAN_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def arguments(transposed=False):
    """What both operators accept: 3 channels to 4 on 6×6."""
    return dict(
        x=torch.randn(2, 3, 6, 6),
        weight=torch.randn(3, 4, 3, 3) if transposed else torch.randn(4, 3, 3, 3),
        bias=torch.randn(4),
        gamma=torch.randn(4),
        beta=torch.randn(4),
        running_mean=torch.zeros(4),
        running_var=torch.ones(4),
        training=True,
    )


OPERATORS = [(fused.conv2d_bn_act, False), (fused.conv_transpose2d_bn_act, True)]
both = pytest.mark.parametrize(("operator", "transposed"), OPERATORS, ids=["conv", "conv_transpose"])

long = torch.ones(4, dtype=torch.int64)
meta = dict(device="meta")
VECTORS = ("bias", "gamma", "beta", "running_mean", "running_var")
VALUE_ERRORS = [
    (dict(x=torch.randn(3, 6, 6)), "x must have 4 dimensions; got shape (3, 6, 6)"),
    (dict(weight=torch.randn(4, 3, 3)), "weight must have 4 dimensions; got shape (4, 3, 3)"),
    (dict(x=torch.randn(2, 5, 6, 6)), "x must have 3 channels, as weight "),
    *((dict([(name, torch.ones(5))]), f"{name} must have shape (4,); got (5,)") for name in VECTORS),
    *((dict([(name, torch.ones(1, 4))]), f"{name} must have shape (4,); got (1, 4)") for name in VECTORS),
    *((dict([(name, torch.ones(4, **meta))]), f"{name} must be on the device of x, cpu; got meta") for name in VECTORS),
    (dict(running_var=None), "running_mean and running_var must be given both or neither"),
    (dict(running_mean=None), "running_mean and running_var must be given both or neither"),
    (dict(running_mean=None, running_var=None, training=False), "running_mean and running_var are needed"),
    (dict(activation="gelu"), "activation must be one of 'relu', 'leaky_relu', 'tanh', 'sigmoid', None; got 'gelu'"),
    (dict(activation=torch.relu), "activation must be one of"),
    (dict(activation="leaky_relu", negative_slope=-0.1), "negative_slope must be at least 0; got -0.1"),
    (dict(activation="leaky_relu", negative_slope=float("nan")), "negative_slope must be at least 0; got nan"),
    (
        dict(activation_first=True),
        "activation_first=True needs an activation and a BatchNorm after it; got activation=None and a BatchNorm",
    ),
    (
        dict(activation_first=True, activation="relu", **dict.fromkeys(VECTORS[1:])),
        "activation_first=True needs an activation and a BatchNorm after it; got activation='relu' and no BatchNorm",
    ),
    (dict(stride=0), "stride must be at least 1; got 0"),
    (dict(stride=(1, 0)), "stride must be at least 1; got (1, 0)"),
    (dict(stride=(1, 1, 1)), "stride must be an int or a pair of ints; got (1, 1, 1)"),
    (dict(stride=(1.0, 1.0)), "stride must be an int or a pair of ints; got (1.0, 1.0)"),
    (dict(stride=1.5), "stride must be an int or a pair of ints; got 1.5"),
    (dict(stride=None), "stride must be an int or a pair of ints; got None"),
    (dict(stride=True), "stride must be an int or a pair of ints; got True"),
    (dict(padding=(1, False)), "padding must be an int or a pair of ints; got (1, False)"),
    (dict(padding=-1), "padding must be at least 0; got -1"),
    (dict(padding=(0, -1)), "padding must be at least 0; got (0, -1)"),
    (dict(weight=torch.empty(0, 3, 3, 3)), "weight must not be empty; got shape (0, 3, 3, 3)"),
    (dict(eps=-1e-5), "eps must be at least 0; got -1e-05"),
    (dict(eps=0, training=True), "eps must be positive in training; got 0"),
    (dict(running_mean=torch.zeros(4, requires_grad=True)), "running_mean must not require a gradient: it has none"),
    (dict(running_var=torch.ones(4, requires_grad=True)), "running_var must not require a gradient: it has none"),
    (dict(batch_groups=True), "batch_groups must divide the batch of 2 images; got True"),
    (dict(padding="same"), "padding must be an int or a pair of ints; got 'same'"),
]
TYPE_ERRORS = [
    *((dict([(name, None)]), f"{name} must be a tensor; got NoneType") for name in ("x", "weight")),
    *((dict([(name, [1.0])]), f"{name} must be a tensor; got list") for name in ("x", "weight", *VECTORS)),
    *((dict([(name, long)]), f"{name} must be floating point; got torch.int64") for name in ("x", "weight", *VECTORS)),
    (dict(x=torch.randn(2, 3, 6, 6, dtype=torch.float64)), "x and weight must have one dtype; got torch.float64 and"),
    *((dict([(name, torch.ones(4).double())]), f"{name} must be in torch.float32, that of x; got") for name in VECTORS),
    *((dict([(name, torch.ones(4).half())]), f"{name} must be in torch.float32, that of x; got") for name in VECTORS),
    (dict(momentum=None), "momentum must be a number or a 0-dim tensor; got None"),
    (dict(momentum="0.1"), "momentum must be a number or a 0-dim tensor; got '0.1'"),
    (dict(momentum=torch.ones(4)), "momentum must be a number or a 0-dim tensor"),
    (dict(eps=None), "eps must be a number; got None"),
    *((dict(training=value), f"training must be True or False; got {value!r}") for value in ("no", 1, None)),
    (dict(activation="leaky_relu", negative_slope="x"), "negative_slope must be a number; got 'x'"),
]


def case_id(value):
    return re.sub(r"[^\w.,;()'-]+", "_", value) if isinstance(value, str) else ""


def assert_refused(error, message, operator, given):
    kept = {name: given[name].clone() for name in VECTORS if isinstance(given[name], torch.Tensor)}
    with pytest.raises(error, match=re.escape(message)):
        operator(**given)
    for name in ("running_mean", "running_var"):
        if name in kept and not given[name].is_meta:
            assert torch.equal(given[name], kept[name])


@both
@pytest.mark.parametrize(("changes", "message"), VALUE_ERRORS, ids=case_id)
def test_value_errors(operator, transposed, changes, message):
    assert_refused(ValueError, message, operator, arguments(transposed) | changes)


@both
@pytest.mark.parametrize(("changes", "message"), TYPE_ERRORS, ids=case_id)
def test_type_errors(operator, transposed, changes, message):
    assert_refused(TypeError, message, operator, arguments(transposed) | changes)


@both
def test_weight_on_another_device(operator, transposed):
    given = arguments(transposed)
    with pytest.raises(ValueError, match="weight must be on the device of x, cpu; got meta"):
        operator(**given | dict(weight=given["weight"].to("meta")))


@both
def test_channel_axis_in_the_message(operator, transposed):
    given = arguments(transposed)
    given["weight"] = given["weight"].transpose(0, 1)
    axis = 0 if transposed else 1
    with pytest.raises(ValueError, match=rf"x must have 4 channels, as weight \(.*\) has on axis {axis}; got shape"):
        operator(**given)


def test_output_padding():
    given = arguments(True)
    message = re.escape("output_padding must be less than stride (2, 2); got (0, 2)")
    for padding in ([0, 2], (0, 2)):
        with pytest.raises(ValueError, match=message):
            fused.conv_transpose2d_bn_act(**given, stride=2, output_padding=padding)
    with pytest.raises(ValueError, match="output_padding must be less than stride"):
        fused.conv_transpose2d_bn_act(**given, output_padding=1)
    with pytest.raises(ValueError, match="output_padding must be at least 0; got -1"):
        fused.conv_transpose2d_bn_act(**given, output_padding=-1)
    with pytest.raises(ValueError, match="output_padding must be an int or a pair of ints; got 'x'"):
        fused.conv_transpose2d_bn_act(**given, output_padding="x")
    assert fused.conv_transpose2d_bn_act(**given, stride=(1, 2), output_padding=(0, 1)).shape == (2, 4, 8, 14)


def test_too_small():
    given = arguments()
    with pytest.raises(ValueError, match=re.escape("x of 2×2 is too small for kernel (3, 3)")):
        fused.conv2d_bn_act(**given | dict(x=torch.randn(2, 3, 2, 2)))
    with pytest.raises(ValueError, match=re.escape("the output would be -1×-1")):
        fused.conv_transpose2d_bn_act(**arguments(True) | dict(x=torch.randn(2, 3, 1, 1)), padding=2)


@both
def test_one_value_per_channel(operator, transposed):
    given = arguments(transposed)
    given["weight"] = given["weight"][..., :1, :1]
    given["x"] = torch.randn(1, 3, 1, 1)
    message = re.escape("Expected more than 1 value per channel when training, got output size (1, 4, 1, 1)")
    with pytest.raises(ValueError, match=message):
        operator(**given)
    assert operator(**given | dict(training=False)).shape == (1, 4, 1, 1)
    without = {name: given[name] for name in ("x", "weight", "bias")}
    assert operator(**without, training=True).shape == (1, 4, 1, 1)


@both
def test_accepted(operator, transposed):
    given = arguments(transposed)
    for activation in ACTIVATIONS:
        assert operator(**given, activation=activation).shape[:2] == (2, 4)
    operator(**given, activation="relu", negative_slope=-1)  # of no other activation
    operator(**given, activation="relu", activation_first=True)
    operator(**given, momentum=torch.tensor(0.5), stride=[1, 2], padding=(1, 0))
    assert operator(**given | dict(x=given["x"][:0], training=False)).shape[:2] == (0, 4)


LOSSES = {
    "logits_list": (dict(fake_logits=[0.0]), TypeError, "fake_logits must be a tensor; got list"),
    "logits_int": (dict(fake_logits=long), TypeError, "fake_logits must be floating point; got torch.int64"),
    "logits_empty": (
        dict(fake_logits=torch.zeros(0, 3)),
        ValueError,
        "fake_logits must not be empty; got shape (0, 3)",
    ),
}
DISCRIMINATOR_LOSSES = {
    "real_none": (dict(real_logits=None), TypeError, "real_logits must be a tensor; got NoneType"),
    "real_int": (dict(real_logits=long), TypeError, "real_logits must be floating point; got torch.int64"),
    "real_empty": (dict(real_logits=torch.zeros(0)), ValueError, "real_logits must not be empty; got shape (0,)"),
    "devices": (dict(fake_logits=torch.zeros(3, **meta)), ValueError, "logits must be on one device; got cpu, meta"),
    "real_above": (dict(real_target=1.1), ValueError, "real_target must be between 0 and 1; got 1.1"),
    "real_below": (dict(real_target=-0.1), ValueError, "real_target must be between 0 and 1; got -0.1"),
    "fake_above": (dict(fake_target=2), ValueError, "fake_target must be between 0 and 1; got 2"),
    "real_string": (dict(real_target="1"), TypeError, "real_target must be a number between 0 and 1; got '1'"),
    "fake_many": (
        dict(fake_target=torch.ones(2)),
        TypeError,
        "fake_target must be a number between",
    ),
    "both": (dict(real_target=2, fake_target=3), ValueError, "real_target must be between 0 and 1; got 2"),
    "fake_nan": (dict(fake_target=float("nan")), ValueError, "fake_target must be between 0 and 1; got nan"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_generator_loss(case):
    changes, error, message = LOSSES[case]
    with pytest.raises(error, match=re.escape(message)):
        fused.generator_bce(**changes)


@pytest.mark.parametrize("case", [*LOSSES, *DISCRIMINATOR_LOSSES])
def test_discriminator_loss(case):
    changes, error, message = (LOSSES | DISCRIMINATOR_LOSSES)[case]
    with pytest.raises(error, match=re.escape(message)):
        fused.discriminator_bce(**dict(real_logits=torch.zeros(3), fake_logits=torch.zeros(3)) | changes)


LOSSES_OF_PARTS = {
    "logits_list": (dict(logits=[0.0]), TypeError, "logits must be a tensor; got list"),
    "logits_empty": (dict(logits=torch.zeros(0)), ValueError, "logits must not be empty; got shape (0,)"),
    "logits_odd": (dict(logits=torch.zeros(5, 2)), ValueError, "two equal parts for two targets; got shape (5, 2)"),
    "logits_single": (dict(logits=torch.tensor(0.0)), ValueError, "two equal parts for two targets; got shape ()"),
    "target_above": (dict(targets=(1.0, 2.0)), ValueError, "targets[1] must be between 0 and 1; got 2.0"),
    "targets_none": (dict(targets=()), ValueError, "targets must be one or two numbers in a tuple; got ()"),
    "targets_three": (dict(targets=(1, 0, 1)), ValueError, "targets must be one or two numbers in a tuple; got (1, 0"),
    "targets_number": (dict(targets=1.0), ValueError, "targets must be one or two numbers in a tuple; got 1.0"),
}


@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("case", LOSSES_OF_PARTS)
def test_loss_of_a_training_step(case, means):
    changes, error, message = LOSSES_OF_PARTS[case]
    given = dict(logits=torch.zeros(4, requires_grad=True), targets=(1.0, 0.0)) | changes
    for function in (backward_bce, backward_bce_of_torch):
        with pytest.raises(error, match=re.escape(message)):
            function(**given, scaler=torch.amp.GradScaler("cpu", enabled=False), means=means)


@pytest.mark.parametrize(
    "value, least, most, allowed",
    [
        (-1, 0, None, "a non-negative integer"),
        (True, 1, None, "a positive integer"),
        (1, 2, None, "an integer of at least 2"),
        (5, 0, 0, "an integer from 0 to 0"),
        (2.0, 1, 8, "an integer from 1 to 8"),
    ],
)
def test_integers(value, least, most, allowed):
    with pytest.raises(ValueError, match=re.escape(f"size must be {allowed}; got {value}")):
        check_integer("size", value, least, most)


def test_the_first_few_of_many():
    assert first_few([]) == "" and first_few([1, 2]) == "1, 2"
    assert first_few("abcdef", "; ") == "a; b; c; d; e; …"


def call_each():
    for operator, transposed in OPERATORS:
        yield lambda operator=operator, transposed=transposed: operator(**arguments(transposed))
    yield lambda: fused.generator_bce(torch.zeros(3))
    yield lambda: fused.discriminator_bce(torch.zeros(3), torch.zeros(3))


@pytest.mark.parametrize("value", ["cuda", "", "Triton", "TRITON", "reference "])
def test_unknown_backend(monkeypatch, value):
    monkeypatch.setenv("FASTGAN_BACKEND", value)
    message = re.escape(f"FASTGAN_BACKEND must be one of auto, triton, reference; got {value!r}")
    for call in call_each():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("interpret", [None, "0", "false", ""])
def test_triton_on_cpu_tensors(monkeypatch, interpret):
    pytest.importorskip("triton", reason="the triton package is not installed")
    monkeypatch.setenv("FASTGAN_BACKEND", "triton")
    if interpret is not None:
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
    for call in call_each():
        with pytest.raises(
            ValueError, match=r"FASTGAN_BACKEND=triton, but the tensors are on 'cpu'.*TRITON_INTERPRET=1"
        ):
            call()


def test_triton_not_installed(monkeypatch):
    monkeypatch.setattr("fastgan.backend.HAS_TRITON", False)
    monkeypatch.setenv("FASTGAN_BACKEND", "triton")
    for call in call_each():
        with pytest.raises(ValueError, match="FASTGAN_BACKEND=triton, but the triton package is not installed"):
            call()
