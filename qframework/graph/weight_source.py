"""Float weights of a model on the ``meta`` device, read when a part of it has its turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qframework.proxy import QuantProxy


class WeightSourceError(ValueError, RuntimeError):
    """Weights that aren't there, or aren't those of the model."""


class WeightSource:
    """Reads tensors by their names.

    Args:
        given: a mapping of names to tensors, a function from a name to its tensor, or the path of a ``.safetensors`` file, or of a
            folder with such files and an index ``*.safetensors.index.json``.

    Raises:
        WeightSourceError: there is no such file.
        TypeError: none of them.
    """

    def __init__(self, given: Any) -> None:
        self._read: Callable[[str], Tensor]
        self._tied: dict[Tensor, Tensor] = {}
        if isinstance(given, Mapping):
            self._read = given.__getitem__
        elif isinstance(given, (str, Path)):
            self._read = _of_files(Path(given))
        elif callable(given):
            self._read = given
        else:
            raise TypeError(
                "weights must be a state dict, a function from a name to its tensor, or a path of safetensors; got "
                f"{type(given).__name__}"
            )

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """One tensor, in the dtype of the model's.

        Args:
            name: in the model.
            like: the model's own.

        Raises:
            WeightSourceError: it isn't there, or has another shape.
        """
        try:
            found = self._read(name)
        except KeyError:
            raise WeightSourceError(f"weights: there is no {name!r}") from None
        if not isinstance(found, Tensor) or found.shape != like.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise WeightSourceError(
                f"weights: {name!r} is {shape}, the model's {tuple(like.shape)}"
            )
        return found.detach().to(like.dtype)

    def filled(self, name: str, names: Mapping[str, Tensor], is_parameter: bool) -> Tensor:
        """What a module holds in place of its tensor on the ``meta`` device; tied ones are filled once, and stay tied.

        Args:
            name: in the model.
            names: the model's tensors; a tied one has several names, under any of which it may be read.
            is_parameter: whether it is one.

        Raises:
            WeightSourceError: it isn't there, or has another shape.
        """
        like = names[name]
        made = self._tied.get(like)
        if made is not None:
            return made
        others = [n for n, t in names.items() if t is like and n != name]
        if others:
            name = next((n for n in (name, *others) if self.has(n)), name)
        found = self.tensor(name, like)
        if is_parameter:
            found = nn.Parameter(found, requires_grad=like.requires_grad)
        if others:
            self._tied[like] = found
        return found

    def has(self, name: str) -> bool:
        """Whether a tensor is there."""
        try:
            self._read(name)
        except KeyError:
            return False
        return True


def _of_files(path: Path) -> Callable[[str], Tensor]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(
            "weights: a path needs safetensors: pip install safetensors, or qframework[export]"
        ) from error
    if not path.exists():
        raise WeightSourceError(f"weights: there is no {path}")
    files: dict[str, Path] = {}
    if path.is_dir():
        for index in sorted(path.glob("*.safetensors.index.json")):
            listed = json.loads(index.read_text())["weight_map"]
            files |= {name: path / file for name, file in listed.items()}
        if not files:
            for file in sorted(path.glob("*.safetensors")):
                with safe_open(file, "pt") as opened:
                    files |= dict.fromkeys(opened.keys(), file)
    else:
        with safe_open(path, "pt") as opened:
            files = dict.fromkeys(opened.keys(), path)
    if not files:
        raise WeightSourceError(f"weights: {path} holds no .safetensors file")

    def read(name: str) -> Tensor:
        with safe_open(files[name], "pt") as opened:
            return opened.get_tensor(name)  # type: ignore[no-any-return]

    return read


@torch.no_grad()
def fill(
    module: nn.Module,
    prefix: str,
    names: Mapping[str, Tensor],
    source: WeightSource,
    recurse: bool = True,
) -> None:
    """Give a part of a model its weights.

    Args:
        module: the part.
        prefix: its name in the model, with a dot behind, or ``""``.
        names: the model's tensors on the ``meta`` device.
        source: of the weights.
        recurse: the modules below it as well.
    """
    owners = module.named_modules() if recurse else [("", module)]
    for name, owner in owners:
        start = f"{prefix}{name}." if name else prefix
        for key, value in [*owner._parameters.items(), *owner._buffers.items()]:
            full = start + key
            if value is None or not value.is_meta or full not in names:
                continue
            setattr(owner, key, source.filled(full, names, isinstance(value, nn.Parameter)))
    for proxy in module.modules() if recurse else ():
        if not isinstance(proxy, QuantProxy):
            continue
        made = proxy.tensor_quant
        if isinstance(made, nn.Module) and any(t.is_meta for t in _tensors(made)):
            weights = [t for m in proxy.tracked_module_list for t in m._parameters.values()]
            proxy.build_on(next((t.device for t in weights if t is not None), "cpu"))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
