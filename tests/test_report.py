"""scripts/report.py on small files made by hand: the numbers in its tables, what it keeps, what it refuses."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import plots, profiling, reading, tables, timing
from tests.processes import ROOT, main_of, run_compiling

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


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write_json(name, content):
        Path(name).write_text(content if isinstance(content, str) else json.dumps(content))
        return name

    return write_json


def run(*arguments):
    return report([*arguments, "--root", "."])


def cells(page, *starts):
    """The cells of the one table row that begins with these."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in page.splitlines() if line[:1] == "|"]
    (row,) = [line for line in lines if line[: len(starts)] == [str(start) for start in starts]]
    return row


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


def test_keeps_files_as_they_are_and_draws(write):
    measured, profile = write("b.json", complete()), write("p.json", PROFILE)
    assert run(measured, profile) == 0
    results = Path("benchmarks/results")
    assert (results / "test-gpu-9000.json").read_bytes() == Path(measured).read_bytes()
    assert (results / "test-gpu-9000-profile.json").read_bytes() == Path(profile).read_bytes()
    page = Path("RESULTS.md").read_text()
    for kind in ("throughput", "profile"):
        assert (results / f"test-gpu-9000-{kind}.png").stat().st_size > 1000
        assert f"(benchmarks/results/test-gpu-9000-{kind}.png)" in page
    assert cells(page, "64×64, batch 128", "fused-bf16")[2:] == ["500", "40", "97%", "90%"]
    # Later, from the files that were kept alone.
    Path("RESULTS.md").unlink()
    assert run() == 0
    assert Path("RESULTS.md").read_text() == page


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
    on_cpu, on_gpu = (reading.Run(device, "", "", None, rows) for device in ("CPU, 4 threads", DEVICE))
    assert dict(plots.lines(on_cpu, 64)) == {
        "fused-fp32": [(2, 80.0), (4, 90.0)],
        "eager, in turn with fused-fp32": [(2, 50.0), (4, 50.0)],
    }
    assert dict(plots.lines(on_gpu, 64))["eager-fp32"] == [(4, 100.0)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is no JSON"),
        ("[]", "no JSON of pytest-benchmark"),
        ('{"benchmarks": 3}', "no JSON of pytest-benchmark"),
        (json.dumps(content()), "holds no timings"),
        (json.dumps(content({"name": "test_a"})), "incomplete"),
        (json.dumps(content({"name": "test_a", "group": None, "extra_info": {}, "stats": {"median": 1}})), "test_a"),
        (json.dumps(content(step("a", 1.0), {**step("a", 1.0, device="another")})), "must come from one device"),
        (json.dumps({"profiles": [{}], "datetime": ""}), "incomplete"),
        (json.dumps(content(without(step("a", 1.0), "bytes_per_step"))), "has no bytes_per_step"),
        (json.dumps(content(without(layer("G1", "fused", "forward", 1.0), "direction"))), "has no direction"),
        (json.dumps(content(step("a", "fast"))), "images_per_sec of benchmark test_train step[a] must be a positive"),
        (json.dumps(content(step("a", 1.0), not_run=["test_b"])), "not_run"),
        (
            json.dumps(content({**step("a", 1.0), "group": ["a"]})),
            "group of benchmark test_train step[a] must be a text",
        ),
        ("[" * 100_000, "is no JSON"),
    ],
)
def test_refuses_other_files_and_writes_nothing(write, capsys, text, expected):
    good = write("good.json", complete())
    bad = write("bad.json", text)
    assert run(good, bad) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: bad.json") and expected in message and message.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == ["bad.json", "good.json"]


