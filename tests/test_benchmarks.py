"""What the benchmarks measure with: the stock steps, and the count of their work. No timing."""

import importlib
import statistics
import types
from pathlib import Path

import pytest
import torch

from benchmarks import timing
from benchmarks.bench_train_step import TOLERANCE, check
from benchmarks.stock import CPU_VARIANTS, GPU_VARIANTS, ExampleStep, Setting, StockStep
from fastgan.cpu import capabilities
from fastgan.fusion import fused_groups

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="of the benchmarks' variants on a CPU")


def test_work_of_the_example_dcgan():
    work = Setting(64, 128).work("bf16")
    assert work["flops_per_image"] == pytest.approx(2.275e9, rel=1e-3)
    assert work["bytes_per_image"] == pytest.approx(6.8e6, rel=1e-2)
    assert work["bytes_per_step"] == (3_576_704 + 2_765_568) * 28
    assert Setting(64, 128).work("fp32")["bytes_per_image"] == 2 * work["bytes_per_image"]


@cpu_only
def test_stock_steps_are_one_algorithm():
    setting = Setting(28, 4)
    images, losses = setting.images(), []
    for kind, options in ((ExampleStep, {}), (StockStep, {"precision": "fp32"})):
        step = kind(*setting.networks(), **options)
        torch.manual_seed(1)
        losses.append([step(images) for _ in range(3)])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


@cpu_only
def test_fused_networks_in_the_stock_loop():
    setting = Setting(28, 4)
    images = setting.images()
    step = GPU_VARIANTS["fused-eager-bf16"](setting.networks(), images)
    assert isinstance(step, StockStep) and fused_groups(step.generator) and fused_groups(step.discriminator)
    for _ in range(3):
        step(images)
    check(step, setting, images, TOLERANCE["bf16"])


@cpu_only
def test_check_passes_what_is_right_and_fails_what_is_not():
    setting = Setting(28, 4)
    images = setting.images()
    step = CPU_VARIANTS["fused-fp32"](setting.networks(), images)
    for _ in range(3):
        step(images)
    check(step, setting, images, (0.01, 0.005))

    def without_updates(images, step=step):
        weights = [p.detach().clone() for p in step.discriminator.parameters()]
        losses = type(step).__call__(step, images)
        with torch.no_grad():
            for parameter, weight in zip(step.discriminator.parameters(), weights, strict=True):
                parameter.copy_(weight)
        return losses

    class Broken:
        generator, discriminator = step.generator, step.discriminator
        optimizer_g, optimizer_d = step.optimizer_g, step.optimizer_d
        __call__ = staticmethod(without_updates)

    with pytest.raises(pytest.fail.Exception, match="wrong: "):
        check(Broken(), setting, images, (0.01, 0.005))


@cpu_only
def test_calls_in_turn_are_compared_pair_by_pair(monkeypatch):
    """On a machine that slows down from call to call neither is ahead for having been earlier."""
    now = [0.0]
    monkeypatch.setattr(timing, "clock", lambda: now[0])

    def taking(seconds):
        def call():
            now[0] += seconds * (1 + now[0])

        return call

    class Benchmark:
        extra_info, enabled, stats = {}, True, types.SimpleNamespace(stats=types.SimpleNamespace(data=[]))

        def pedantic(self, call, *, setup, rounds, iterations, warmup_rounds):
            assert iterations == 1
            for i in range(warmup_rounds + rounds):
                setup()
                start = now[0]
                call()
                if i >= warmup_rounds:
                    self.stats.stats.data.append(now[0] - start)
            self.stats.stats.median = statistics.median(self.stats.stats.data)

    benchmark = Benchmark()
    median, of_eager = timing.measure_in_turn(benchmark, taking(0.001), taking(0.002), seconds=0.01)
    assert benchmark.extra_info["against_eager"] == pytest.approx(2, rel=0.01) and of_eager > 1.9 * median


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("benchmarks/bench_*.py")), ids=lambda p: p.stem)
def test_every_benchmark_waits_for_the_gpu(path):
    """pytest-benchmark reads the mark that is nearest to a test, and no other: each has to name the clock."""
    module = importlib.import_module(f"benchmarks.{path.stem}")
    of_module = getattr(module, "pytestmark", [])
    of_module = of_module if isinstance(of_module, list) else [of_module]
    tests = [function for name, function in vars(module).items() if name.startswith("test_")]
    assert tests
    for test in tests:
        marks = [m for m in [*getattr(test, "pytestmark", []), *of_module] if m.name == "benchmark"]
        assert marks[0].kwargs["timer"] is timing.clock, test.__name__


@pytest.mark.parametrize(
    "has, name",
    [
        ({"avx512_f": True, "avx512_bf16": True}, "CPU, 3 threads of A CPU"),
        ({"avx512_f": True, "avx512_bf16": True, "amx_tile": True}, "CPU, 3 threads of A CPU with AMX"),
        ({"avx512_f": True}, "CPU, 3 threads of A CPU without AVX-512 for bf16"),
        ({"avx2": True}, "CPU, 3 threads of A CPU without AVX-512"),
        ({"architecture": "aarch64"}, "CPU, 3 threads of A CPU"),
    ],
)
def test_kinds_of_cpu_have_names_of_their_own(has, name, monkeypatch):
    monkeypatch.setattr(timing, "ON_GPU", False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    cpu = {"architecture": "x86_64", "cpu_name": "A CPU", **has}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    monkeypatch.setattr(capabilities, "cpu_kind", capabilities.cpu_kind.__wrapped__)  # without its cache
    assert timing.device_name() == name
