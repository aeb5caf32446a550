"""A quantized model as a folder: weights packed to their bits, exact scales, and a recipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qframework.arguments import check_module
from qframework.export.bits import pack
from qframework.export.checkpoint_files import write_checkpoint
from qframework.export.codes import Codes, NoCodes, codes_of, weight_for
from qframework.export.declarations import NotData, encode, encode_names, encode_quantizer
from qframework.export.errors import CheckpointError
from qframework.export.evaluating import evaluating
from qframework.export.layer_arguments import arguments_of_layer, is_layer
from qframework.export.recipe import VERSION
from qframework.inject.names import is_ours
from qframework.proxy import QuantProxy, WeightQuantProxyFromInjector
from qframework.proxy.kept import computed_numbers, computed_slots, keeping

#: Narrower dtypes, tried in this order: powers of two fit in the first.
_NARROWER = (torch.float8_e8m0fnu, torch.bfloat16, torch.float16)


def save_quantized(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a quantized model: its weights packed to their bits, its scales exactly, and how to make its quantizers.

    The folder then has ``model.safetensors`` and ``recipe.json``; :func:`qframework.export.load_quantized` reads it. A weight
    whose quantizer learns something together with the float weight (weight normalization, affine statistics), or that
    something else reads as well, is written in floats. The model isn't changed.

    Args:
        model: with quantized layers; in any mode, saved as it evaluates.
        folder: made where it isn't there; a checkpoint in it is replaced.

    Raises:
        CheckpointError: nothing in the model is quantized, or it holds state that is no tensor, or tensors on the ``meta`` device.
        ImportError: safetensors isn't installed.
    """
    check_module(model, "save_quantized")
    with evaluating(model), torch.no_grad():
        tensors, recipe = _Written(model).result()
    write_checkpoint(folder, tensors, recipe)