@pytest.mark.parametrize(
    ("group", "field", "value"),
    [
        ("train step", "peak_memory_mb", "n/a"),
        ("train step", "peak_memory_mb", -1.0),
        *(("train step", "variant", value) for value in (None, 3, ["fused"])),
        *(("train step", "device", value) for value in ("", "...", 3, ["a"])),
        *(("train step", "images_per_sec", value) for value in (float("inf"), float("nan"), -1.0, 0, 10**400)),
        *(("train step", "batch", value) for value in (None, 0, True)),
        ("train step", "image_size", None),
        ("train step", "torch", None),
        ("layers", "layer", ["G1"]),
        ("layers", "against_eager", "fast"),
        ("losses", "microseconds", None),
        ("ceilings", "tflops", "many"),
    ],
)
def test_refuses_what_the_tables_could_not_show(write, capsys, group, field, value):
    """By file and field, before it takes the place of what could be shown."""
    assert run(write("good.json", complete())) == 0
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    bad = complete()
    entry = next(entry for entry in bad["benchmarks"] if entry["group"] == group)
    entry["extra_info"][field] = value
    capsys.readouterr()
    assert run(write("bad.json", bad)) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: bad.json: {field} of benchmark {entry['name']} must be"), message
    assert message.count("\n") == 1
    Path("bad.json").unlink()
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"device": 3}, "device must be a text"),
        ({"torch": None}, "torch must be a text"),
        ({"profiles": []}, "no step"),
        ({"profiles": [PROFILE["profiles"][0] | {"step_us": None}]}, "step_us of the profile of fused-bf16"),
        ({"profiles": [PROFILE["profiles"][0] | {"kernel_us": {"a": "1"}}]}, "kernel_us of the profile of fused-bf16"),
        ({"profiles": [PROFILE["profiles"][0] | {"gpu_busy": "97%"}]}, "gpu_busy of the profile of fused-bf16"),
        ({"device": "Another GPU"}, "a profile of Another GPU, of which there are no timings"),
    ],
)
def test_refuses_profiles_that_could_not_be_shown(write, capsys, change, expected):
    assert run(write("b.json", complete()), write("p.json", PROFILE | change)) == 2
    assert expected in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["b.json", "p.json"]


def test_what_is_not_there_may_be_null(write):
    machine = {"device": "CPU, 4 threads", "triton": None, "dtype": "float32"}
    bare = {"against_eager": None, "eager_images_per_sec": None, **machine}
    measured = [step(variant, 9.0, memory=None, **bare) for variant in ("eager-fp32", "compile-fp32", "fused-fp32")]
    not_run = [{"fullname": "bench_train_step.py::test_x", "extra_info": {"image_size": 64}, "reason": "none"}]
    assert run(write("b.json", content(*measured, not_run=not_run))) == 0
    assert cells(Path("RESULTS.md").read_text(), 128, "fused-fp32")[3:6] == ["–", "14,222", "1.00"]


def test_a_selection_does_not_take_the_place_of_the_whole(write, capsys):
    assert run(write("b.json", complete())) == 0
    page, kept = Path("RESULTS.md").read_bytes(), Path("benchmarks/results/test-gpu-9000.json").read_bytes()
    losses = [entry for entry in complete()["benchmarks"] if entry["group"] == "losses"]
    capsys.readouterr()
    assert run(write("l.json", content(*losses))) == 2
    output = capsys.readouterr()
    assert "which has timings of ceilings, data, generate, layers, models, train step too" in output.err
    assert "--go-on=l.json" in output.err and output.err.count("\n") == 1 and not output.out
    assert Path("RESULTS.md").read_bytes() == page
    assert Path("benchmarks/results/test-gpu-9000.json").read_bytes() == kept
    # All that went wrong with the others is a result too; and elsewhere nothing is lost.
    assert report([write("l.json", content(*losses)), "--root", "elsewhere"]) == 0
    named = [{**entry, "fullname": f"bench_{entry['group']}.py::test"} for entry in complete()["benchmarks"]]
    write("benchmarks/results/test-gpu-9000.json", content(*named))
    failed = [{"fullname": e["fullname"], "extra_info": {}, "reason": "x"} for e in named if e["group"] != "losses"]
    assert run(write("f.json", content(*losses, not_run=failed))) == 0


