"""Adam in the order of memory, against torch's."""

import pytest
import torch
from torch.optim import optimizer as optimizers

from fastgan.training.adam import ContiguousAdam, KernelAdam

SHAPES = [(8, 5, 3, 3), (6, 1, 4, 4), (1, 6, 4, 4), (7, 9, 1, 1), (4, 3, 2, 3, 2), (5, 3), (11,), ()]


def parameters(layout, seed=0):
    random = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=random) for shape in SHAPES]
    return [tensor.to(memory_format=layout) if tensor.dim() == 4 else tensor for tensor in tensors]


def trained(adam, layout, grad_layout, without=None, steps=3, **options):
    """(parameters, state of the optimizer) after steps with random gradients, one parameter without."""
    learning = [tensor.requires_grad_() for tensor in parameters(layout)]
    optimizer = adam(learning, lr=0.1, fused=True, **options)
    for step in range(steps):
        for parameter, grad in zip(learning, parameters(grad_layout, seed=step + 1), strict=True):
            parameter.grad = grad
        if without is not None:
            learning[without].grad = None
        optimizer.step()
    return learning, optimizer.state_dict()["state"]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("grad_layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    "options",
    [{}, {"without": -2}, {"betas": (0.0, 0.9)}, {"amsgrad": True, "weight_decay": 0.1, "maximize": True}],
    ids=str,
)
def test_numbers_are_those_of_torch(layout, grad_layout, options):
    ours, state = trained(ContiguousAdam, layout, grad_layout, **options)
    # With gradients that lie as their parameters do: torch's goes through others in another order than through these.
    theirs, expected = trained(torch.optim.Adam, layout, layout, **options)
    assert all(map(torch.equal, ours, theirs))
    assert state.keys() == expected.keys()
    for index, moments in expected.items():
        assert moments.keys() == state[index].keys()
        for name, value in moments.items():
            assert torch.equal(state[index][name], value) and state[index][name].stride() == value.stride(), name


def test_no_gradient_is_copied():
    learning = [tensor.requires_grad_() for tensor in parameters(torch.channels_last)]
    optimizer = ContiguousAdam(learning, fused=True)
    for parameter, grad in zip(learning, parameters(torch.channels_last, seed=1), strict=True):
        parameter.grad = grad
    optimizer.step()
    with torch.profiler.profile() as profile:
        optimizer.step()
    names = {event.key for event in profile.key_averages()}
    assert "aten::_fused_adam_" in names
    assert "aten::clone" not in names


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_go(set_to_none):
    learning = [tensor.requires_grad_() for tensor in parameters(torch.channels_last)]
    optimizer = ContiguousAdam(learning[:3])
    optimizer.add_param_group({"params": learning[3:]})
    for parameter in learning[1:]:
        parameter.grad = torch.ones_like(parameter)
    grads = [parameter.grad for parameter in learning]
    optimizer.zero_grad(set_to_none)
    if set_to_none:
        assert all(parameter.grad is None for parameter in learning)
        assert all(grad.all() for grad in grads[1:])
    else:
        assert learning[0].grad is None
        assert all(
            parameter.grad is grad and not grad.any() for parameter, grad in zip(learning[1:], grads[1:], strict=True)
        )


def test_hooks_and_schedulers_work():
    parameter, called = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_(), []
    torch.optim.Adam([parameter])  # from now on torch's step calls hooks by itself
    optimizer = ContiguousAdam([parameter], lr=1.0, fused=True)
    optimizer.register_step_post_hook(lambda *_: called.append(True))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    for _ in range(2):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        scheduler.step()
        after = parameter.detach().clone()
    assert len(called) == 2 and (after.abs() < 1e-6).all()  # one step of 1.0, then one of 0.0


@pytest.mark.parametrize("adam", [ContiguousAdam, KernelAdam])
@pytest.mark.parametrize("when", ["pre", "post"])
@pytest.mark.parametrize("of_all", [False, True])
def test_each_hook_is_called_once(of_all, when, adam):
    parameter, called = torch.ones(3, requires_grad=True), []
    optimizer = adam([parameter], lr=1.0, fused=True)
    parameter.grad = torch.ones(3)
    optimizer.step()
    register = getattr(optimizers, f"register_optimizer_step_{when}_hook")
    if not of_all:
        register = getattr(optimizer, f"register_step_{when}_hook")
    with register(lambda *_: called.append(True)):
        optimizer.step()
    optimizer.step()
    assert called == [True]


def test_a_profile_shows_each_step():
    parameter = torch.ones(3, requires_grad=True)
    optimizer = ContiguousAdam([parameter], lr=1.0, fused=True)
    parameter.grad = torch.ones(3)
    optimizer.step()
    with torch.profiler.profile() as profile:
        optimizer.step()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["Optimizer.step#ContiguousAdam.step"] == 1


def test_what_is_left_to_torch(monkeypatch):
    def forbidden(*_):
        raise AssertionError

    parameter = torch.ones(2, 3, 4, 4, requires_grad=True)
    optimizer = ContiguousAdam([parameter], lr=0.1, fused=True)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # makes the averages
    (group,) = optimizer.param_groups
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", forbidden)
        optimizer.step()
        changes = dict(amsgrad=True, maximize=True, weight_decay=0.1, lr=torch.tensor(0.1), fused=False)
        for name, value in changes.items():
            patch.setitem(group, name, value)
            with pytest.raises(AssertionError):
                optimizer.step()
            patch.setitem(group, name, optimizer.defaults[name])
        with pytest.raises(AssertionError):
            optimizer.step(lambda: None)
        parameter.grad = None
        with pytest.raises(AssertionError):
            optimizer.step()
    assert optimizer.state[parameter]["step"] == 2
    parameter.grad = torch.ones_like(parameter)
    assert optimizer.step(lambda: 3.0) == 3.0


@pytest.mark.parametrize("adam", (ContiguousAdam, KernelAdam))
@pytest.mark.parametrize("shape", ((4, 3, 2, 2), (6, 4), (2, 3, 4), (2, 2, 2, 2, 3)), ids=str)
def test_an_assigned_gradient_may_lie_another_way(shape, adam):
    torch.manual_seed(0)
    start, grads = torch.randn(shape), torch.randn(3, *shape)
    if len(shape) == 4:
        start = start.to(memory_format=torch.channels_last)
    ours, stock = (start.clone().requires_grad_() for _ in range(2))
    optimizers = adam([ours], lr=0.1, fused=True), torch.optim.Adam([stock], lr=0.1, fused=False)
    for grad in grads:
        for parameter, optimizer in zip((ours, stock), optimizers, strict=True):
            lying = grad.transpose(0, 1).contiguous().transpose(0, 1) if len(shape) != 4 else grad.clone()
            parameter.grad = lying
            optimizer.step()
    torch.testing.assert_close(ours, stock, rtol=1e-6, atol=1e-6)


def test_averages_of_another_shape_are_refused():
    """The fused update would go on beyond the end of a smaller one."""
    own, other = (ContiguousAdam([torch.zeros(shape).requires_grad_()], fused=True) for shape in ((4, 3), (2, 3)))
    for optimizer in (own, other):
        optimizer.param_groups[0]["params"][0].grad = torch.ones_like(optimizer.param_groups[0]["params"][0])
        optimizer.step()
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 must have its shape \(4, 3\); got \(2, 3\)"):
        own.load_state_dict(other.state_dict())
    assert next(iter(own.state.values()))["exp_avg"].shape == (4, 3)
