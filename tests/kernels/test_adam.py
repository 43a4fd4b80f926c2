"""Adam's kernel against torch's Adam in float64."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan.kernels import adam
from fastgan.kernels.adam import BLOCK, AdamUpdate
from fastgan.kernels.addresses import Tables, filled_after_capture
from fastgan.kernels.offline import started_by
from fastgan.training.adam import KernelAdam
from tests.accuracy import assert_as_accurate_as_stock

pytestmark = pytest.mark.usefixtures("triton_backend", "poisoned")

# A block with a rest, one number, whole blocks in channels_last, and odd sizes around them.
SHAPES = ((BLOCK + 3,), (), (64, 32, 2, 2), (5, 3, 3, 3), (1, 7, 2, 2), (3, 1))
LR, BETAS = 0.01, (0.5, 0.999)


def random_tensors(seed, device):
    random = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=random).to(device) for shape in SHAPES]
    return [tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor for tensor in tensors]


def train(kind, device, dtype=torch.float32, steps=3, **options):
    """(the optimizer, its parameters) after steps on random gradients."""
    parameters = [tensor.to(dtype).requires_grad_() for tensor in random_tensors(0, device)]
    optimizer = kind(parameters, **{"lr": LR, "betas": BETAS, "fused": True, **options})
    for step in range(1, steps + 1):
        for parameter, grad in zip(parameters, random_tensors(step, device), strict=True):
            parameter.grad = grad.to(dtype)
        optimizer.step()
    return optimizer, parameters


def assert_as_accurate(ours, stock, exact):
    (ours, parameters), (stock, theirs), (exact, references) = ours, stock, exact
    for i, all_three in enumerate(zip(parameters, theirs, references, strict=True)):
        assert_as_accurate_as_stock(f"parameter {i}", *(tensor.detach() for tensor in all_three))
        states = [optimizer.state_dict()["state"][i] for optimizer in (ours, stock, exact)]
        assert states[0].keys() == states[1].keys()
        for name in states[0]:
            assert_as_accurate_as_stock(f"{name} of {i}", *(state[name] for state in states))
            assert states[0][name].stride() == states[1][name].stride()


@pytest.fixture
def updates(monkeypatch):
    """How often the kernel ran."""
    calls, call = [], AdamUpdate.__call__
    monkeypatch.setattr(AdamUpdate, "__call__", lambda *args, **options: (calls.append(1), call(*args, **options)))
    return calls


@pytest.mark.parametrize("steps", (1, 4))
@pytest.mark.parametrize("betas", (BETAS, (0.0, 0.9)))
def test_numbers_are_those_of_torch(betas, steps, device, updates):
    kinds = ((KernelAdam, torch.float32), (torch.optim.Adam, torch.float32), (torch.optim.Adam, torch.float64))
    assert_as_accurate(*(train(kind, device, dtype, steps, betas=betas) for kind, dtype in kinds))
    assert len(updates) == steps


def test_after_many_steps(device):
    """Bias correction by powers of large numbers of steps."""
    kinds = ((KernelAdam, torch.float32), (torch.optim.Adam, torch.float32), (torch.optim.Adam, torch.float64))
    trained = []
    for kind, dtype in kinds:
        optimizer, parameters = train(kind, device, dtype, steps=1)
        for count, state in zip((9, 99, 1000, 12_345, 2**20, 2**24 - 1), optimizer.state.values(), strict=True):
            state["step"].fill_(count)
        for parameter, grad in zip(parameters, random_tensors(7, device), strict=True):
            parameter.grad = grad.to(dtype)
        optimizer.step()
        trained.append((optimizer, parameters))
    assert_as_accurate(*trained)


def test_learning_rate_in_memory(device, updates):
    plain, of_tensor = (train(KernelAdam, device, lr=lr) for lr in (LR, torch.tensor(LR, device=device)))
    assert all(map(torch.equal, plain[1], of_tensor[1])) and len(updates) == 6


@pytest.mark.parametrize(
    "options", ({"amsgrad": True}, {"weight_decay": 0.1}, {"maximize": True}), ids=lambda options: str(*options)
)
def test_what_the_kernel_has_no_code_for_is_left_to_torch(options, device, updates):
    ours, theirs = (train(kind, device, **options)[1] for kind in (KernelAdam, torch.optim.Adam))
    assert all(map(torch.equal, ours, theirs)) and not updates


def test_what_the_kernel_cannot_reach_is_left_to_torch():
    class Elsewhere(torch.Tensor):
        pass

    def lists(params, grads):
        return [params, grads, *([torch.ones_like(grad) for grad in grads] for _ in range(2)), [torch.ones(())]]

    plain = torch.ones(8)
    assert AdamUpdate.supports(*lists([plain], [plain]))
    others = [plain.as_subclass(Elsewhere), plain.double(), plain.to("meta"), plain[::2], torch.ones(9)[1:]]
    assert not any(AdamUpdate.supports(*lists([plain], [other])) for other in others)
    assert not any(AdamUpdate.supports(*lists([other], [plain])) for other in others)


def test_scaled_gradients_are_left_to_torch(device, updates):
    optimizer, parameters = train(KernelAdam, device, steps=1)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.grad_scale, optimizer.found_inf = torch.ones((), device=device), torch.ones((), device=device)
    optimizer.step()  # a step with infinite gradients is none
    assert all(map(torch.equal, before, parameters)) and len(updates) == 1


def test_parameters_without_gradients_and_others_that_moved(device, updates):
    """Tables follow the tensors: a gradient is missing for a step, a parameter is elsewhere after it."""
    trained = []
    for kind in (KernelAdam, torch.optim.Adam):
        optimizer, parameters = train(kind, device, steps=1)
        parameters[1].grad = None
        optimizer.step()
        parameters[2].data = parameters[2].data.clone()
        optimizer.step()
        trained.append(parameters)
    for ours, theirs in zip(*trained, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(updates) == 3


def test_no_parameters_with_gradients(device, updates):
    optimizer = KernelAdam([torch.ones(3, device=device, requires_grad=True)], fused=True)
    optimizer.step()
    assert not updates


def test_captured_and_replayed(device):
    """As in a CUDA graph: what is started in a capture runs later, several times, on the same tensors."""
    (params, *others), (expected, *rest) = (
        [random_tensors(i, device) for i in range(4)] + [[torch.zeros((), device=device) for _ in SHAPES]] for _ in "ab"
    )
    others[2], rest[2] = ([tensor.abs() for tensor in squares] for squares in (others[2], rest[2]))
    options, started, captured = dict(lr=LR, betas=BETAS, eps=1e-8), [], AdamUpdate()
    with started_by(lambda *args, **kwargs: started.append((args, kwargs))):
        captured(contiguous(expected), *map(contiguous, rest), **options)  # a warm-up, on other tensors
        del started[:]
        with filled_after_capture() as kept:
            captured(contiguous(params), *map(contiguous, others), **options)
    assert len(kept) == len(started) == 2
    update = AdamUpdate()
    for _ in range(3):
        for args, kwargs in started:
            adam.launch(*args, **kwargs)
        update(contiguous(expected), *map(contiguous, rest), **options)
        assert all(map(torch.equal, (*params, *others[3]), (*expected, *rest[3])))


def contiguous(tensors):
    """The same memory in the order in which it lies."""
    return [tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor for tensor in tensors]


class Allocations(TorchDispatchMode):
    """Counts the operators that are called within it."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += 1
        return operator(*args, **kwargs or {})


