"""Scales, widths and clipping while a model trains."""

from __future__ import annotations

from collections.abc import Callable, MutableSequence
from typing import Any

import torch
from torch import Tensor, nn

from qframework.arguments import check_module
from qframework.inspect.grid import grid_of
from qframework.inspect.places import Place, places
from qframework.quant_tensor import QuantTensor

#: Entry points of training loops that a callback has and that mean nothing here.
_CALLBACK_PREFIXES = ("on_", "setup", "teardown")


class QuantizationLogger:
    """Logs scale, zero point, width and clipping of each quantized tensor.

    In a plain loop call :meth:`step` after each training step. With Lightning give it as a callback, with accelerate give the
    ``Accelerator`` as ``to``. Clipping is that of the forward pass that is logged, of a sample of its values.

    Keys are ``"conv1.weight/scale"``, ``/scale_min`` and ``/scale_max`` where there are several, ``/zero_point`` where there is one,
    ``/bit_width``, ``/clipped``, and ``/scale_gradient`` for learned scales that have a gradient.

    Args:
        model: quantized; None where Lightning gives it.
        to: where records go: a list (dicts with ``"step"`` are appended), a tensorboard ``SummaryWriter`` (``add_scalar``), a Lightning
            logger (``log_metrics``), an object with ``log(values, step=...)`` such as a wandb run or an ``Accelerator``, or a function
            of values and step. None for a list of its own, :attr:`records`.
        every: log each so many steps, from the first.
        prefix: in front of each key.
        sample: values of a tensor that are looked at for clipping.

    Attributes:
        records: what was logged, where ``to`` is None or a list.

    Raises:
        TypeError: ``to`` is none of these.
        ValueError: ``every`` or ``sample`` isn't positive, or the model quantizes nothing.

    Example::

        with QuantizationLogger(model, every=50) as logger:
            for x, y in loader:
                ...
                optimizer.step()
                logger.step()
        logger.records[-1]["conv1.weight/scale"]
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        to: Any = None,
        every: int = 1,
        prefix: str = "",
        sample: int = 16384,
    ) -> None:
        if every < 1 or sample < 1:
            raise ValueError(
                f"QuantizationLogger: every={every} and sample={sample} must be at least 1"
            )
        self.records: MutableSequence[Any] = to if isinstance(to, MutableSequence) else []
        self._write = _writer(self.records if to is None else to)
        self.every, self.prefix, self.sample = every, prefix, sample
        self.steps = 0
        self._places: list[Place] = []
        self._handles: list[Any] = []
        self._clipped: dict[str, Tensor] = {}
        if model is not None:
            self.attach(model)

    # ------------------------------------------------------------ plain loops

    def attach(self, model: nn.Module) -> None:
        """Look on; the model itself stays as it is.

        Raises:
            ValueError: the model quantizes nothing.
        """
        check_module(model, type(self).__name__)
        self.close()
        self._places = places(model)
        for place in self._places:
            self._handles.append(place.proxy.register_forward_hook(self._hook(place)))

    def close(self) -> None:
        """Stop looking on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> QuantizationLogger:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def _is_due(self) -> bool:
        return self.steps % self.every == 0

    def _hook(self, place: Place) -> Callable[..., None]:
        @torch.no_grad()
        def hook(proxy: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if (
                not self._is_due
                or torch.compiler.is_compiling()
                or not isinstance(output, QuantTensor)
            ):
                return
            x = place.before(args)
            share = None if x is None else _share_clipped(place.proxy, x, output, self.sample)
            if share is not None:
                self._clipped[place.name] = share

        return hook

    def step(self, step: int | None = None) -> dict[str, float] | None:
        """One training step is done.

        Args:
            step: its number, for the log; counted from 0 when None.

        Returns:
            What was logged; None where this step isn't.
        """
        due, number = self._is_due, self.steps if step is None else step
        self.steps += 1
        if not due:
            return None
        values = {f"{self.prefix}{k}": v for k, v in self.read().items()}
        self._write(values, number)
        self._clipped.clear()
        return values

    @torch.no_grad()
    def read(self) -> dict[str, float]:
        """The numbers as they are now."""
        values: dict[str, float] = {}
        for place in self._places:
            for key, value in _numbers(place.proxy).items():
                values[f"{place.name}/{key}"] = value
            if place.name in self._clipped:
                values[f"{place.name}/clipped"] = float(self._clipped[place.name])
        return values

    # ------------------------------------------------------------ Lightning

    state_key = "QuantizationLogger"

    def on_train_start(self, trainer: Any, module: nn.Module) -> None:
        """Lightning's: look on; records go to the trainer's logger where ``to`` is None and it has one."""
        self.attach(module)
        found = getattr(trainer, "logger", None)
        if self._write.__name__ == "append" and found is not None and hasattr(found, "log_metrics"):
            append, to_logger = self._write, _writer(found)

            def both(values: dict[str, float], step: int) -> None:
                append(values, step)
                to_logger(values, step)

            self._write = both

    def on_train_batch_end(
        self, trainer: Any, module: nn.Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's: a training step is done."""
        self.step(int(getattr(trainer, "global_step", self.steps)))

    def on_train_end(self, trainer: Any, module: nn.Module) -> None:
        """Lightning's: stop looking on."""
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Lightning's: the number of steps."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Lightning's."""
        self.steps = int(state["steps"])

    def __getattr__(self, name: str) -> Any:
        if name.startswith(_CALLBACK_PREFIXES):  # a trainer calls every hook that there is
            return _nothing
        raise AttributeError(f"QuantizationLogger has no attribute {name!r}")


def _nothing(*args: Any, **kwargs: Any) -> None:
    """A hook that isn't for us."""


def _share_clipped(proxy: Any, x: Tensor, q: Any, sample: int) -> Tensor | None:
    """The share of values beyond the grid, as a tensor, so that a GPU needn't be waited for."""
    grid = grid_of(q, bool(proxy.is_narrow_range))
    if grid is None or not grid.clips or x.shape != q.value.shape or not x.numel():
        return None
    scale, zero = q.scale.detach(), q.zero_point.detach()
    if x.numel() > sample:
        step = x.numel() / sample
        chosen = (torch.arange(sample, device=x.device, dtype=torch.float64) * step).long()
        at = torch.unravel_index(chosen, x.shape)
        x = x[at]
        scale, zero = (t if t.numel() == 1 else t.expand(q.value.shape)[at] for t in (scale, zero))
        scale, zero = (t.reshape(()) if t.numel() == 1 else t for t in (scale, zero))
    place = x / scale + zero
    beyond = (place < grid.low - grid.room[0]) | (place > grid.high + grid.room[1])
    share: Tensor = beyond.float().mean()
    return share


def _numbers(proxy: Any) -> dict[str, float]:
    """Scale, zero point and width of a quantizer, as far as it tells them without an input."""
    values: dict[str, float] = {}
    for what in ("scale", "zero_point", "bit_width"):
        try:
            found = getattr(proxy, what)() if hasattr(proxy, what) else None
        except RuntimeError:  # it follows each input
            continue
        if found is None or (what == "zero_point" and not bool(found.any())):
            continue
        found = found.detach()
        values[what] = float(found.float().mean())
        if found.numel() > 1:
            values[f"{what}_min"], values[f"{what}_max"] = float(found.min()), float(found.max())
    squares = [
        float(p.grad.double().square().sum())
        for n, p in proxy.named_parameters()
        if "scaling_impl" in n and p.grad is not None
    ]
    if squares:
        values["scale_gradient"] = sum(squares) ** 0.5
    return values


def _writer(to: Any) -> Callable[[dict[str, float], int], Any]:
    """What writes a record to a log of any kind."""
    if isinstance(to, MutableSequence):

        def append(values: dict[str, float], step: int) -> None:
            to.append({"step": step, **values})

        return append
    if hasattr(to, "add_scalar"):

        def add(values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                to.add_scalar(name, value, step)

        return add
    if hasattr(to, "log_metrics"):
        return lambda values, step: to.log_metrics(values, step=step)
    if hasattr(to, "log"):
        return lambda values, step: to.log(values, step=step)
    if callable(to):
        return to  # type: ignore[no-any-return]
    raise TypeError(
        f"QuantizationLogger: to is a {type(to).__name__}; it may be a list, a SummaryWriter (add_scalar), a Lightning logger "
        "(log_metrics), an object with log(values, step=...) or a function of values and step"
    )
