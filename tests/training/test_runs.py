"""Whole runs, tiny: what they write, how they resume, how they end."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastgan import data
from fastgan.training import Run, new_run, read_checkpoint, resumed_run, train
from fastgan.training.records import read_metrics
from fastgan.training.samples import draw_latents, grid, sample


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [[row[name] for name in ("step", "loss_d", "loss_g", "d_real", "d_fake")] for row in rows(out)]


def test_latents_are_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        latents = draw_latents(2, 3, seed=1)
    assert torch.equal(latents, draw_latents(2, 3, seed=1))


def test_a_run_writes_what_it_promises(tiny, tmp_path):
    out = tmp_path / "deep" / "run"
    run = new_run(tiny(max_steps=5, batch_size=1024, log_every=2, save_every=4), out)
    assert not out.exists()  # nothing is written before training
    assert train(run) == 5 == run.last_step

    assert [row["step"] for row in rows(out)] == [2, 4, 5]
    assert [row["epoch"] for row in rows(out)] == [1, 2, 3]  # 2,048 images are two steps
    assert [row["images"] for row in rows(out)] == [2048, 4096, 5120]
    for row in rows(out):
        assert list(row) == [
            *("step", "epoch", "images", "loss_d", "loss_g", "d_real", "d_fake"),
            *("images_per_sec", "data_wait_ms", "peak_memory_mb"),
        ]
        assert all(math.isfinite(value) for value in row.values())
        assert row["data_wait_ms"] > 0  # on the host, reading always takes a moment
        assert 0 < row["d_real"] < 1 and 0 < row["d_fake"] < 1 and row["images_per_sec"] > 0

    config = json.loads((out / "config.json").read_text())
    assert config["images_on"] == "host" and config["data_on"] == "auto"
    assert config["batch_size"] == 1024 and config["image_size"] == 8 and config["images"] == 2048
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["step-000004.png", "step-000005.png"]
    assert Image.open(out / "samples" / "step-000005.png").size == (8 * 10 + 2, 8 * 10 + 2)
    assert Image.open(out / "loss.png").width > 300
    assert list(out.glob("events.out.tfevents.*"))
    assert not list(out.glob("*.tmp"))

    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["step"] == 5 and state["config"]["ngf"] == 4
    assert state["fixed_latent"].shape == (64, 5)
    assert {"generator", "discriminator", "optimizer_g", "optimizer_d", "rng"} <= set(state)


def test_tensorboard_has_the_losses_and_the_pictures(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(new_run(tiny(), tmp_path))
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in board.Scalars("loss_d")] == [2, 3, 4, 6]
    assert [event.value for event in board.Scalars("loss_g")] == pytest.approx(
        [row["loss_g"] for row in rows(tmp_path)]
    )
    assert [event.step for event in board.Images("samples")] == [3, 6]


@pytest.mark.parametrize("fused", [False, True])
def test_stopping_at_30_and_resuming_to_60_equals_an_unbroken_run(tiny, tmp_path, fused):
    options = {"fused": fused, "log_every": 5, "save_every": 20}
    train(new_run(tiny(max_steps=60, **options), tmp_path / "whole"))
    train(new_run(tiny(max_steps=30, **options), tmp_path / "broken"))
    torch.randn(7)  # resuming must not depend on what was drawn in between
    run = resumed_run(tmp_path / "broken", {"max_steps": 60})
    assert run.first_step == 30
    train(run)

    assert [row for row in losses(tmp_path / "broken") if row[0] != 30] == [
        row for row in losses(tmp_path / "whole") if row[0] != 30
    ]
    whole, broken = (read_checkpoint(tmp_path / name) for name in ("whole", "broken"))
    for name in ("generator", "discriminator", "optimizer_g", "optimizer_d", "rng", "fixed_latent"):
        torch.testing.assert_close(broken[name], whole[name], rtol=0, atol=0)


@pytest.fixture
def resident_on_the_cpu(monkeypatch):
    """Lets data_on "auto" hold the images as on a GPU, by the reference path."""
    monkeypatch.setattr("fastgan.data.why_not_resident", lambda dataset, device, share: None)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_where_the_images_are_does_not_change_the_training(tiny, tmp_path, resident_on_the_cpu, precision):
    # 2,048 images in batches of 300 are six steps an epoch: the runs stop and change sides within epochs.
    options = {"batch_size": 300, "flip": True, "precision": precision, "max_steps": 15, "log_every": 1}
    for data_on in ("auto", "host"):
        run = new_run(tiny(data_on=data_on, **options), tmp_path / data_on)
        assert (run.resident is None) == (data_on == "host")
        train(run)
    assert losses(tmp_path / "auto") == losses(tmp_path / "host")
    assert {row["data_wait_ms"] for row in rows(tmp_path / "auto")} == {0.0}
    assert json.loads((tmp_path / "auto" / "config.json").read_text())["images_on"] == "gpu"

    changing = {"out": tmp_path / "changing", "config": tiny(**{**options, "data_on": "host", "max_steps": 4})}
    train(new_run(**changing))
    for steps, data_on in ((8, "auto"), (15, "host")):
        train(resumed_run(tmp_path / "changing", {"max_steps": steps, "data_on": data_on}))
    assert losses(tmp_path / "changing") == losses(tmp_path / "auto")


def test_mirroring_changes_the_training(tiny, tmp_path):
    for flip in (False, True):
        train(new_run(tiny(flip=flip, data_on="host"), tmp_path / str(flip)))
    assert losses(tmp_path / "True") != losses(tmp_path / "False")


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu_the_images_may_be_on_either_side(tiny, tmp_path, compile):
    options = {"batch_size": 300, "flip": True, "device": "cuda", "max_steps": 15, "log_every": 1, "compile": compile}
    for data_on in ("auto", "gpu", "host"):
        run = new_run(tiny(data_on=data_on, **options), tmp_path / data_on)
        assert (run.resident is None) == (data_on == "host")
        train(run)
    assert losses(tmp_path / "auto") == losses(tmp_path / "gpu")
    # Batches are equal to the bit; what stock layers do with them need not be.
    host, gpu = (torch.tensor(losses(tmp_path / name)) for name in ("host", "gpu"))
    torch.testing.assert_close(gpu, host, rtol=1e-2, atol=1e-2)


def test_what_fits_on_the_gpu(tiny, tmp_path, monkeypatch):
    dataset = new_run(tiny(), tmp_path).dataset
    gpu = torch.device("cuda")
    assert "needs CUDA" in data.why_not_resident(dataset, torch.device("cpu"), 1.0)
    taken = dataset.images.numel()
    for free, reason in ((2 * taken, None), (2 * taken - 2, "free")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * free))
        assert (data.why_not_resident(dataset, gpu, 0.5) or "None").endswith(str(reason))
        assert data.why_not_resident(dataset, gpu, 1.0) is None
    assert "'big' is too large" in data.why_not_resident(data.ImagesOnDemand("big", dataset), gpu, 1.0)


def test_the_way_it_is_recorded_does_not_change_the_training(tiny, tmp_path):
    train(new_run(tiny(max_steps=12, log_every=1, save_every=1), tmp_path / "often"))
    train(new_run(tiny(max_steps=12, log_every=12, save_every=12), tmp_path / "seldom"))
    assert losses(tmp_path / "often")[-1] == losses(tmp_path / "seldom")[-1]


def test_seeds_differ_and_repeat(tiny, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(new_run(tiny(seed=seed), tmp_path / name))
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_numbers_that_are_drawn_between_making_and_training_are_others(tiny, tmp_path):
    for out in ("at once", "later"):
        run = new_run(tiny(max_steps=4), tmp_path / out)
        if out == "later":
            new_run(tiny(max_steps=4, seed=7), tmp_path / "another")
        train(run)
    assert losses(tmp_path / "at once") == losses(tmp_path / "later")

    train(new_run(tiny(max_steps=2), tmp_path / "resumed"))
    run = resumed_run(tmp_path / "resumed", {"max_steps": 4})
    torch.rand(5)
    train(run)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "later")


def test_rows_after_the_checkpoint_are_dropped_when_resuming(tiny, tmp_path):
    train(new_run(tiny(), tmp_path))
    kept = (tmp_path / "metrics.jsonl").read_text()
    later = {**rows(tmp_path)[-1], "step": 8, "loss_d": 99.0}
    # As if the power had failed two steps after the checkpoint, while a line was being written.
    (tmp_path / "metrics.jsonl").write_text(kept + json.dumps(later) + '\n{"step": 10, "lo')
    train(resumed_run(tmp_path / "checkpoint.pt", {"max_steps": 8}))
    assert (tmp_path / "metrics.jsonl").read_text().startswith(kept)
    assert [row["step"] for row in rows(tmp_path)] == [2, 3, 4, 6, 8]
    assert rows(tmp_path)[-1]["loss_d"] != 99.0
    assert json.loads((tmp_path / "config.json").read_text())["max_steps"] == 8


def test_a_bad_line_among_the_rows_costs_no_other_row(tiny, tmp_path):
    train(new_run(tiny(), tmp_path))
    path = tmp_path / "metrics.jsonl"
    good = path.read_bytes().splitlines()
    no_loss = b'{"step": 3, "loss_d": "x", "loss_g": null, "d_real": 1, "d_fake": 0}'
    for bad in (b"\0\xff{", b'{"step": 3}', b"[3]", no_loss):
        damaged = b"\n".join([good[0], bad, *good[1:]]) + b"\n"
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"metrics\.jsonl has lines that are no rows \(2\); it is kept as "):
            train(resumed_run(tmp_path, {"max_steps": read_checkpoint(tmp_path)["step"] + 2}))
        assert [row["step"] for row in rows(tmp_path)][:4] == [2, 3, 4, 6]
        assert max(tmp_path.glob("metrics-damaged-*.jsonl")).read_bytes() == damaged
    assert len(list(tmp_path.glob("metrics-damaged-*.jsonl"))) == 4


HUGE = '{"step": 1, "loss_d": 1%s, "loss_g": 1, "d_real": 1, "d_fake": 1}' % ("0" * 400)


@pytest.mark.parametrize("line", ["[" * 100_000, HUGE], ids=["deep", "huge"])
def test_lines_that_json_or_a_float_cannot_take_are_damaged(line, tmp_path):
    row = {"step": 1, "loss_d": 1, "loss_g": 0.5, "d_real": float("nan"), "d_fake": 0.25}
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n{json.dumps(row)}\n")
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert read["loss_g"] == 0.5


def test_what_a_killed_process_left_is_removed(tiny, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    run = new_run(tiny(max_steps=1), tmp_path / "run")
    (run.out / "samples").mkdir(parents=True)
    left = [run.out / f"checkpoint.pt.{process.pid}.tmp", run.out / "samples" / f"step-1.png.{process.pid}.tmp"]
    others = [run.out / "checkpoint.pt.1.tmp", run.out / "notes.tmp"]  # the first process runs
    for path in left + others:
        path.write_text("mine")
    train(run)
    assert not any(map(Path.exists, left)) and all(map(Path.exists, others))


def test_resuming_a_finished_run_changes_nothing(tiny, tmp_path):
    train(new_run(tiny(), tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    run = resumed_run(tmp_path)
    assert train(run) == run.first_step == run.last_step == 6
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_another_process_trained_meanwhile_is_left_as_it_is(tiny, tmp_path):
    for make in (lambda: new_run(tiny(), tmp_path), lambda: resumed_run(tmp_path, {"max_steps": 8})):
        late = make()
        train(make())
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        with pytest.raises(ValueError, match=r"another process has trained in .* --resume"):
            train(late)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("writes", ["save", "write_config"])
def test_a_run_that_ends_at_its_start_can_be_begun_anew_or_resumed(tiny, tmp_path, monkeypatch, writes):
    def on_a_full_disk(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(Run, writes, on_a_full_disk)
        train(new_run(tiny(), tmp_path))
    left = [path.name for path in tmp_path.iterdir()]
    assert train(resumed_run(tmp_path) if left else new_run(tiny(), tmp_path)) == 6
    assert (tmp_path / "config.json").exists()


def test_a_data_set_that_changed_is_told(tiny, tmp_path):
    (tmp_path / "pictures").mkdir()
    for index in range(5):
        Image.new("RGB", (8, 8), (index * 40, 0, 0)).save(tmp_path / "pictures" / f"{index}.png")
    options = {"dataset": "folder", "dataroot": str(tmp_path / "pictures"), "batch_size": 2, "max_steps": 2}
    train(new_run(tiny(**options), tmp_path / "run"))
    (tmp_path / "pictures" / "4.png").unlink()
    with pytest.warns(UserWarning, match="4 images now and had 5"):
        train(resumed_run(tmp_path / "run", {"max_steps": 4}))


def test_the_pictures_of_a_run_may_move(tiny, tmp_path):
    (tmp_path / "pictures").mkdir()
    for index in range(2):
        Image.new("RGB", (8, 8), (index * 40, 0, 0)).save(tmp_path / "pictures" / f"{index}.png")
    options = {"dataset": "folder", "dataroot": str(tmp_path / "pictures"), "batch_size": 2, "max_steps": 1}
    train(new_run(tiny(**options), tmp_path / "run"))
    (tmp_path / "pictures").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="pictures"):
        resumed_run(tmp_path / "run")
    assert resumed_run(tmp_path / "run", {"dataroot": str(tmp_path / "moved")}).first_step == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(tiny, tmp_path, number):
    run = new_run(tiny(max_steps=50, log_every=50, save_every=50), tmp_path)
    original, handler = run.step, signal.getsignal(number)

    def signalled(images):
        signalled.calls += 1
        if signalled.calls == 7:
            os.kill(os.getpid(), number)
        return original(images)

    signalled.calls = 0
    signalled.__dict__.update(generator=original.generator, discriminator=original.discriminator)
    signalled.device, signalled.state_dict = original.device, original.state_dict
    run.step = signalled
    assert train(run) == 7
    assert signal.getsignal(number) is handler
    assert read_checkpoint(tmp_path)["step"] == 7 == rows(tmp_path)[-1]["step"]
    assert (tmp_path / "samples" / "step-000007.png").exists() and (tmp_path / "loss.png").exists()


def test_divergence_keeps_the_good_checkpoint_and_says_the_step(tiny, tmp_path):
    run = new_run(tiny(max_steps=20, log_every=4, save_every=4), tmp_path)
    original = run.step.optimizer_d.step

    def poisoned(*arguments, **named):
        poisoned.calls += 1
        if poisoned.calls == 6:
            with torch.no_grad():
                next(run.step.discriminator.parameters()).fill_(float("nan"))
        return original(*arguments, **named)

    poisoned.calls = 0
    run.step.optimizer_d.step = poisoned
    # The generator's loss of step 6 is the first to see it; step 8 is the next to be logged.
    with pytest.raises(ValueError, match=r"step 6; the state after step 8 .*diverged\.pt"):
        train(run)
    good = read_checkpoint(tmp_path)
    assert good["step"] == 4
    assert all(torch.isfinite(value).all() for value in good["discriminator"].values())
    assert read_checkpoint(tmp_path / "diverged.pt")["step"] == 8
    assert [row["step"] for row in rows(tmp_path)] == [4]
    # And from the good checkpoint it goes on.
    assert train(resumed_run(tmp_path, {"max_steps": 5})) == 5


@pytest.mark.parametrize("error", [ValueError("no picture"), OSError("disk gone")])
def test_an_error_of_the_data_saves_the_last_whole_step(tiny, tmp_path, monkeypatch, error):
    train(new_run(tiny(max_steps=9, log_every=1), tmp_path / "whole"))
    run = new_run(tiny(max_steps=9, log_every=1, save_every=3), tmp_path / "run")
    images = run.open_images()
    read = images.before_step
    turns = iter(range(1, 100))

    def broken():
        if next(turns) == 6:
            raise error
        return read()

    monkeypatch.setattr(images, "before_step", broken)
    run.open_images = lambda: images
    with pytest.raises(type(error), match=str(error)) as raised:
        train(run)
    assert ("step 5 is saved" in str(raised.value)) == isinstance(error, ValueError)
    assert read_checkpoint(tmp_path / "run")["step"] == 5
    assert train(resumed_run(tmp_path / "run")) == 9
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_picture_that_cannot_be_read_ends_no_run_over_the_memory_budget(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(data.datasets, "MEMORY_BUDGET", 0)
    (tmp_path / "pictures").mkdir()
    for index in range(6):
        Image.new("RGB", (8, 8), (index * 40, 0, 0)).save(tmp_path / "pictures" / f"{index}.png")
    (tmp_path / "pictures" / "3.png").write_bytes(b"no picture")
    options = {"dataset": "folder", "dataroot": str(tmp_path / "pictures"), "batch_size": 2, "log_every": 1}
    with pytest.warns(UserWarning, match=r"3\.png"):
        train(new_run(tiny(**options), tmp_path / "whole"))
        train(new_run(tiny(max_steps=2, **options), tmp_path / "broken"))
        train(resumed_run(tmp_path / "broken", {"max_steps": 6}))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_weights_that_are_not_finite_are_not_saved_as_good(tiny, tmp_path):
    run = new_run(tiny(max_steps=3, save_every=3), tmp_path)
    original = run.step.optimizer_g.step

    def poisoned(*arguments, **named):
        result = original(*arguments, **named)
        poisoned.calls += 1
        if poisoned.calls == 3:  # after the last loss has been computed
            with torch.no_grad():
                next(run.step.generator.parameters())[0] = float("inf")
        return result

    poisoned.calls = 0
    run.step.optimizer_g.step = poisoned
    with pytest.raises(ValueError, match="not finite at step 3"):
        train(run)
    assert read_checkpoint(tmp_path)["step"] == 0 and (tmp_path / "diverged.pt").exists()


def test_sampling_leaves_no_trace(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("fastgan.training.samples._AT_A_TIME", 48)  # of 64
    run = new_run(tiny(), tmp_path)
    generator = run.step.generator
    before, rng = {name: value.clone() for name, value in generator.state_dict().items()}, torch.get_rng_state()
    images = sample(generator, run.fixed_latent)
    assert images.dtype == torch.uint8 and images.shape == (64, 3, 8, 8)
    torch.testing.assert_close(generator.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), rng) and generator.training


def test_grid_puts_images_in_rows():
    images = torch.arange(1, 6, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    picture = grid(images)
    assert picture.shape == (3, 2 * 4 + 2, 3 * 4 + 2)
    for corner in (2, 3):
        assert picture[0, corner::4, corner::4].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert picture[:, [0, 1, 4, 5, -2, -1]].max() == picture[:, :, [0, 1, 4, 5, -2, -1]].max() == 0


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoint.pt"])
def test_a_used_folder_is_refused(tiny, tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="--resume"):
        new_run(tiny(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_in_place_of_the_folder_is_refused(tiny, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="not a folder"):
        new_run(tiny(), tmp_path / "run")