class _Written:
    """What is written for a model.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)
        self.proxies = [m for m in self.names if isinstance(m, QuantProxy)]
        if not any(p.tensor_quant is not None for p in self.proxies):
            raise CheckpointError(
                f"save_quantized: nothing in this {type(model).__name__} is quantized; see quantize_model, or save its "
                "state_dict()"
            )
        self.tensors: dict[str, Tensor] = {}
        self.weights: dict[str, dict[str, Any]] = {}
        self.plain: dict[str, str] = {}
        self.widened: dict[str, str] = {}
        self.kept: dict[QuantProxy, dict[str, Tensor]] = {}

    def result(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors of the file, and the recipe without the digest."""
        self._pack_weights()
        self._write_plain()
        recipe = {
            "format": "qframework",
            "version": VERSION,
            "library": sys.modules["qframework"].__version__,
            "layers": self._layers(),
            "quantizers": [self._quantizer(p) for p in self.proxies],
            "weights": self.weights,
            "tensors": self.plain,
            "widened": self.widened,
        }
        return self.tensors, recipe

    # ------------------------------------------------------------ weights

    def _pack_weights(self) -> None:
        owners: dict[Tensor, list[nn.Module]] = {}
        for module in self.names:
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners.setdefault(parameter, []).append(module)
        for number, proxy in enumerate(self.proxies):
            if not isinstance(proxy, WeightQuantProxyFromInjector) or not proxy.is_quant_enabled:
                continue
            weights = self._weights_of(proxy, owners)
            found = None if weights is None else self._codes(proxy, list(weights.values()))
            if weights is None or found is None:
                continue
            self.kept[proxy], codes = found
            for (name, weight), one in zip(weights.items(), codes, strict=True):
                self._write_codes(name, number, weight, one)

    def _weights_of(
        self, proxy: QuantProxy, owners: Mapping[Tensor, list[nn.Module]]
    ) -> dict[str, Tensor] | None:
        """The weights of a quantizer by name; None where one of them is computed, or belongs to others too."""
        found: dict[str, Tensor] = {}
        for layer in proxy.tracked_module_list:
            weight = layer._parameters.get("weight")
            if weight is None or layer not in self.names or not weight.numel():
                return None
            if weight.is_meta or any(o is not layer for o in owners[weight]):
                return None
            found[f"{self.names[layer][0]}.weight".lstrip(".")] = weight
        return found

    def _codes(
        self, proxy: Any, weights: list[Tensor]
    ) -> tuple[dict[str, Tensor], list[Codes]] | None:
        """Numbers to keep and codes of the weights, where the quantizer makes the very same of what these stand for."""
        try:
            slots = computed_slots(proxy)
            before = [proxy(w) for w in weights]
            codes = [codes_of(q) for q in before]
            numbers = computed_numbers(proxy, slots, weights[0])
            with keeping(proxy, numbers):
                for weight, one, q in zip(weights, codes, before, strict=True):
                    again = proxy(weight_for(proxy, one, weight))
                    if not torch.equal(again.value, q.value):
                        return None
        except (NoCodes, LookupError, RuntimeError):
            return None
        return numbers, codes

    def _write_codes(self, name: str, number: int, weight: Tensor, codes: Codes) -> None:
        levels = None
        if codes.levels is not None:
            levels = f"{name}.levels"
            self._write(levels, codes.levels, narrow=True)
        self._write(f"{name}.codes", pack(codes.codes, codes.bits))
        self.weights[name] = {
            "quantizer": number,
            "shape": list(weight.shape),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "bits": codes.bits,
            "form": codes.form,
            "low": codes.low,
            "step": codes.step,
            "levels": levels,
        }

    # ------------------------------------------------------------ everything else

    def _write(self, name: str, tensor: Tensor, narrow: bool = False) -> str:
        """Put a tensor into the file.

        Args:
            name: in the file.
            tensor: its numbers.
            narrow: write it in a narrower dtype, if that loses nothing.
        """
        if tensor.is_meta:
            raise CheckpointError(f"save_quantized: {name} is on the meta device, without numbers")
        tensor = tensor.detach()
        for dtype in _NARROWER if narrow and tensor.dtype in (torch.float32, torch.float64) else ():
            less = tensor.to(dtype)
            if torch.equal(less.to(tensor.dtype), tensor):
                self.widened[name] = str(tensor.dtype).removeprefix("torch.")
                # files know powers of two by the bytes of their exponents
                tensor = less.view(torch.uint8) if dtype is torch.float8_e8m0fnu else less
                break
        # a file of tensors holds none that shares memory with another
        self.tensors[name] = tensor.contiguous().clone()
        return name

    def _write_plain(self) -> None:
        """Parameters and buffers outside of quantizers, each once."""
        inside = {m for p in self.proxies for m in p.modules()}
        seen: dict[Tensor, str] = {}
        for module, (prefix, *_) in self.names.items():
            if module in inside:
                continue
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                raise CheckpointError(
                    f"save_quantized: {prefix or 'the model'} ({type(module).__name__}) has extra state, which is no tensor"
                )
            saved = module._non_persistent_buffers_set
            held = {
                **module._parameters,
                **{n: b for n, b in module._buffers.items() if n not in saved},
            }
            for key, tensor in held.items():
                name = f"{prefix}.{key}".lstrip(".")
                if tensor is None or name in self.weights:
                    continue
                if tensor not in seen:
                    seen[tensor] = self._write(name, tensor)
                self.plain[name] = seen[tensor]

    def _layers(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for module, names in self.names.items():
            if is_layer(module):
                ours = is_ours(type(module).__module__)
                arguments = encode_names(arguments_of_layer(module)) if ours else {}
                entry = {"kind": type(module).__name__, "own": not ours, "arguments": arguments}
                found |= dict.fromkeys(names, entry)
        return found

    def _quantizer(self, proxy: QuantProxy) -> dict[str, Any]:
        names = self.names[proxy]
        kept = {
            slot: self._write(f"{names[0]}.{slot}", number, narrow=True)
            for slot, number in self.kept.get(proxy, {}).items()
        }
        state = {
            key: self._write(f"{names[0]}.{key}", tensor)
            for key, tensor in proxy.state_dict().items()
            if key.removeprefix("tensor_quant.").removesuffix(".kept") not in kept
        }
        overrides = {}
        for name, value in proxy.overrides.items():
            try:
                overrides[name] = encode(value)
            except NotData as what:
                raise CheckpointError(
                    f"save_quantized: {names[0]} was built with {proxy.prefix}{name}={what}, which is no data; bind it in a "
                    "quantizer class of your own, which is then given to load_quantized(own=...)"
                ) from None
        return {
            "places": names,
            "layers": [self.names[m][0] for m in proxy.tracked_module_list if m in self.names],
            "quantizer": encode_quantizer(proxy.quantizer),
            "overrides": overrides,
            "disabled": proxy.disable_quant,
            "kept": kept,
            "state": state,
        }
