"""Benchmark files as pytest-benchmark writes them, made by hand, and reports of them."""

from tests.processes import main_of

report = main_of("report")
DEVICE = "Test GPU 9000"
ABOUT = {"device": DEVICE, "torch": "2.99.0", "triton": "3.99.0"}


def benchmark(group, seconds, **extra):
    info = {"variant": "ceiling", "batch": None, "image_size": None, "dtype": "bfloat16", **ABOUT, **extra}
    return {
        "name": f"test_{group}[{info['variant']}]",
        "group": group,
        "stats": {"median": seconds},
        "extra_info": info,
    }


def step(variant, images_per_sec, batch=128, dtype="bfloat16", memory=100.0, image_size=64, **extra):
    work = {"flops_per_image": 2e9, "bytes_per_image": 6e6, "bytes_per_step": 128e6}
    seconds = batch / images_per_sec if isinstance(images_per_sec, float) else 1.0
    info = {"batch": batch, "dtype": dtype, "image_size": image_size, "images_per_sec": images_per_sec}
    return benchmark("train step", seconds, variant=variant, peak_memory_mb=memory, **info, **work, **extra)


def layer(name, variant, direction, microseconds, **extra):
    info = {"layer": name, "direction": direction, "microseconds": microseconds, "flops": 2e9, "bytes": 1e6}
    return benchmark("layers", microseconds / 1e6, variant=variant, batch=128, images_per_sec=1.0, **info, **extra)


def model(network, variant, microseconds, memory):
    info = {"network": network, "image_size": 32, "microseconds": microseconds, "peak_memory_mb": memory}
    return benchmark("models", microseconds / 1e6, variant=variant, batch=8, images_per_sec=1.0, **info)


def without(entry, key):
    del entry["extra_info"][key]
    return entry


def content(*benchmarks, not_run=()):
    return {"datetime": "2026-01-02T03:04:05+00:00", "benchmarks": list(benchmarks), "not_run": list(not_run)}


def complete():
    steps = [
        step("eager-fp32", 1000.0, dtype="float32"),
        step("compile-graph-bf16", 20000.0, memory=80.0),
        step("compile-graph-bf16", 40000.0, batch=1024),
        step("stock-step-graph-bf16", 25000.0),
        step("fused-bf16", 50000.0, memory=60.0),
        step("fused-bf16", 30000.0, batch=1024, memory=508.0),
    ]
    layers = [
        *(layer("G1", variant, "forward", t) for variant, t in (("stock", 30.0), ("fused", 10.0))),
        *(layer("G1", variant, "forward+backward", t) for variant, t in (("stock", 60.0), ("fused", 80.0))),
    ]
    models = [
        *(model("unet", v, t, m) for v, t, m in (("stock", 90, 20), ("fused", 60, 15), ("fused-backend", 45, 16))),
        *(model("critic", v, t, m) for v, t, m in (("stock", 30, 9), ("fused", 45, 8))),
    ]
    others = [
        benchmark("ceilings", 1.0, tflops=500.0),
        benchmark("ceilings", 1.0, tb_per_sec=2.0),
        *(
            benchmark(
                "losses",
                1.0,
                variant=v,
                batch=8,
                loss="generator",
                launched="in a graph",
                microseconds=t,
                images_per_sec=1,
            )
            for v, t in (("eager", 40.0), ("compile", 20.0), ("fused", 5.0))
        ),
        benchmark("generate", 1.0, variant="eager-bf16", batch=128, images_per_sec=1e6),
        benchmark("generate", 1.0, variant="fused-graph-bf16", batch=128, images_per_sec=2e6),
        benchmark("data", 1.0, variant="resident", batch=128, images_per_sec=3e6),
    ]
    info = {"variant": "compile-bf16", "batch": 128, "image_size": 64}
    reason = "AssertionError: a | b"
    not_run = [{"fullname": "bench_train_step.py::test_train_step[x]", "extra_info": info, "reason": reason}]
    return content(*steps, *layers, *models, *others, not_run=not_run)


PROFILE = {
    "datetime": "2026-01-02T03:04:05+00:00",
    **ABOUT,
    "profiles": [
        {
            **{"variant": "fused-bf16", "batch": 128, "image_size": 64, "step_us": 500.0, "launches": 40},
            **{"gpu_busy": 0.97, "gpu_busy_in_trace": 0.9, "kernel_us": {f"kernel_{i}": 20.0 - i for i in range(20)}},
        }
    ],
}


def run(*arguments):
    return report([*arguments, "--root", "."])


def cells(page, *starts):
    """The cells of the one table row that begins with these."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in page.splitlines() if line[:1] == "|"]
    (row,) = [line for line in lines if line[: len(starts)] == [str(start) for start in starts]]
    return row
