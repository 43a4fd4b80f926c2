"""What a table says of convolutions that it has, and of those that are like them."""

from pathlib import Path

import pytest

from fastgan.kernels import narrow
from fastgan.ops.choice import shipped_tables
from fastgan.ops.nearest import MOST_NARROW, Evidence, find, nearest
from fastgan.ops.tables import Measurement, Problem, read_table

PROBLEM = Problem("up+statistics", "bfloat16", 128, (4, 4), (8, 8), 512, 256, (4, 4), (2, 2), (1, 1))


def measured(implementation="triton", triton_us=10.0, cudnn_us=20.0, batch=128):
    return Measurement(implementation, None, triton_us, cudnn_us, batch)


def table_of(rows):
    """{layer: {batch: Measurement}} of {Problem: Measurement}."""
    table = {}
    for problem, one in rows.items():
        table.setdefault(problem.layer, {})[problem.batch] = one._replace(batch=problem.batch)
    return table


@pytest.mark.parametrize(
    "batch, expected", ((31, None), (32, 64), (90, 64), (91, 128), (128, 128), (400, 256), (512, 256), (513, None))
)
def test_nearest_batch_within_a_factor_of_two(batch, expected):
    table = {PROBLEM.layer: {n: measured(batch=n) for n in (64, 128, 256)}}
    found = find(table, PROBLEM._replace(batch=batch))
    assert (found and found.batch) == expected


def test_of_two_batches_as_near_the_larger():
    table = {PROBLEM.layer: {n: measured(batch=n) for n in (64, 256)}}
    assert find(table, PROBLEM._replace(batch=128)).batch == 256


def test_an_epilogue_that_was_not_measured_follows_the_plain_convolution():
    plain, epilogue = (PROBLEM._replace(kind=kind) for kind in ("up", "up+epilogue"))
    assert find({plain.layer: {128: measured()}}, epilogue).implementation == "triton"
    both = {plain.layer: {128: measured()}, epilogue.layer: {128: measured("cudnn")}}
    assert find(both, epilogue).implementation == "cudnn"
    assert find({epilogue.layer: {128: measured()}}, plain) is None


@pytest.mark.parametrize(
    "kind, most", [("down+activated", 13.0), ("up+normalized", 10.0), ("weight_grad+float32", 10.5)]
)
def test_what_was_not_measured_with_what_follows(kind, most):
    """cuDNN needs a pass of its own for it, so ours may be somewhat slower without; but not by any factor."""
    plain, more = (PROBLEM._replace(kind=name) for name in (kind.partition("+")[0], kind))
    for triton_us, wanted in ((5.0, "triton"), (most - 0.1, "triton"), (most + 0.1, "cudnn"), (None, "cudnn")):
        implementation = "triton" if triton_us == 5.0 else "cudnn"
        table = {plain.layer: {128: measured(implementation)._replace(triton_us=triton_us, cudnn_us=10.0)}}
        assert find(table, more).implementation == wanted
        assert find(table, plain).implementation == implementation
    table[more.layer] = {128: measured()}
    assert find(table, more).implementation == "triton"
    assert find({}, more) is None


def test_a_weight_gradient_follows_the_one_that_was_measured():
    plain, wide = (PROBLEM._replace(kind=kind) for kind in ("weight_grad", "weight_grad+float32"))
    table = {wide.layer: {128: measured()}}
    assert find(table, plain) == find(table, wide) == measured()
    table[plain.layer] = {128: measured("cudnn")}
    assert find(table, plain) == measured("cudnn") and find(table, wide) == measured()


def test_the_same_layer_counts_as_measured():
    table = table_of({PROBLEM: measured(), PROBLEM._replace(batch=256): measured("cudnn")})
    assert nearest(table, PROBLEM) == Evidence(measured(), PROBLEM)
    at_100 = nearest(table, PROBLEM._replace(batch=100))
    assert at_100 == Evidence(measured(), PROBLEM) and at_100.implementation == "triton"


@pytest.mark.parametrize(
    "change, differences",
    (
        (dict(dtype="float16"), 1),
        (dict(batch=32, low=(8, 8), high=(16, 16)), 1),
        (dict(batch=64, low=(4, 8), high=(8, 16), dtype="float16"), 2),
        (dict(low=(8, 8), high=(16, 16)), 2),  # four times the positions: one factor of two more than a batch may have
        (dict(batch=8, low=(16, 16), high=(32, 32)), None),
        (dict(batch=256, low=(2, 2), high=(4, 4)), 1),
        (dict(batch=512), 1),
        (dict(batch=16), 2),
        (dict(batch=1024, dtype="float16"), 3),
        (dict(batch=2048, dtype="float16"), None),
        (dict(batch=2049), None),
        (dict(dtype="tf32"), None),
        (dict(dtype="float32"), None),
        (dict(kind="up"), None),
        (dict(kind="down+statistics"), None),
        (dict(low=(6, 6), high=(12, 12)), None),
        (dict(low=(5, 4), high=(10, 8)), None),
        (dict(low=(8, 8), high=(15, 15)), None),
        (dict(low=(1, 1), high=(2, 2)), None),
        (dict(a=513), None),
        (dict(kernel=(3, 3)), None),
        (dict(stride=(1, 1)), None),
        (dict(padding=(0, 0)), None),
    ),
    ids=str,
)
def test_likeness(change, differences):
    found = nearest(table_of({PROBLEM: measured()}), PROBLEM._replace(**change))
    assert (found and found.differences) == differences
    assert found is None or found.problem == PROBLEM


