"""SignSGD and CaileySGD."""

import copy

import pytest
import torch
from torch import nn

from qframework.graph.optim import CaileySGD, SignSGD


def trained(optimizer, parameter: nn.Parameter, grads) -> torch.Tensor:
    for grad in grads:
        parameter.grad = torch.tensor(grad)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("foreach", [None, True, False])
def test_steps_have_one_length(foreach) -> None:
    p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    out = trained(SignSGD([p], lr=0.5, foreach=foreach), p, [[0.1, -7.0, 0.0]])
    assert out.tolist() == [0.5, -1.5, 3.0]


def test_momentum_weight_decay_and_direction_are_those_of_sgd() -> None:
    for how in (
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "nesterov": True},
        {"weight_decay": 0.3},
        {"maximize": True},
    ):
        p, like = (nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
        ours, torchs = SignSGD([p], lr=1.0, **how), torch.optim.SGD([like], lr=1.0, **how)
        for grad in ([0.5, -0.2], [-0.1, 0.3], [-0.6, 0.1]):
            with torch.no_grad():
                like.copy_(p)
            before = p.detach().clone()
            trained(ours, p, [grad])
            step = before - trained(torchs, like, [grad])
            assert torch.equal(before - p.detach(), step.sign())


def test_a_closure_gives_the_loss() -> None:
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = SignSGD([p], lr=0.5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4 and p == 1.5


@pytest.mark.parametrize(
    "how",
    [{"lr": -1.0}, {"momentum": -0.1}, {"weight_decay": -1.0}, {"nesterov": True}, {"fused": True}],
)
def test_what_cant_be_is_refused(how) -> None:
    with pytest.raises(ValueError, match="SignSGD"):
        SignSGD([nn.Parameter(torch.ones(1))], **how)


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0][:rows].clone()


@pytest.mark.parametrize("shape", [(8, 8), (3, 8), (1, 4)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rows_stay_orthonormal_and_go_where_they_should(shape, momentum) -> None:
    rotation = nn.Parameter(orthonormal(*shape, 0))
    goal = orthonormal(*shape, 1)
    if shape[0] == shape[1] and torch.det(goal) * torch.det(rotation.detach()) < 0:
        goal[0] = -goal[0]  # the transform keeps the determinant
    optimizer = CaileySGD([rotation], lr=0.05, momentum=momentum, stiefel=True)
    for _ in range(300):
        optimizer.zero_grad()
        (rotation - goal).square().sum().backward()
        optimizer.step()
        product = rotation @ rotation.t()
        assert torch.allclose(product, torch.eye(shape[0]), atol=1e-4)
    assert torch.allclose(rotation, goal, atol=1e-2)


def test_a_step_is_that_of_the_transform() -> None:
    """The iterations solve (1 - a W / 2) Y = (1 + a W / 2) X."""
    start, grad = orthonormal(4, 6, 0).double(), torch.randn(4, 6).double()
    p = nn.Parameter(start.clone())
    p.grad = grad
    CaileySGD([p], lr=1e-3, stiefel=True, iters=30).step()
    x, m = start.t(), -grad.t()
    a = m @ x.t() - 0.5 * x @ (x.t() @ m @ x.t())
    w, eye = a - a.t(), torch.eye(6).double()
    y = torch.linalg.solve(eye - 0.5e-3 * w, (eye + 0.5e-3 * w) @ x)
    assert torch.allclose(p, y.t(), atol=1e-9)


def test_other_parameters_take_steps_of_sgd() -> None:
    how = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    tall, vector = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(3))
    like = [nn.Parameter(p.detach().clone()) for p in (tall, vector)]
    ours = CaileySGD([{"params": [tall], "stiefel": True}, {"params": [vector]}], **how)
    torchs = torch.optim.SGD(like, **how)
    for _ in range(3):
        for p in (tall, vector, *like):
            p.grad = torch.linspace(-1, 1, p.numel()).reshape(p.shape)
        ours.step()
        torchs.step()
    assert torch.allclose(tall, like[0]) and torch.allclose(vector, like[1])


def test_gradients_are_clipped() -> None:
    p = nn.Parameter(torch.zeros(2))
    out = trained(CaileySGD([p], lr=1.0, grad_clip=1.0), p, [[3.0, 4.0]])
    assert torch.allclose(out, torch.tensor([-0.6, -0.8]))


def test_a_state_dict_carries_on() -> None:
    p = nn.Parameter(orthonormal(3, 5, 0))
    optimizer = CaileySGD([p], lr=0.1, momentum=0.9, stiefel=True)
    trained(optimizer, p, [torch.ones(3, 5).tolist()] * 2)
    other = nn.Parameter(p.detach().clone())
    again = CaileySGD([other], lr=0.1, momentum=0.9, stiefel=True)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    grads = [torch.linspace(0, 1, 15).reshape(3, 5).tolist()]
    assert torch.equal(trained(optimizer, p, grads), trained(again, other, grads))
