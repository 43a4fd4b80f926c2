"""The page that scripts/report.py writes: the numbers in its tables, and its pictures."""

from pathlib import Path

import pytest

from benchmarks import plots, profiling, reading, tables
from tests.processes import ROOT, run_compiling
from tests.report.files import DEVICE, PROFILE, benchmark, cells, complete, content, layer, run, step


def test_numbers_of_the_tables(write):
    assert run(write("b.json", complete())) == 0
    page = Path("RESULTS.md").read_text()
    assert "## Test GPU 9000" in page and "2026-01-02" in page and "torch 2.99.0 and triton 3.99.0" in page
    # 50,000 images/s: 2.5 times the best stock, 50 times the example; 2 GFLOP at 500 TFLOP/s are 4 µs of 20 µs an
    # image; 6 MB and 128 MB / 128 at 2 TB/s are 3.5 µs.
    row = cells(page, 128, "fused-bf16")
    assert row[2:] == ["50,000", "2.56", "2.50", "50.00", "20%", "18%", "60", "0.75"]
    faster = content(*complete()["benchmarks"], benchmark("ceilings", 1.0, tflops=1000.0, dtype="float32"))
    assert run(write("faster.json", faster)) == 0  # bfloat16 can be computed in float32
    assert cells(Path("RESULTS.md").read_text(), 128, "fused-bf16")[6] == "10%"
    assert cells(page, 1024, "fused-bf16")[4] == "0.75"  # a losing row stays
    assert cells(page, 128, "eager-fp32")[4:7] == ["0.05", "1.00", "–"]  # no ceiling in float32 was measured
    assert cells(page, 128, "stock-step-graph-bf16")[4] == "1.25"
    assert cells(page, "G1") == ["G1", "30", "10", "3.00", "60", "80", "0.75", "5%", "–", "–"]
    assert cells(page, "unet") == ["unet", "32×32", "8", "90", "60", "1.50", "45", "2.00", "20", "15", "16"]
    # A losing row stays, and one whose backend could not run.
    assert cells(page, "critic") == ["critic", "32×32", "8", "30", "45", "0.67", "–", "–", "9", "8", "–"]
    assert cells(page, "geometric mean", "", "", "", "", "1.00")[7] == "2.00"
    assert cells(page, "generator", 8)[2:] == ["in a graph", "40", "20", "5", "4.00"]
    assert cells(page, 128, "fused-graph-bf16")[2:4] == ["2,000,000", "2.00"]
    assert cells(page, 128, "resident")[2] == "3,000,000"
    # 20 and 33.3 µs an image; 448 MiB more for 896 images more.
    assert cells(page, "64×64", "fused-bf16", 128)[3:] == ["20", "–", "60", "–"]
    assert cells(page, "64×64", "fused-bf16", 1024)[3:] == ["33.3", "1.67", "508", "0.5"]


def test_says_what_is_missing_and_why(write):
    assert run(write("b.json", complete())) == 0
    page = Path("RESULTS.md").read_text()
    assert r"AssertionError: a \| b" in page
    assert "28×28, batch 64 (every variant)" in page
    # compile-bf16 at batch 128 could not run, which is another thing than not measured.
    assert "64×64, batch 128 (eager-bf16, fused-uncompiled-bf16, fused-eager-bf16, fused-two-passes-bf16)" in page
    assert "64×64, batch 2048 (fused-bf16)" in page


def test_on_a_cpu_ratios_are_of_calls_that_ran_in_turn(write):
    machine = {"device": "CPU, 4 threads", "dtype": "float32"}
    beside = {"against_eager": 1.2, "eager_microseconds": 48.0}  # ratios are medians over pairs, not ratios of these
    of_loss = {"batch": 8, "loss": "generator", "launched": "from Python", "images_per_sec": 1}
    measured = [
        step("eager-fp32", 100.0, **machine),
        step("compile-fp32", 90.0, against_eager=1.5, **machine),
        step("fused-fp32", 120.0, against_eager=2.4, eager_images_per_sec=50.0, **machine),
        step("fused-bf16", 110.0, **machine | {"dtype": "bfloat16"}),  # which had no stock to run in turn with
        layer("G1", "stock", "forward", 30.0, **machine),
        layer("G1", "fused", "forward", 41.0, **beside, **machine),
        benchmark("losses", 1.0, variant="eager", microseconds=30.0, **of_loss, **machine),
        benchmark("losses", 1.0, variant="fused", microseconds=41.0, **beside, **of_loss, **machine),
        benchmark("generate", 1.0, variant="eager-fp32", batch=7, images_per_sec=70.0, **machine),
        benchmark("generate", 1.0, variant="compile-fp32", batch=7, images_per_sec=60.0, against_eager=1.5, **machine),
        benchmark("generate", 1.0, variant="fused-fp32", batch=7, images_per_sec=80.0, against_eager=1.8, **machine),
    ]
    assert run(write("b.json", content(*measured))) == 0
    page = Path("RESULTS.md").read_text()
    assert "No GPU has been measured yet" in page and "ran in turn" in page
    assert cells(page, 128, "fused-fp32")[2:6] == ["120", "50", "1,067", "1.60"]  # 2.4 / 1.5
    assert cells(page, 128, "eager-fp32")[3:6] == ["–", "1,280", "0.67"]
    assert cells(page, 128, "fused-bf16")[2:6] == ["110", "–", "1,164", "–"]
    assert cells(page, "G1")[1:4] == ["48", "41", "1.20"]
    assert cells(page, "generator", 8)[3:] == ["48", "–", "41", "1.20"]
    assert cells(page, 7, "fused-fp32")[2:4] == ["80", "1.20"]  # 1.8 / 1.5
    # One batch makes no line, and does not grow.
    assert not list(Path("benchmarks/results").glob("*.png")) and "How a step grows" not in page