def test_each_difference_asks_for_a_larger_lead():
    for differences, least in ((0, 10.0), (1, 12.5), (2, 15.625), (3, 19.53125)):
        assert Evidence(measured(cudnn_us=least + 0.01), PROBLEM, differences).implementation == "triton"
        # Of the layer itself the table has the last word, whatever the times are.
        few = Evidence(measured(cudnn_us=least - 0.01), PROBLEM, differences)
        assert few.implementation == ("cudnn" if differences else "triton")
        assert Evidence(measured("cudnn", None, 5.0), PROBLEM, differences).implementation == "cudnn"
        assert Evidence(measured("cudnn", 10.0, 9.0), PROBLEM, differences).implementation == "cudnn"


def test_the_nearest_of_those_alike():
    """The one that differs in fewer ways; of several the one of the nearest number of positions."""
    larger = PROBLEM._replace(batch=64, low=(8, 8), high=(16, 16))
    wanted = larger._replace(batch=128)
    rows = {PROBLEM: measured(), PROBLEM._replace(batch=256): measured(), PROBLEM._replace(batch=512): measured()}
    assert nearest(table_of(rows), wanted).problem == PROBLEM._replace(batch=512)
    # One step away both: four times as many positions at another size, or as many in another dtype.
    rows[wanted._replace(dtype="float16")] = measured()
    assert nearest(table_of(rows), wanted).problem.batch in (128, 512)
    assert nearest(table_of({**rows, larger: measured()}), wanted) == Evidence(measured(batch=64), larger)


def test_what_follows_is_looked_for_as_in_the_layer_itself():
    """An activation's derivative, measured without: it needs a lead of one difference, and cuDNN a pass."""
    plain, wanted = PROBLEM._replace(kind="up"), PROBLEM._replace(kind="up+activated", dtype="float16")
    for cudnn_us, expected in ((12.4, "cudnn"), (12.6, "triton")):
        found = nearest(table_of({plain: measured(cudnn_us=cudnn_us)}), wanted)
        assert found.implementation == expected
        assert found.problem == wanted._replace(dtype="bfloat16")


@pytest.mark.parametrize(
    "kind, channels, same_kernel",
    [
        ("down+epilogue", {"a": 1}, True),
        ("down+activated", {"a": 1}, False),
        ("down+normalized", {"a": 1}, False),
        ("down+normalized", {"a": 2}, True),
        ("up+activated", {"b": MOST_NARROW}, True),
        ("up+normalized", {"b": MOST_NARROW}, False),
        ("up+normalized", {"b": MOST_NARROW + 1}, True),
        ("weight_grad+float32", {"a": 1, "b": 1}, True),
    ],
)
def test_a_kernel_tells_nothing_of_another(kind, channels, same_kernel):
    """Our kernels for few channels do not all that follows a convolution: where they do not, a matrix kernel runs."""
    plain, more = (PROBLEM._replace(kind=name, **channels) for name in (kind.partition("+")[0], kind))
    table = {plain.layer: {128: measured()}}
    assert (find(table, more) is not None) == same_kernel
    assert find({**table, more.layer: {128: measured()}}, more) is not None
    assert MOST_NARROW == narrow.MOST_CHANNELS


def test_the_margin_is_enough_in_what_was_measured():
    """Each row of the shipped tables, told from the others: where ours is chosen it is not 3 % slower than cuDNN."""
    decided = chosen = 0
    for path in map(Path, shipped_tables()):
        table = table_of(read_table(path))
        for layer, batches in table.items():
            for batch, row in batches.items():
                others = {**table, layer: {n: one for n, one in batches.items() if n != batch}}
                found = nearest({layer: rows for layer, rows in others.items() if rows}, layer._replace(batch=batch))
                decided += found is not None
                if found is not None and found.implementation == "triton":
                    chosen += 1
                    assert row.triton_us < 1.03 * row.cudnn_us, (path.name, layer, batch, found)
    assert decided and chosen > decided / 2  # and it is chosen where it gains


def test_the_margin_is_enough_from_one_gpu_to_the_other():
    tables = [table_of(read_table(Path(path))) for path in shipped_tables()]
    chosen = 0
    for here in tables:
        for there in (table for table in tables if table is not here):
            for layer, batches in there.items():
                for batch, row in batches.items():
                    found = nearest(here, layer._replace(batch=batch))
                    if found and found._replace(differences=found.differences + 1).implementation == "triton":
                        chosen += 1
                        assert row.implementation == "triton", (layer, batch, found)
    assert chosen
