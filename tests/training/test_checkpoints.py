import os
import shutil

import pytest
import torch
from PIL import Image

from fastgan.training import generate, load_generator, new_run, read_checkpoint, resumed_run, train
from fastgan.training.devices import check_precision, pick_device


@pytest.fixture
def finished(tiny, tmp_path_factory):
    """The folder of a run of six steps."""
    out = tmp_path_factory.mktemp("finished")
    train(new_run(tiny(), out))
    return out


def alter(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def test_the_generator_of_a_checkpoint_is_the_runs(finished):
    generator = load_generator(finished)
    assert not generator.training and generator.nz == 5
    torch.testing.assert_close(generator.state_dict(), read_checkpoint(finished / "checkpoint.pt")["generator"])


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "picture", "pickle", "weights", "older"])
def test_what_is_no_checkpoint_is_refused(finished, damage):
    path = finished / "checkpoint.pt"
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    elif damage == "text":
        path.write_text("no checkpoint\n")
    elif damage == "picture":
        Image.new("RGB", (8, 8)).save(path, format="PNG")
    elif damage == "pickle":
        torch.save(print, path)  # code, which weights_only refuses
    elif damage == "weights":
        torch.save({"main.0.weight": torch.zeros(3)}, path)
    else:
        alter(path, lambda state: state.pop("scaler"))
    kept = {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()}
    for use in (resumed_run, load_generator):
        with pytest.raises(ValueError, match=r"checkpoint\.pt is not a fastgan checkpoint"):
            use(finished)
    assert {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()} == kept


DAMAGED = {
    "step": ("x", -5, 2.5, True),
    "nc": (0, None),
    "images": ("foo",),
    "fixed_latent": (None, torch.zeros(2, 3), torch.zeros(5, dtype=torch.int64)),
    "rng": ({}, {"cpu": 1}),
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in DAMAGED.items() for value in values])
def test_values_that_no_run_has_written_are_refused(finished, name, value):
    alter(finished / "checkpoint.pt", lambda state: state.update({name: value}))
    for use in (resumed_run, load_generator):
        with pytest.raises(ValueError, match=rf"checkpoint\.pt is damaged: its {name}"):
            use(finished)


def test_other_bytes_among_the_weights_are_seen(finished):
    path = finished / "checkpoint.pt"
    content, weight = bytearray(path.read_bytes()), read_checkpoint(path)["generator"]["main.0.weight"]
    at = content.index(bytes(weight.untyped_storage()))
    content[at : at + 4] = b"\0\0\0\1"
    path.write_bytes(content)
    for use in (resumed_run, load_generator):
        with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged: the checksum of its part .* is wrong"):
            use(finished)


def test_options_that_somebody_wrote_into_the_config_are_told_of(finished):
    path = finished / "config.json"
    path.write_text(path.read_text().replace('"lr": 0.0002', '"lr": 0.5'))
    with pytest.warns(UserWarning, match=r"config\.json has lr=0\.5 for 0\.0002: the run goes on with the"):
        assert resumed_run(finished).config.lr == 0.0002
    path.write_text("{{{")
    with pytest.warns(UserWarning, match=r"config\.json cannot be read: the run goes on with the checkpoint's options"):
        resumed_run(finished)


@pytest.mark.parametrize("name, kind", [("samples", "folder"), ("metrics.jsonl", "file"), ("loss.png", "file")])
def test_what_stands_in_a_runs_way_is_said_before_it_goes_on(finished, name, kind):
    shutil.rmtree(finished / name) if kind == "folder" else (finished / name).unlink()
    (finished / name).touch() if kind == "folder" else (finished / name).mkdir()
    with pytest.raises(ValueError, match=rf"resume '.*' cannot go on: its {name} is no {kind}"):
        resumed_run(finished)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["config"].update(ngf=8),
        lambda state: state["config"].update(image_size=16),
        lambda state: state.update(config=state["config"] | {"nz": 7}, fixed_latent=torch.zeros(64, 7)),
        lambda state: state["generator"].pop("main.0.weight"),
    ],
)
def test_weights_of_another_architecture_are_refused(finished, change):
    alter(finished / "checkpoint.pt", change)
    with pytest.raises(ValueError, match="does not fit"):
        resumed_run(finished)
    with pytest.raises(ValueError, match="another architecture"):
        load_generator(finished)


def test_options_that_are_not_allowed_in_a_checkpoint_are_refused(finished):
    alter(finished / "checkpoint.pt", lambda state: state["config"].update(image_size=30))
    for use in (resumed_run, load_generator):
        with pytest.raises(ValueError, match="image_size"):
            use(finished)