def test_on_a_cpu_lines_are_of_what_ran_in_turn():
    beside = [
        step("fused-fp32", speed, batch=batch, eager_images_per_sec=50.0) for batch, speed in ((4, 90.0), (2, 80.0))
    ]
    rows = [{**row["extra_info"], "group": row["group"]} for row in (step("eager-fp32", 100.0, batch=4), *beside)]
    on_cpu, on_gpu = (reading.BenchmarkRun(device, "", "", None, rows) for device in ("CPU, 4 threads", DEVICE))
    assert dict(plots.lines(on_cpu, 64)) == {
        "fused-fp32": [(2, 80.0), (4, 90.0)],
        "eager, in turn with fused-fp32": [(2, 50.0), (4, 50.0)],
    }
    assert dict(plots.lines(on_gpu, 64))["eager-fp32"] == [(4, 100.0)]


def test_notes_in_files_are_on_the_page(write):
    measured, profile = complete() | {"note": "In two parts."}, PROFILE | {"note": "Of another version."}
    assert run(write("b.json", measured), write("p.json", profile)) == 0
    page = Path("RESULTS.md").read_text()
    assert "copying 2.0 TB/s. In two parts.\n" in page and "lengthens the gaps. Of another version.\n" in page


def test_best_stock_is_of_any_precision_where_ours_have_one():
    entries = [
        {"variant": variant, "dtype": dtype, "device": DEVICE, "images_per_sec": speed}
        for variant, dtype, speed in (("eager-fp32", "float32", 3.0), ("eager-bf16", "bfloat16", 2.0))
    ]
    ours = {"variant": "fused-bf16", "dtype": "bfloat16", "device": DEVICE, "images_per_sec": 9.0}
    assert tables.best_stock(ours, [*entries, ours]) == entries[0]
    in_float32 = {**ours, "variant": "fused-fp32", "dtype": "float32"}
    assert tables.best_stock(ours, [*entries, ours, in_float32]) == entries[1]
    assert tables.best_stock(in_float32, [*entries, ours, in_float32]) == entries[0]


def test_the_page_in_the_repository_is_that_of_its_results():
    results = ROOT / "benchmarks" / "results"
    runs, profiles, _ = reading.load_folder(results)
    page = tables.results(runs, profiles, {path.name for path in results.glob("*.png")})
    assert page == (ROOT / "RESULTS.md").read_text(encoding="utf-8")


def test_a_trace_is_summed_up_by_step():
    kernels = [("gemm", 0, 4), ("gemm", 3, 4), ("norm", 10, 2), ("gemm", 20, 8), ("norm", 30, 2)]  # one starts early
    events = [{"ph": "X", "cat": "kernel", "name": n, "ts": ts, "dur": dur} for n, ts, dur in kernels]
    events.append({"ph": "X", "cat": "cpu_op", "name": "not on the GPU", "ts": 0, "dur": 100})
    found = profiling.summary({"traceEvents": events}, steps=2, step_seconds=10e-6)
    assert found["kernel_us"] == {"gemm": 7.5, "norm": 2.0}  # the second waits for a microsecond
    assert found["launches"] == 2
    assert found["gpu_busy"] == 0.95  # 19 µs in two steps of 10 µs
    assert found["gpu_busy_in_trace"] == round(19 / 32, 3)
    with pytest.raises(ValueError, match="no kernels"):
        profiling.summary({"traceEvents": events[-1:]}, steps=2, step_seconds=1.0)


def test_plots_need_no_backend_of_a_notebook():
    code = "from benchmarks import plots; print(plots._pyplot().get_backend())"
    result = run_compiling("-c", code, MPLBACKEND="nonsense")
    assert result.stdout == "agg\n", result.stderr


def test_kernel_names_become_readable():
    long = "void at::native::vectorized_elementwise_kernel<4, at::native::Add<float> >(int, float*)"
    assert plots.readable(long) == "vectorized_elementwise_kernel"
    assert plots.readable("void at::native::(anonymous namespace)::apply<4>(int)") == "apply"
    assert len(plots.readable("x" * 100)) == 60
    shown = plots.longest({f"k{i}<{i}>": float(i) for i in range(20)})
    assert len(shown) == plots.KERNELS_SHOWN + 1 and sum(shown.values()) == sum(range(20))
