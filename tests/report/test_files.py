"""The files that scripts/report.py keeps, and those that it refuses."""

import json
from pathlib import Path

import pytest

from tests.report.files import PROFILE, cells, complete, content, layer, report, run, step, without


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


def test_no_folder_without_something_to_keep(write, capsys):
    write("p.json", PROFILE)
    assert report(["--root", "new/root"]) == report(["p.json", "--root", "new/root"]) == 2
    assert "holds no results" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["p.json"]


def test_refuses_a_missing_file_two_of_one_device_and_an_empty_folder(write, capsys):
    assert run("none.json") == 2
    assert "none.json cannot be read" in capsys.readouterr().err
    assert run(write("a.json", complete()), write("b.json", complete())) == 2
    assert "a.json and b.json are both from Test GPU 9000" in capsys.readouterr().err
    assert run() == 2
    assert "holds no results" in capsys.readouterr().err


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