def test_what_a_run_would_lose_is_said_before_it(write, capsys, monkeypatch):
    assert run(write("b.json", complete())) == 0
    monkeypatch.setitem(report.__globals__, "measure", None)
    assert run("--run", write("l.json", content(step("a", 1.0)))) == 2
    assert "l.json would take the place of" in capsys.readouterr().err
    monkeypatch.setattr(timing, "device_name", lambda: DEVICE)
    assert run("--run") == 2  # without models
    assert capsys.readouterr().err.startswith("error: --models are in benchmarks/results/test-gpu-9000.json")


def test_no_folder_without_something_to_keep(write, capsys):
    write("p.json", PROFILE)
    assert report(["--root", "new/root"]) == report(["p.json", "--root", "new/root"]) == 2
    assert "holds no results" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["p.json"]


def test_goes_on_without_a_reader(write, monkeypatch):
    """As in `report.py | head -0`."""

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Closed())
        assert run(write("b.json", complete())) == 0
    assert Path("RESULTS.md").exists()


def test_notes_in_files_are_on_the_page(write):
    measured, profile = complete() | {"note": "In two parts."}, PROFILE | {"note": "Of another version."}
    assert run(write("b.json", measured), write("p.json", profile)) == 0
    page = Path("RESULTS.md").read_text()
    assert "copying 2.0 TB/s. In two parts.\n" in page and "lengthens the gaps. Of another version.\n" in page


def test_refuses_a_missing_file_two_of_one_device_and_an_empty_folder(write, capsys):
    assert run("none.json") == 2
    assert "none.json cannot be read" in capsys.readouterr().err
    assert run(write("a.json", complete()), write("b.json", complete())) == 2
    assert "a.json and b.json are both from Test GPU 9000" in capsys.readouterr().err
    assert run() == 2
    assert "holds no results" in capsys.readouterr().err


@pytest.mark.parametrize("options", (["--full"], ["--models"], ["--no-checks"], ["--run", "--root", "afile"]))
def test_refuses_before_anything_is_measured(write, capsys, options, monkeypatch):
    write("afile", "mine")
    monkeypatch.setitem(report.__globals__, "measure", None)
    assert report(options) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {options[-2] if len(options) > 1 else options[0]}"), message
    assert message.count("\n") == 1 and Path("afile").read_text() == "mine"


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt(), 130), (OSError("No space left on device"), 2)])
def test_what_was_measured_is_not_lost(error, status, write, capsys, monkeypatch):
    """Where it cannot be kept, or the run is stopped, a file is left, and what was there before stays whole."""
    Path("benchmarks/results").mkdir(parents=True)
    before = write("benchmarks/results/test-gpu-9000.json", content(step("fused-bf16", 1.0)))
    good, left = Path(before).read_bytes(), content(step("fused-bf16", 2.0))

    def measure(folder, *_):
        write(folder / "benchmarks-0.json", left)
        write(folder / "fused-bf16-64px.json", {"traceEvents": []})  # a trace, which nothing takes in
        if isinstance(error, KeyboardInterrupt):
            raise error
        return [folder / "benchmarks-0.json"], True

    def write_bytes(path, content):
        path.write_text("half of")
        raise error

    monkeypatch.setitem(report.__globals__, "measure", measure)
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    assert run("--run") == status
    (kept,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("measured by then: ")]
    file = Path(kept.removeprefix("measured by then: ").partition(";")[0])
    assert json.loads(file.read_text()) == left
    assert Path(before).read_bytes() == good and sorted(path.name for path in Path(before).parent.iterdir()) == [
        "test-gpu-9000.json"
    ]
    shutil.rmtree(file.parent)


@pytest.mark.parametrize("models", (True, False))
def test_what_cannot_be_measured_is_refused_first(models, write, capsys, monkeypatch):
    monkeypatch.setitem(report.__globals__, "measure", None)
    monkeypatch.setattr(timing, "ON_GPU", False)
    monkeypatch.setattr(timing, "device_name", lambda: DEVICE)
    assert run("--run", *(["--models"] if models else [write("a.json", complete())])) == 2
    message = capsys.readouterr().err
    assert ("measured on a GPU only" if models else "a.json is from this machine") in message


