"""Images per second of one whole G + D update, every variant side by side: `pytest benchmarks/bench_train_step.py`.

A variant is timed only after a check in the same run: from the state that it has trained to by then, it and the plain
float32 example take three more steps from one seed, and their losses agree within TOLERANCE.
"""

import functools

import pytest
import torch

from benchmarks.stock import (
    BATCHES,
    GROWING,
    IMAGE_SIZES,
    LARGEST_BATCH,
    VARIANTS,
    WARM_UP,
    ExampleStep,
    Setting,
    precision_of,
)
from benchmarks.timing import DEVICE, ON_GPU, PeakMemory, clock, describe, fixed, forget, measure_in_turn
from fastgan.cpu.capabilities import lacks_avx512

pytestmark = pytest.mark.benchmark(group="train step", timer=clock)

FULL = [Setting(size, batch) for size in IMAGE_SIZES for batch in BATCHES]
SHORT = [Setting(64, 128), Setting(64, 1024)]
CPU = [Setting(28, 32), Setting(64, 16)]  # the default run on digits, and the example DCGAN
# Of `GROWING` alone.
GROWTH = [Setting(64, LARGEST_BATCH)] if ON_GPU else [Setting(28, batch) for batch in (8, 16, 64, 128)]
CHECKED_STEPS = 3
SECONDS = 0.5 if ON_GPU else 1.0
# (relative, absolute) difference of a loss after up to three steps. In bfloat16 a logit is right to some 1 %, and a
# loss is a difference of logits; TF32, which torch's convolutions use on a GPU, is a third as coarse.
TOLERANCE = {"fp32": (0.03, 0.02) if ON_GPU else (0.01, 0.005), "bf16": (0.06, 0.03)}


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("--full", default=False)
    settings = (FULL if full else SHORT) if ON_GPU else CPU
    cases = [(setting, variant) for setting in settings for variant in VARIANTS]
    cases += [(setting, GROWING[DEVICE.type]) for setting in GROWTH]
    metafunc.parametrize("setting, variant", cases, ids=[f"{setting}-{variant}" for setting, variant in cases])


def test_train_step(benchmark, setting, variant):
    precision = precision_of(variant)
    describe(benchmark, variant=variant, batch=setting.batch, image_size=setting.image_size, precision=precision)
    benchmark.extra_info.update(setting.work(precision))
    without_stock = not ON_GPU and lacks_avx512() and precision == "bf16" and setting.image_size >= 64
    if without_stock and not variant.startswith("fused"):
        pytest.skip("a step takes ten seconds and more: PyTorch has no fast convolutions in bf16 without AVX-512")
    forget()
    images = setting.images()
    memory = PeakMemory()
    with memory.watching_captures():
        step = VARIANTS[variant](setting.networks(), images)
        for _ in range(WARM_UP):
            step(images)
    peak = memory.steady(lambda: step(images))
    check(step, setting, images, TOLERANCE[precision])

    eager, stock = None, f"eager-{precision}"
    if not ON_GPU and variant != stock and not without_stock:
        eager = functools.partial(VARIANTS[stock](setting.networks(), images), images)
    median, of_eager = measure_in_turn(benchmark, lambda: step(images), eager, seconds=SECONDS)
    benchmark.extra_info.update(images_per_sec=fixed(setting.batch / median), peak_memory_mb=peak)
    if eager:
        benchmark.extra_info.update(eager_images_per_sec=fixed(setting.batch / of_eager))


def check(step, setting, images, tolerance):
    """From the state of `step`, its losses over a few steps are those of the float32 example."""
    example = ExampleStep(*setting.networks())
    for name in ("generator", "discriminator"):
        getattr(example, name).load_state_dict(getattr(step, name).state_dict())
    for name in ("optimizer_g", "optimizer_d"):
        copy_adam(getattr(step, name), getattr(example, name))
    rows = []
    for run in (step, example):
        torch.manual_seed(1)
        rows.append([{name: value.item() for name, value in run(images).items()} for _ in range(CHECKED_STEPS)])
    relative, absolute = tolerance
    for i, (ours, theirs) in enumerate(zip(*rows, strict=True), start=1):
        for name, expected in theirs.items():
            # Written so that a NaN fails.
            if not abs(ours[name] - expected) <= relative * abs(expected) + absolute:
                limits = f"allowed: {relative:.0%} + {absolute}"
                pytest.fail(f"wrong: {name} {ours[name]:.4f} at step {i}, example {expected:.4f} ({limits})", False)


def copy_adam(source, target):
    """Give ``target`` the moments of ``source``; how it computes stays its own affair."""
    state = {}
    for index, moments in source.state_dict()["state"].items():
        copies = state[index] = {name: value.clone() for name, value in moments.items()}
        copies["step"] = copies["step"].float().cpu()  # where Adam keeps it, unless it is fused or capturable
    target.load_state_dict({"state": state, "param_groups": target.state_dict()["param_groups"]})
