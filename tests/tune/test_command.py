"""python -m fastgan.tune: what it refuses, what it writes; a whole tuning where there is a GPU."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

from fastgan import backend
from fastgan.ops import choice
from fastgan.ops.tables import Measurement, read_table
from fastgan.tune import __main__ as command
from fastgan.tune.measure import Candidate, Result
from fastgan.tune.workloads import problems_of
from tests.conftest import HAS_GPU
from tests.processes import run_compiling

SHAPE = "conv:16-32:k4s2p1:8x8+bn"
TILE = {"block_m": 64, "block_n": 32, "block_k": 32, "num_warps": 4, "num_stages": 3}


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_cuda(capsys):
    assert command.main([]) == 2
    assert "CUDA GPU" in capsys.readouterr().err


def test_bad_names(capsys):
    assert command.main(["dcgan63"]) == 2
    assert "dcgan63" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad",
    (
        ["--batch", "0"],
        ["--batch", "many"],
        ["--dtype", "int8"],
        ["--input", "3,x"],
        ["--jobs", "0"],
        ["--jobs", "2,3"],
    ),
)
def test_bad_options(bad, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(bad)
    assert stopped.value.code == 2
    assert bad[1] in capsys.readouterr().err


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """A GPU that is not there, whose every convolution takes 5 µs."""
    from fastgan.tune import session

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA T800")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backend, "capability", lambda index: 90)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path))

    class Compiler:
        def __init__(self, capability, processes=None):
            assert capability == 90

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = start = lambda self, *_: []

    def measure(problem, tiles, device, clock, compile_error):
        assert torch.backends.cudnn.benchmark
        candidates = [Candidate(tiles[0], 5.0), Candidate(tiles[1], float("inf"), failures.get(problem.kind, ""))]
        if problem.operation == "weight_grad" and failures:
            return Result(None, [], "out of memory")
        return Result(Measurement("triton", TILE, 5.0, 7.0, problem.batch), candidates)

    failures = {}
    monkeypatch.setattr(session, "Compiler", Compiler)
    monkeypatch.setattr(session, "measure", measure)
    return failures


def test_writes_the_users_table(pretended, capsys):
    assert command.main([SHAPE, "--batch", "4,8"]) == 0
    path = choice.user_table_path("NVIDIA T800")
    table = json.loads(path.read_text())
    assert table["gpu"] == "NVIDIA T800" and table["torch"] == torch.__version__ and table["triton"]
    problems = problems_of([SHAPE], (4, 8), [torch.bfloat16])
    assert list(read_table(path)) == problems
    printed = capsys.readouterr().out
    assert str(path) in printed and "64×32×32×4×3" in printed
    assert sum("ours" in line and "cuDNN" in line for line in printed.splitlines()) == len(problems)
    assert choice.choose(problems[0], torch.device("cuda", 0)).implementation == "triton"


def test_a_tile_of_positions_is_named_so(pretended, monkeypatch, capsys):
    monkeypatch.setitem(TILE, "by_position", True)
    assert command.main([SHAPE, "--batch", "64"]) == 0
    assert "64×32×32×4×3×2 by position" in capsys.readouterr().out
    assert all(row.tile["by_position"] for row in read_table(choice.user_table_path("NVIDIA T800")).values())


def test_keeps_what_was_measured_with_the_same_versions(pretended, tmp_path, capsys):
    path = tmp_path / "table.json"
    for batch in ("4", "8"):
        assert command.main([SHAPE, "--batch", batch, "--out", str(path)]) == 0
    assert {problem.batch for problem in read_table(path)} == {4, 8}
    path.write_text(path.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    capsys.readouterr()
    assert command.main([SHAPE, "--batch", "16", "--out", str(path)]) == 0
    assert {problem.batch for problem in read_table(path)} == {16}
    assert "measured with torch 1.0" in capsys.readouterr().err


def test_what_has_no_convolutions_is_refused(pretended, capsys):
    assert command.main(["torch.nn:Identity", "--input", "3,8,8"]) == 2
    assert capsys.readouterr().err.startswith("fastgan.tune: there is nothing to tune")


def test_out_may_be_in_the_home_folder(pretended, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command.main([SHAPE, "--batch", "4", "--out", "~/tables/table.json"]) == 0
    assert read_table(tmp_path / "tables" / "table.json")


def test_failures_are_reported(pretended, tmp_path, capsys):
    pretended["up"] = "wrong result: error 1.0 > 0.1"
    assert command.main([SHAPE, "--batch", "4", "--out", str(tmp_path / "table.json")]) == 1
    printed = capsys.readouterr().out
    assert "wrong result" in printed and "out of memory" in printed and "2 candidates or convolutions failed" in printed
    assert {p.kind for p in read_table(tmp_path / "table.json")} == {"down+statistics", "up"}


def test_what_was_measured_before_an_interruption_is_kept(pretended, tmp_path, capsys, monkeypatch):
    from fastgan.tune import session

    measure, calls = session.measure, []

    def interrupted(problem, *arguments):
        calls.append(problem)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(problem, *arguments)

    monkeypatch.setattr(session, "measure", interrupted)
    path = tmp_path / "table.json"
    assert command.main([SHAPE, "--batch", "4,8", "--out", str(path)]) == 130
    assert list(read_table(path)) == calls[:2]
    assert str(path) in capsys.readouterr().err


GPU_LOST = RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")


@pytest.mark.parametrize(
    "error, said", [(GPU_LOST, "illegal memory access"), (OSError("no processes"), "no processes")]
)
def test_an_error_that_ends_the_tuning_is_one_line(error, said, pretended, tmp_path, capsys, monkeypatch):
    from fastgan.tune import session

    measure, calls = session.measure, []

    def lost(problem, *arguments):
        calls.append(problem)
        if len(calls) == 2:
            raise error
        return measure(problem, *arguments)

    monkeypatch.setattr(session, "measure", lost)
    path = tmp_path / "table.json"
    assert command.main([SHAPE, "--batch", "4,8", "--out", str(path)]) == 1
    assert list(read_table(path)) == calls[:1]
    message = capsys.readouterr().err
    assert said in message and f"measured by then is in {path}" in message and message.count("\n") == 1


def test_a_table_that_cannot_be_written_is_named(pretended, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "write_table", full)
    path = tmp_path / "table.json"
    assert command.main([SHAPE, "--batch", "4", "--out", str(path)]) == 2
    said = f"fastgan.tune: {path} cannot be written: No space left on device\n"
    assert capsys.readouterr().err == said


def test_two_tuners_keep_what_each_of_them_measures(pretended, tmp_path, monkeypatch):
    from fastgan.tune import session

    measure, path, other = session.measure, tmp_path / "table.json", ["--batch", "8"]

    def beside_another(problem, *arguments):
        if other:
            command.main([SHAPE, *[other.pop(0) for _ in range(2)], "--out", str(path)])
        return measure(problem, *arguments)

    monkeypatch.setattr(session, "measure", beside_another)
    assert command.main([SHAPE, "--batch", "4", "--out", str(path)]) == 0
    assert {problem.batch for problem in read_table(path)} == {4, 8}


def test_an_interruption_before_anything_was_measured_claims_no_file(pretended, tmp_path, capsys, monkeypatch):
    from fastgan.tune import session

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "measure", interrupted)
    assert command.main([SHAPE, "--batch", "4", "--out", str(tmp_path / "table.json")]) == 130
    assert "nothing was measured" in capsys.readouterr().err
    assert not (tmp_path / "table.json").exists()


@pytest.mark.parametrize(
    ("out", "content", "part"),
    [
        ("notes.txt", "mine", "notes.txt"),
        ("other.json", '{"format": 1, "gpu": "NVIDIA T900", "measurements": []}', "NVIDIA T900"),
        ("other.json", '{"format": 2}', "other.json"),
        ("", None, "''"),
        (".", None, "folder"),
        ("afile/table.json", None, "afile/table.json"),
        ("/proc/x/table.json", None, "/proc/x"),
    ],
)
def test_an_out_that_cannot_be_written_or_holds_something_else(
    pretended, tmp_path, capsys, monkeypatch, out, content, part
):
    from fastgan.tune import session

    monkeypatch.setattr(session, "measure", None)  # nothing is measured
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").write_text("mine")
    if content:
        (tmp_path / out).write_text(content)
    assert command.main([SHAPE, "--batch", "4", "--out", out]) == 2
    message = capsys.readouterr().err
    assert message.startswith("fastgan.tune: --out") and part in message and message.count("\n") == 1
    if content:
        assert (tmp_path / out).read_text() == content


COMPILE = f"""
import torch
from fastgan.kernels.offline import compile_launch, compiling_for
from fastgan.ops.choice import Choice
from fastgan.tune.candidates import candidates
from fastgan.tune.compiling import Compiler, launches
from fastgan.tune.workloads import problems_of