def test_tables_of_a_capture_are_filled_at_its_end(device):
    tensors, made = [torch.ones(5, device=device), torch.ones(2, device=device)], Tables(block=4)
    before = made(tensors)
    moved = [tensor.clone() for tensor in tensors]
    with filled_after_capture() as kept:
        # What a capture allocates can be what earlier kernels of the graph have given back: they write there again.
        with Allocations() as allocations:
            addresses, blocks = made(moved)
            assert made(moved)[0] is addresses
        assert allocations.count == 0
    assert [id(table) for table in kept] == [id(table) for table in (addresses, blocks) * 2]
    assert addresses.tolist() == [[tensor.data_ptr()] for tensor in moved]
    assert before[0].tolist() == [[tensor.data_ptr()] for tensor in tensors]
    assert blocks is before[1] and blocks.tolist() == [[0, 0, 5], [0, 4, 5], [1, 0, 2]]
    # Calls outside of it get tables of their own, and another capture too.
    again = made(tensors)
    with filled_after_capture():
        others = made([tensor.clone() for tensor in tensors])
    assert len({table[0].data_ptr() for table in ((addresses,), before, again, others)}) == 4
    assert addresses.tolist() == [[tensor.data_ptr()] for tensor in moved]


def test_a_capture_of_another_thread_fills_none_of_ours(device):
    tensors, others = [torch.ones(3, device=device)], [torch.ones(3, device=device)]
    with ThreadPoolExecutor(1) as pool:
        with filled_after_capture():
            made = Tables(block=4)
            assert pool.submit(made, tensors).result()[0].tolist() == [[tensors[0].data_ptr()]]
        assert made(others)[0].tolist() == [[others[0].data_ptr()]]


def test_a_capture_that_fails_leaves_no_empty_table(device):
    tensors, made = [torch.ones(5, device=device), torch.ones(2, device=device)], Tables(block=4)
    made(tensors)
    moved = [tensor.clone() for tensor in tensors]
    with pytest.raises(ZeroDivisionError), filled_after_capture():
        made(moved)
        raise ZeroDivisionError
    assert made(moved)[0].tolist() == [[tensor.data_ptr()] for tensor in moved]


def test_a_capture_without_warm_up_is_refused(device):
    tensors, made = [torch.ones(5, device=device), torch.ones(2, device=device)], Tables(block=4)
    with filled_after_capture(), pytest.raises(RuntimeError, match="once with as many tensors"):
        made(tensors)
    made(tensors[:1])
    with filled_after_capture(), pytest.raises(RuntimeError, match="once with as many tensors"):
        made(tensors)


def test_tables_are_kept(device):
    tensors, made = [torch.ones(5, device=device), torch.ones(2, device=device)], Tables(block=4)
    addresses, blocks = made(tensors)
    assert made(tensors)[0] is addresses and made(tensors)[1] is blocks
    moved = [tensor.clone() for tensor in tensors]
    assert made(moved)[0].tolist() == [[tensor.data_ptr()] for tensor in moved] and made(moved)[1] is blocks
    assert made(tensors[:1])[1].tolist() == [[0, 0, 5], [0, 4, 5]]
