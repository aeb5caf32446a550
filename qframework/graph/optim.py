"""Optimizers that quantization methods ask for: by the sign of the gradient, and on orthonormal matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

__all__ = ["CaileySGD", "SignSGD"]


def _loss_of(closure: Callable[[], Any] | None) -> Any:
    """What a closure computes anew, with gradients."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _check(group: dict[str, Any], who: str) -> None:
    for name in ("lr", "momentum", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{who}: {name}={group[name]!r} must be 0 or above")
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError(
            f"{who}: nesterov=True needs momentum > 0 and dampening=0, got momentum={group['momentum']!r} and "
            f"dampening={group['dampening']!r}"
        )


def _direction(
    parameter: Tensor, grad: Tensor, group: dict[str, Any], state: dict[str, Any]
) -> Tensor:
    """The gradient, with weight decay and momentum as in ``torch.optim.SGD``."""
    if group["weight_decay"]:
        grad = grad.add(parameter, alpha=group["weight_decay"])
    momentum = group["momentum"]
    if not momentum:
        return grad
    held = state.get("momentum_buffer")
    if held is None:
        held = state["momentum_buffer"] = grad.detach().clone()
    else:
        held.mul_(momentum).add_(grad.detach(), alpha=1 - group["dampening"])
    out: Tensor = grad.add(held, alpha=momentum) if group["nesterov"] else held
    return out


class SignSGD(Optimizer):
    """Steps of one length for all elements: ``p - lr * sign(d)`` (https://arxiv.org/abs/1802.04434).

    ``d`` is the gradient with weight decay and momentum as ``torch.optim.SGD`` has them; an element whose ``d`` is 0
    stays. Used for learned rounding, whose parameters live between two integers.

    Args:
        params: parameters, or groups of them.
        lr: the step.
        momentum: factor of the running sum of gradients.
        dampening: how much of a gradient isn't added to that sum.
        weight_decay: this times the parameter is added to its gradient.
        nesterov: look a step ahead.
        maximize: go up rather than down.
        foreach: step in one call for all parameters of a group; the default where they are on a GPU.
        differentiable: let gradients flow through the step.
        fused: must be None or False.

    Raises:
        ValueError: a number below 0, ``nesterov`` without momentum, or ``fused=True``.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        if fused:
            raise ValueError(
                "SignSGD: there is no fused step; allowed: fused=None, and foreach=True"
            )
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "maximize": maximize,
                "foreach": foreach,
                "differentiable": differentiable,
                "fused": fused,
            },
        )
        for group in self.param_groups:
            _check(group, "SignSGD")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: computes the loss anew, and the gradients.

        Returns:
            What ``closure`` returns, else None.
        """
        loss = _loss_of(closure)
        for group in self.param_groups:
            with torch.set_grad_enabled(group["differentiable"]):
                self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        signs = []
        for p in parameters:
            grad = -p.grad if group["maximize"] else p.grad
            signs.append(torch.sign(_direction(p, grad, group, self.state[p])))
        foreach = group["foreach"]
        if foreach is None:
            foreach = not group["differentiable"] and all(p.is_cuda for p in parameters)
        if foreach and parameters:
            torch._foreach_add_(parameters, signs, alpha=-group["lr"])
            return
        for p, sign in zip(parameters, signs, strict=True):
            p.add_(sign, alpha=-group["lr"])


class CaileySGD(Optimizer):
    """SGD that keeps the rows of matrices orthonormal, along the Cayley transform (https://arxiv.org/abs/2002.01113).

    For a matrix with orthonormal rows, its transpose ``X``, gradient ``G`` and momentum ``M``:

        M = momentum * M - G,   A = M X^T - X (X^T M X^T) / 2,   W = A - A^T,   M = W X
        a = min(lr, 1 / ||W||_1),   Y = X + a M,   then ``iters`` times Y = X + a W (X + Y) / 2

    Every hundredth step makes the rows orthonormal anew by a QR decomposition, the first one too. Parameters of groups
    without ``stiefel``, and matrices with more rows than columns, take an ordinary step of SGD.

    Args:
        params: parameters, or groups of them.
        lr: the largest step.
        momentum: factor of the running direction.
        dampening: as in ``torch.optim.SGD``, for ordinary steps.
        weight_decay: as in ``torch.optim.SGD``, for ordinary steps.
        nesterov: as in ``torch.optim.SGD``, for ordinary steps.
        stiefel: whether the rows of matrices are kept orthonormal; usually set per group.
        iters: iterations of the transform's equation.
        grad_clip: the largest norm of a gradient; None for no bound.
        dtype: that matrices are computed in, their own when None.

    Raises:
        ValueError: a number below 0, or ``nesterov`` without momentum.
    """

    #: After how many steps rows are made orthonormal anew.
    steps_between_decompositions = 100

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.1,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        stiefel: bool = False,
        iters: int = 5,
        grad_clip: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "stiefel": stiefel,
                "iters": iters,
                "grad_clip": grad_clip,
                "dtype": dtype,
            },
        )
        for group in self.param_groups:
            _check(group, "CaileySGD")
            if group["iters"] < 1:
                raise ValueError(f"CaileySGD: iters={group['iters']!r} must be 1 or above")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: computes the loss anew, and the gradients.

        Returns:
            What ``closure`` returns, else None.
        """
        loss = _loss_of(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = p.grad
                if group["grad_clip"] is not None:
                    grad = grad * (group["grad_clip"] / grad.norm()).clamp_max(1.0)
                if group["stiefel"] and p.dim() == 2 and p.shape[0] <= p.shape[1]:
                    self._orthonormal_step(p, grad, group)
                else:
                    direction = _direction(p, grad, group, self.state[p])
                    p.add_(direction, alpha=-group["lr"])
        return loss

    def _orthonormal_step(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        dtype = group["dtype"] or parameter.dtype
        count = state.get("step", 0)
        state["step"] = count + 1
        x = parameter.t().to(dtype)
        if count % self.steps_between_decompositions == 0:
            x = _orthonormal_columns(x)
        direction = -grad.t().to(dtype)
        if group["momentum"] and "momentum_buffer" in state:
            direction = direction + group["momentum"] * state["momentum_buffer"].to(dtype)
        mx = direction @ x.t()
        a = mx - 0.5 * (x @ (x.t() @ mx))
        w = a - a.t()
        along = w @ x
        norm = torch.linalg.matrix_norm(w, ord=1)
        step = (1.0 / norm.clamp_min(torch.finfo(dtype).tiny)).clamp_max(group["lr"])
        y = x + step * along
        for _ in range(group["iters"]):
            y = x + 0.5 * step * (w @ (x + y))
        parameter.copy_(y.t())
        if group["momentum"]:
            state["momentum_buffer"] = along


def _orthonormal_columns(x: Tensor) -> Tensor:
    """The nearest columns that a QR decomposition gives, with their directions kept."""
    q, r = torch.linalg.qr(x if x.dtype == torch.float64 else x.float())
    signs = torch.where(torch.diagonal(r) < 0, -1.0, 1.0).to(q.dtype)
    columns: Tensor = q * signs
    return columns.to(x.dtype)