def test_a_missing_checkpoint_and_a_folder_without_a_run_are_refused(finished, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        resumed_run(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is no file"):
        load_generator(tmp_path / "pipe")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"holds no checkpoint\.pt"):
        resumed_run(tmp_path / "bare")
    # A checkpoint alone has no run around it to go on with.
    shutil.copy(finished / "checkpoint.pt", tmp_path / "bare")
    with pytest.raises(ValueError, match=r"config\.json"):
        resumed_run(tmp_path / "bare")
    assert [path.name for path in (tmp_path / "bare").iterdir()] == ["checkpoint.pt"]


def test_out_of_a_resumed_run_can_only_be_its_own(finished, tmp_path):
    with pytest.raises(ValueError, match="contradicts"):
        resumed_run(finished, out=tmp_path / "elsewhere")
    assert resumed_run(finished, out=finished / ".." / finished.name).first_step == 6


def test_a_failed_write_leaves_the_old_checkpoint(finished, monkeypatch):
    run = resumed_run(finished)
    before = (finished / "checkpoint.pt").read_bytes()

    def fail(state, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="space"):
        run.save(7)
    assert (finished / "checkpoint.pt").read_bytes() == before
    assert not list(finished.glob("*.tmp"))


def test_generate_draws_a_grid(finished, tmp_path):
    assert generate(finished, tmp_path / "new" / "grid.png", num=5, device="cpu") == (5, 8)
    picture = Image.open(tmp_path / "new" / "grid.png")
    assert picture.size == (3 * 10 + 2, 2 * 10 + 2) and picture.mode == "RGB"


def test_generate_draws_separate_files_and_seeds_decide(finished, tmp_path):
    generate(finished, tmp_path / "a", num=3, separate=True, device="cpu")
    generate(finished / "checkpoint.pt", tmp_path / "b", num=20, separate=True, device="cpu")
    generate(finished, tmp_path / "c", num=3, seed=1, separate=True, device="cpu")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    a, b, c = ([Image.open(tmp_path / name / f"{i:06d}.png").tobytes() for i in range(3)] for name in "abc")
    assert a == b and len(set(a)) == 3 and not set(a) & set(c)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 0}, "num"),
        ({"num": -3}, "num"),
        ({"seed": -1}, "seed"),
        ({"device": "tpu"}, "device"),
        ({"out": "grid.jpg"}, r"\.png"),
        ({"out": "there.png"}, "exists"),
        ({"out": "full", "separate": True}, "empty"),
        ({"out": "there.png", "separate": True}, "empty"),
    ],
)
def test_generate_refuses_and_writes_nothing(finished, tmp_path, options, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "there.png").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    options = {"num": 2, "device": "cpu", **options}
    with pytest.raises(ValueError, match=message):
        generate(finished, tmp_path / options.pop("out", "new.png"), **options)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.png").read_text() == "mine"


def test_devices_and_precisions(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == pick_device("cpu") == cpu
    for name, message in (("cuda", "needs CUDA"), ("gpu", "must be"), ("mps", "must be"), ("", "must be")):
        with pytest.raises(ValueError, match=message):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90a", "compute_120"])
    assert pick_device() == cuda and pick_device("cuda:0").index == 0
    with pytest.raises(ValueError, match="1 CUDA device"):
        pick_device("cuda:1")

    check_precision("bf16", cpu)
    with pytest.raises(ValueError, match="fp16 needs a CUDA device"):
        check_precision("fp16", cpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    for capability, refused in (((5, 2), {"bf16", "fp16"}), ((7, 5), {"bf16"}), ((8, 0), set())):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        for precision in ("fp32", "bf16", "fp16"):
            if precision in refused:
                with pytest.raises(ValueError, match=f"precision {precision} needs .* an old GPU"):
                    check_precision(precision, cuda)
            else:
                check_precision(precision, cuda)


@pytest.mark.parametrize(
    "capability, built_for, usable",
    (
        ((6, 1), ["sm_75", "sm_80", "sm_90a", "sm_120", "compute_120"], False),
        ((8, 9), ["sm_75", "sm_80"], True),
        ((13, 0), ["sm_75", "sm_120"], False),
        ((13, 0), ["sm_75", "compute_120"], True),
        ((9, 4), ["gfx942"], True),
    ),
)
def test_a_gpu_that_torch_was_not_built_for(capability, built_for, usable, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    if usable:
        assert pick_device() == torch.device("cuda") == pick_device("cuda")
        return
    said = f"no code for an old GPU, of compute capability {capability[0]}.{capability[1]}"
    with pytest.warns(UserWarning, match=f"the CPU computes: .*{said}"):
        assert pick_device() == torch.device("cpu")
    with pytest.raises(ValueError, match=f"device 'cuda:0' cannot be used: .*{said}"):
        pick_device("cuda:0")
