import pytest

from fastgan.data import datasets, sources


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
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "pictures"
    (folder / "b" / "deep").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b/c.PNG", "b/deep/d.bmp", "b/e.webp", "f.tif"], start=1):
        options = {"lossless": True} if name.endswith("webp") else {}
        image.new("RGB", (12, 10), (10 * i, 0, 0)).save(folder / name, **options)
    return folder