def test_benchmarks_that_end_with_their_process(tmp_path):
    """What the processes before it wrote is reported all the same, and the status says that it is not all."""

    def run(what, *command):
        file = Path(command[3].partition("=")[2])
        file.write_text('{"broke_off": true}' if file.stem.endswith("0") else '{"broke_off": tr')
        return -11

    assert report.__globals__["run_benchmarks"](run, tmp_path, []) == (tmp_path / "benchmarks-0.json", False)


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


def test_two_results_of_one_device_in_the_folder(write, capsys):
    Path("benchmarks/results").mkdir(parents=True)
    write("benchmarks/results/mine.json", complete())
    assert run(write("b.json", complete())) == 2
    assert "mine.json and b.json are both from Test GPU 9000" in capsys.readouterr().err
    assert [path.name for path in Path("benchmarks/results").iterdir()] == ["mine.json"]


def test_other_json_in_the_folder_is_left_out_and_named(write, capsys):
    Path("benchmarks/results").mkdir(parents=True)
    write("benchmarks/results/notes.json", "[1, 2]")
    assert run(write("b.json", complete())) == 0
    assert "notes.json" in capsys.readouterr().out


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


@pytest.mark.parametrize("on_gpu", (True, False))
@pytest.mark.parametrize("models", (True, False))
def test_what_a_run_measures(models, on_gpu, tmp_path, monkeypatch):
    """On a GPU the networks of public GANs take minutes to compile: only where they are asked for."""
    commands = []

    def run_to_its_end(command):
        commands.append(command[2:])
        if "benchmarks" in command:
            (tmp_path / "benchmarks-0.json").write_text('{"broke_off": false}')
        return 0

    monkeypatch.setitem(report.__globals__, "run_to_its_end", run_to_its_end)
    monkeypatch.setattr(timing, "ON_GPU", on_gpu)
    measured = [tmp_path / "benchmarks-0.json", *([tmp_path / "profile.json"] if on_gpu else [])]
    assert report.__globals__["measure"](tmp_path, False, models, True) == (measured, True)
    (benchmarks,) = (command for command in commands if "benchmarks" in command)
    assert ("--ignore=benchmarks/bench_models.py" in benchmarks) == (not models)
    assert any("gpu" in command for command in commands) == on_gpu


LOSING = """
import pytest
from benchmarks import timing
from benchmarks.conftest import *  # the hooks

lost = []
timing.gpu_is_lost = lambda: bool(lost)


@pytest.fixture
def lose_gpu():
    lost.append(True)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""
TIMED = """
import pytest

pytestmark = pytest.mark.benchmark(group="ceilings")

def test_a(benchmark):
    benchmark(lambda: None)

def test_b(benchmark, lose_gpu):
    pass

def test_c(benchmark):
    benchmark(lambda: None)

def test_d(benchmark, lose_gpu):
    pass
"""


def test_goes_on_where_an_error_took_the_gpu_away(tmp_path):
    """Each such error costs the one benchmark that it is in, and the run ends when none is left."""
    (tmp_path / "conftest.py").write_text(LOSING)
    (tmp_path / "test_timed.py").write_text(TIMED)
    statuses = []
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}

    def run(what, module, quiet, folder, *options):
        command = [sys.executable, "-m", module, quiet, str(tmp_path), *options, "-p", "no:cacheprovider"]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        statuses.append(done.returncode)
        return done.returncode

    file, complete = report.__globals__["run_benchmarks"](run, tmp_path, [])
    assert complete
    content = json.loads(file.read_text())
    assert [entry["name"] for entry in content["benchmarks"]] == ["test_a", "test_c"]
    assert [entry["fullname"].partition("::")[2] for entry in content["not_run"]] == ["test_b", "test_d"]
    assert all("illegal memory access" in entry["reason"] for entry in content["not_run"])
    assert statuses == [2, 1]


def test_says_which_package_is_missing(monkeypatch, capsys):
    """With what training needs alone there is no pytest."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pytest", None)
    with pytest.raises(SystemExit) as stopped:
        main_of("report")
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "pytest" in message and ".[dev]" in message and message.count("\n") == 1
