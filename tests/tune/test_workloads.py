"""Which convolutions are tuned, and with which tiles."""

import pytest
import torch
from torch import nn

from fastgan.ops.choice import Choice
from fastgan.ops.tables import Problem
from fastgan.tune.candidates import candidates
from fastgan.tune.compiling import launches
from fastgan.tune.workloads import problems_of, problems_of_model

BF16 = torch.bfloat16


class Small(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 5, 4, 2, 1, bias=False),
            nn.Conv2d(5, 5, 1, groups=5),
        )


def test_dcgan():
    problems = problems_of(["dcgan64"], (64, 128), [BF16])
    middle = Problem("up+statistics", "bfloat16", 64, (4, 4), (8, 8), 512, 256, (4, 4), (2, 2), (1, 1))
    of_middle = {(p.kind, p.batch) for p in problems if p.layer == middle._replace(kind=p.kind, batch=0)}
    # The generator's forward and input gradient at each batch, the discriminator's at twice each too.
    assert of_middle == {
        *(("up+statistics", batch) for batch in (64, 128)),
        *((kind, batch) for kind in ("down", "down+normalized") for batch in (64, 128)),
        *(
            (kind, batch)
            for kind in ("down+statistics", "up", "up+normalized", "weight_grad+float32")
            for batch in (64, 128, 256)
        ),
    }
    latent = {p.kind for p in problems if p.a == 100}
    assert latent == {"up+statistics", "weight_grad+float32"}, "nobody wants the gradient of latent vectors"
    of_images = {"up+epilogue", "down", "down+normalized", "down+epilogue", "up", "weight_grad+float32"}
    assert {p.kind for p in problems if p.b == 3} == of_images
    # The discriminator's first activation, on the way back: of its second layer's input gradient.
    second = {(p.a, p.b, p.batch) for p in problems if p.then == "activated"}
    assert second == {(128, 64, batch) for batch in (64, 128, 256)}
    assert {p.kind for p in problems if p.a == 1} == {"down", "up", "up+normalized", "weight_grad+float32"}
    assert len(problems) == len(set(problems))


def test_small_dcgan_has_the_widths_of_training():
    assert {p.b for p in problems_of(["dcgan28"], (64,), [BF16])} == {1, 32, 64}


def test_dtypes():
    assert {p.dtype for p in problems_of(["dcgan28"], (64,), [torch.float16, BF16])} == {"float16", "bfloat16"}


@pytest.mark.parametrize("training", (True, False))
def test_any_model(training):
    model = Small().train(training)
    problems = problems_of_model(model, [(4, 3, 6, 6)], BF16)
    then = "statistics" if training else "epilogue"
    first = Problem(f"down+{then}", "bfloat16", 4, (6, 6), (6, 6), 8, 3, (3, 3), (1, 1), (1, 1))
    second = Problem("up", "bfloat16", 4, (6, 6), (12, 12), 8, 5, (4, 4), (2, 2), (1, 1))
    # Forward, weight gradient and input gradient of both; the convolution with groups of its own stays stock.
    kinds = {
        first: ("weight_grad+float32", "up"),
        second: ("weight_grad+float32", "down", *["down+normalized"] * training),
    }
    assert set(problems) == {*kinds, *(p._replace(kind=kind) for p in kinds for kind in kinds[p])}
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert not any("forward" in vars(m) for m in model.modules())


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x):
        return self.conv3(self.conv2(self.conv1(input=x)))


def test_a_layer_within_may_look_like_the_first():
    """Of the first one alone nobody wants the gradient of its input; called by keyword it is a layer too."""
    problems = problems_of_model(ByKeyword(), [(4, 3, 8, 8)], BF16, input_grad=False)
    assert [problem.kind for problem in problems].count("up") == 2


def test_model_by_name():
    problems = problems_of([f"{__name__}:Small"], (4,), [BF16], (3, 6, 6))
    assert {p.kind for p in problems} == {"down+statistics", "weight_grad+float32", "up", "down", "down+normalized"}


@pytest.mark.parametrize(
    "name, kinds, high",
    (
        ("conv:3-8:k4s2p1:6x8", {"down", "up", "weight_grad+float32"}, (6, 8)),
        ("conv:3-8:k4s2p1:6x8+bn", {"down+statistics", "up", "weight_grad+float32"}, (6, 8)),
        ("convt:3-8:k4s2p1o1:6x8+act", {"up+epilogue", "down", "weight_grad+float32"}, (13, 17)),
    ),
)
def test_shapes(name, kinds, high):
    problems = problems_of([name], (4,), [BF16])
    assert {p.kind for p in problems} == kinds
    assert {p.high for p in problems} == {high}


