"""Tables of measured convolutions, and what is chosen from them; no GPU is needed for that."""

import json
import warnings

import pytest
import torch

from fastgan import backend
from fastgan.kernels.launch import MatrixTile
from fastgan.ops import choice
from fastgan.ops.choice import Choice, choose, conv_problem, weight_grad_problem
from fastgan.ops.tables import Measurement, Problem, read_table, slug, write_table

GPU = "NVIDIA T800 Nonsuch"
CUDA = torch.device("cuda", 0)
TILE = MatrixTile(128, 64, 32, 4, 3)._asdict()
PROBLEM = Problem("up+statistics", "bfloat16", 128, (4, 4), (8, 8), 512, 256, (4, 4), (2, 2), (1, 1))
VERSIONS = {"torch": "2.11", "triton": "3.6"}


def measured(implementation="triton", triton_us=10.0, cudnn_us=20.0, batch=128):
    return Measurement(implementation, TILE, triton_us, cudnn_us, batch)


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """A machine with an unheard-of GPU, an empty cache of the user's and no shipped table."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backend, "capability", lambda index: 0)
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "shipped_table_path", lambda gpu: tmp_path / "shipped" / f"{slug(gpu)}.json")
    monkeypatch.delenv("FASTGAN_BACKEND", raising=False)
    choice.forget()
    yield
    choice.forget()


def write(where, *rows, gpu=GPU):
    write_table(where(GPU), gpu, VERSIONS, {problem: m._replace(batch=problem.batch) for problem, m in rows})


def test_tables_are_read_as_they_were_written(tmp_path):
    rows = {
        PROBLEM: measured(),
        PROBLEM._replace(kind="weight_grad", batch=64): Measurement("cudnn", None, None, 3.25, 64),
        PROBLEM._replace(kind="down", padding=(0, 2)): measured("cudnn", 5.0, 4.0),
    }
    path = tmp_path / "new" / "table.json"
    write_table(path, GPU, VERSIONS, rows)
    assert read_table(path, GPU, VERSIONS) == rows
    assert json.loads(path.read_text())["gpu"] == GPU
    assert len([line for line in path.read_text().splitlines() if '"kind"' in line]) == 3  # a line each, to be read
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]


def test_measured_shapes(monkeypatch):
    down = PROBLEM._replace(kind="down")
    write(choice.shipped_table_path, (PROBLEM, measured()), (down, measured("cudnn", 30.0)))
    assert choose(PROBLEM, CUDA)[:2] == ("triton", TILE)
    assert choose(PROBLEM, CUDA).why == "ours 10.0 µs, cuDNN 20.0 µs at batch 128"
    assert choose(down, torch.device("cuda"))[:2] == ("cudnn", TILE)


@pytest.mark.parametrize(
    "change",
    (
        dict(dtype="tf32"),
        dict(kind="up"),
        dict(low=(5, 4)),
        dict(high=(9, 8)),
        dict(a=511),
        dict(b=3),
        dict(kernel=(3, 4)),
        dict(stride=(1, 2)),
        dict(padding=(0, 1)),
    ),
    ids=str,
)
def test_what_is_not_in_the_table_is_cudnns(change):
    write(choice.shipped_table_path, (PROBLEM, measured()))
    found = choose(PROBLEM._replace(**change), CUDA)
    assert found[:2] == ("cudnn", None)
    assert found.why == f"not in the table of {GPU}, and nothing near it is: cuDNN is the safe choice"


def test_unknown_gpu():
    found = choose(PROBLEM, CUDA)
    assert found[:2] == ("cudnn", None)
    assert GPU in found.why and "fastgan.tune" in found.why


def test_nearest_batch_is_named():
    write(choice.shipped_table_path, (PROBLEM, measured()))
    assert choose(PROBLEM._replace(batch=100), CUDA).why.endswith("at batch 128, the nearest measured")


def test_what_is_like_a_measured_one_is_named():
    write(choice.shipped_table_path, (PROBLEM, measured()))
    larger = PROBLEM._replace(batch=32, low=(8, 8), high=(16, 16), dtype="float16")
    assert choose(larger, CUDA) == Choice(
        "triton",
        TILE,
        "ours 10.0 µs, cuDNN 20.0 µs at batch 128 of 512@4×4 256@8×8 k4 s2 p1 in bfloat16, the nearest measured",
    )
    write(choice.shipped_table_path, (PROBLEM, measured(cudnn_us=12.0)))
    choice.forget()
    assert choose(PROBLEM, CUDA).implementation == "triton"
    found = choose(larger, CUDA)
    assert found.implementation == "cudnn" and found.why.endswith(
        "the nearest measured: not far enough ahead to rely on here"
    )


def test_a_relative_has_a_say_where_nothing_was_measured(monkeypatch):
    """A GPU of the same compute capability, of which a table comes with fastgan; and its lead must be a large one."""
    monkeypatch.setattr(choice, "RELATIVES", {90: ("NVIDIA T900", GPU)})
    far, near = PROBLEM, PROBLEM._replace(kind="down")
    rows = {far: measured(), near: measured(cudnn_us=12.0)}
    write_table(choice.shipped_table_path("NVIDIA T900"), "NVIDIA T900", VERSIONS, rows)
    assert not choice.relatives(0) and choose(far, CUDA).implementation == "cudnn"

    choice.forget()
    monkeypatch.setattr(backend, "capability", lambda index: 90)
    assert choice.relatives(0) == ["NVIDIA T900"] and not choice.has_table(GPU)
    assert choose(far, CUDA).implementation == "triton"
    assert choose(far, CUDA).why == "ours 10.0 µs, cuDNN 20.0 µs at batch 128 on NVIDIA T900"
    assert choose(near, CUDA).implementation == "cudnn"

    choice.forget()  # what was measured on the GPU itself wins, and what is as like there
    write(choice.shipped_table_path, (far, measured("cudnn", 30.0)))
    assert choose(far, CUDA).why == "ours 30.0 µs, cuDNN 20.0 µs at batch 128"
    assert choose(far._replace(dtype="float16"), CUDA).why.endswith("in bfloat16, the nearest measured")


def test_every_shipped_table_has_relatives(monkeypatch):
    monkeypatch.undo()
    measured_on = {json.loads(path.read_text(encoding="utf-8"))["gpu"] for path in choice.shipped_tables()}
    assert measured_on == {gpu for relatives in choice.RELATIVES.values() for gpu in relatives}


def test_the_users_table_wins_measurement_by_measurement():
    other = PROBLEM._replace(batch=1024)
    write(choice.shipped_table_path, (PROBLEM, measured()), (other, measured()))
    write(choice.user_table_path, (PROBLEM, measured("cudnn", 30.0)))
    assert choose(PROBLEM, CUDA).implementation == "cudnn"
    assert choose(other, CUDA).implementation == "triton"


def test_where_the_users_table_is(monkeypatch, tmp_path):
    name = "nvidia-t800-nonsuch.json"
    assert choice.user_table_path(GPU) == tmp_path / "cache" / name
    monkeypatch.setenv("FASTGAN_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert choice.user_table_path(GPU) == tmp_path / "xdg" / "fastgan" / name
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert choice.user_table_path(GPU) == tmp_path / "home" / ".cache" / "fastgan" / name


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.delenv("FASTGAN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(choice.Path, "home", no_home)
    assert choice.user_table_path(GPU) is None
    write(choice.shipped_table_path, (PROBLEM, measured("triton", 30.0)))
    assert choose(PROBLEM, CUDA).implementation == "triton"


def _row(**changes):
    row = dict(PROBLEM._asdict(), implementation="triton", tile=TILE, triton_us=1.0, cudnn_us=2.0)
    return {**row, **changes}


def _table(*rows, **changes):
    return json.dumps({"format": 1, "gpu": GPU, "measurements": rows, **changes})


MALFORMED = {
    "no JSON": "{",
    "a list": "[]",
    "no text": b"\xff\xfe",
    "format": _table(format=2),
    "another GPU": _table(gpu="NVIDIA A100"),
    "no measurements": json.dumps({"format": 1, "gpu": GPU}),
    "kind": _table(_row(kind="sideways")),
    "implementation": _table(_row(implementation="magic")),
    "missing": _table({k: v for k, v in _row().items() if k != "stride"}),
    "pair": _table(_row(stride=2)),
    "batch": _table(_row(batch="many")),
    "tile": _table(_row(tile={"block_m": 128})),
    "share": _table(_row(tile={**TILE, "share": 0})),
    "by_position": _table(_row(tile={**TILE, "by_position": 1})),
    "time": _table(_row(cudnn_us=None)),
    "no time of ours": _table(_row(triton_us=None)),
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_table_is_ignored_with_one_warning_that_names_it(text):
    write(choice.shipped_table_path, (PROBLEM, measured()))
    path = choice.user_table_path(GPU)
    path.parent.mkdir()
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in (128, 256, 128, 100):
            assert choose(PROBLEM._replace(batch=batch), CUDA).implementation == "triton"
    (warning,) = caught
    assert str(path) in str(warning.message)


def test_a_well_formed_row_is_not_malformed():
    path = choice.user_table_path(GPU)
    path.parent.mkdir()
    path.write_text(_table(_row()))
    assert choose(PROBLEM, CUDA).implementation == "triton"


def test_forced_triton(monkeypatch):
    write(choice.shipped_table_path, (PROBLEM, measured("cudnn", 30.0)))
    monkeypatch.setenv("FASTGAN_BACKEND", "triton")
    assert choose(PROBLEM, CUDA) == Choice("triton", TILE, "FASTGAN_BACKEND=triton")
    assert choose(PROBLEM._replace(a=7), CUDA)[:2] == ("triton", None)
    monkeypatch.delenv("FASTGAN_BACKEND")
    assert choose(PROBLEM, CUDA).implementation == "cudnn"


def test_on_a_cpu_the_kernels_run_in_their_default_tile():
    assert choose(PROBLEM, torch.device("cpu"))[:2] == ("triton", None)


def test_problems_of_tensors():
    x, weight = torch.empty(128, 512, 4, 4, dtype=torch.bfloat16), torch.empty(512, 256, 4, 4, dtype=torch.bfloat16)
    assert conv_problem(x, weight, True, [2, 2], (1, 1), [8, 8], then="statistics") == PROBLEM
    y = torch.empty(128, 256, 8, 8, dtype=torch.bfloat16)
    assert conv_problem(y, weight, False, [2, 2], (1, 1), [4, 4]) == PROBLEM._replace(kind="down")
    assert weight_grad_problem(x, y, weight, [2, 2], [1, 1]) == PROBLEM._replace(kind="weight_grad")
    wide = weight_grad_problem(x, y, weight.float(), [2, 2], [1, 1])
    assert wide == PROBLEM._replace(kind="weight_grad+float32") and wide.operation == "weight_grad"
    assert PROBLEM.operation == "up" and PROBLEM.then == "statistics"
    assert PROBLEM.shape == "512@4×4 256@8×8 k4 s2 p1"


@pytest.mark.parametrize("precision, name", (("tf32", "tf32"), ("ieee", "float32")))
def test_float32_is_known_by_how_it_is_multiplied(precision, name, monkeypatch):
    monkeypatch.setattr("fastgan.backend.matmul_precision", lambda dtype: precision)
    assert choice.dtype_name(torch.float32) == name
    assert choice.dtype_name(torch.float16) == "float16"


def test_shipped_tables_are_well_formed(monkeypatch):
    monkeypatch.undo()
    for path in choice.shipped_tables():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gpu = json.loads(path.read_text(encoding="utf-8"))["gpu"]
            table = read_table(path, gpu)
        assert table and path.name == f"{slug(gpu)}.json"
        for row in table.values():
            assert row.tile is None or MatrixTile(**row.tile)
            assert row.implementation == "cudnn" or row.triton_us <= row.cudnn_us


def test_a_choice_is_made_once(monkeypatch):
    """Every convolution of every step asks: from the second time on nothing is read and nothing looked for."""
    write(choice.shipped_table_path, (PROBLEM, measured()))
    first = choose(PROBLEM, CUDA)
    for name in ("read_table", "nearest", "_why"):
        monkeypatch.setattr(choice, name, None)
    assert choose(PROBLEM, CUDA) is first