if __name__ == "__main__":
    problem = next(p for p in problems_of(["{SHAPE}"], (4,), [torch.bfloat16]) if "+" in p.kind)
    tile = candidates(problem)[0]
    with Compiler(90, 2) as compiler:
        futures = compiler.start(problem, Choice("triton", tile._asdict())) + compiler.start(problem, Choice("cudnn"))
        assert [future.result() for future in futures] == [None] * 4
        bad = compiler.start(problem, Choice("triton", tile._replace(block_k=24)._asdict()))
        assert any(future.result() for future in bad)
    from triton.compiler import ASTSource

    def make_ir(*_):
        raise AssertionError("what the other processes compiled was not found")

    ASTSource.make_ir = make_ir
    with compiling_for(90):
        for launch in launches(problem, Choice("triton", tile._asdict())):
            assert "cubin" in compile_launch(launch).asm
    print("done")
"""


@pytest.mark.slow
def test_other_processes_compile(tmp_path):
    script = tmp_path / "compile.py"
    script.write_text(COMPILE)
    variables = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = run_compiling(str(script), **variables)
    assert done.stdout.strip() == "done", done.stderr[-3000:]


@pytest.mark.gpu
def test_a_small_tuning(tmp_path):
    path = tmp_path / "table.json"
    done = subprocess.run(
        [sys.executable, "-m", "fastgan.tune", SHAPE, "convt:32-3:k4s2p1:8x8+act", "--batch", "16", "--out", str(path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = read_table(path, torch.cuda.get_device_name())
    assert len(table) == 6
    assert all(0 < m.cudnn_us < 1e5 and 0 < m.triton_us < 1e5 for m in table.values())