@pytest.mark.parametrize(
    "name, words",
    (
        ("dcgan63", "image sizes"),
        ("dcgan", "none of"),
        ("conv:3-8", "none of"),
        ("conv:0-8:k4s2p1:6x8", "at least 1"),
        ("conv:3-8:k7s2p0:6x6", "no pixels"),
        ("conv:3-8:k4s2p1o1:6x6", "output padding o is of convt"),
        ("convt:3-8:k4s2p1o2:6x6", "less than the stride"),
        ("no.such.module:name", "no"),
        (f"{__name__}:nothing", "nothing"),
        (f"{__name__}:dict", "not an nn.Module"),
        ("torch.nn:Flatten:0", "torch.nn:Flatten:0"),
    ),
)
def test_bad_names(name, words):
    with pytest.raises(ValueError, match=words):
        problems_of([name], (4,), [BF16], (3, 6, 6))


def test_a_model_needs_an_input_that_fits():
    with pytest.raises(ValueError, match="--input"):
        problems_of([f"{__name__}:Small"], (4,), [BF16])
    with pytest.raises(ValueError, match="cannot be followed"):
        problems_of([f"{__name__}:Small"], (4,), [BF16], (4, 6, 6))


dict = dict  # something that can be called and gives no model


@pytest.mark.parametrize("dtype", (BF16, torch.float32))
def test_candidates(dtype):
    for problem in problems_of(["dcgan28", "dcgan64", "dcgan128"], (64, 1024), [dtype]):
        tiles = candidates(problem)
        assert 1 <= len({tile[:5] for tile in tiles}) <= 26 and len(set(tiles)) == len(tiles)
        assert {tile.share for tile in tiles} == ({1, 2} if problem.operation == "weight_grad" else {2})
        # Beside a tile in a row there is one of positions, where it takes full blocks of images and whole steps.
        pairs = [tile for tile in tiles if tile.by_position]
        assert all(problem.batch % tile.block_m == 0 and tile._replace(by_position=False) in tiles for tile in pairs)
        leaves_out = problem.operation != "weight_grad" and problem.low != (1, 1)
        assert bool(pairs) == leaves_out or min(problem.a, problem.b) < 64, problem
        for tile in tiles:
            assert all(block & (block - 1) == 0 for block in tile[:3])
            # One: of a kernel that is no matrix product, or where a program has all columns, or the whole depth.
            assert min(tile[:3]) >= 16 or 1 in (tile.block_n, tile.block_k)
            # Operands of every stage must fit in the shared memory of a large GPU.
            kib = (tile.block_m + tile.block_n) * tile.block_k * dtype.itemsize * tile.num_stages / 1024
            assert kib <= 227, (problem, tile)


def test_candidates_at_the_ends_of_a_gan_are_of_their_own_kernels():
    for problem in problems_of(["dcgan28", "dcgan64"], (64,), [BF16]):
        kernels = [launch.kernel for launch in launches(problem, Choice("triton", candidates(problem)[0]._asdict()))]
        narrow = problem.operation == "up" and problem.b <= 3
        assert ("up_narrow_kernel" in kernels) == narrow
        assert all(tile.block_n == 16 for tile in candidates(problem)) or not narrow
        # Weight gradients and convolutions of images have two ways, a convolution to one channel one of its own.
        of_image = problem.operation == "weight_grad" and problem.b <= 3
        to_one = problem.operation == "down" and problem.a == 1
        assert {tile.block_n == 1 for tile in candidates(problem)} == ({True, False} if of_image else {to_one})
        from_image = problem.operation == "down" and problem.b <= 3 and problem.low[1] == 32
        assert any(tile.block_k == 1 for tile in candidates(problem)) == from_image
        last = launches(problem, Choice("triton", candidates(problem)[-1]._asdict()))[0].kernel
        assert (last == "weight_grad_narrow_kernel") == of_image and (last == "down_single_kernel") == to_one


@pytest.mark.parametrize("then", ("statistics", "normalized"))
def test_candidates_beside_sums_are_tiles_of_matrices(then):
    """narrow.py computes no sums: its tiles would be taken for those of a matrix product of 16 columns."""
    problem = next(p for p in problems_of(["dcgan64"], (64,), [BF16]) if p.operation == "up" and p.b == 3)
    tiles = candidates(problem._replace(kind=f"up+{then}"))
    kernels = [launch.kernel for launch in launches(problem, Choice("triton", candidates(problem)[0]._asdict()))]
    assert "up_narrow_kernel" in kernels and set(tiles).isdisjoint(candidates(problem)) and len(tiles) > 3


def test_launches_of_a_run_without_data():
    (problem,) = (p for p in problems_of(["conv:16-32:k4s2p1:8x8+bn"], (4,), [BF16]) if p.then == "statistics")
    tile = candidates(problem)[0]
    for _ in range(2):  # recording leaves nothing behind
        ours = [launch.kernel for launch in launches(problem, Choice("triton", tile._asdict()))]
        assert ours == ["down_kernel", "merge_statistics_kernel"]
        theirs = [launch.kernel for launch in launches(problem, Choice("cudnn"))]
        assert theirs == ["tile_statistics_kernel", "merge_statistics_kernel"]
