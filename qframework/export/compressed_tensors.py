"""Checkpoints of language models in the layout of compressed-tensors, which vLLM and transformers read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qframework.arguments import check_module
from qframework.export.checkpoint_files import TENSORS, replace_file, safetensors_torch
from qframework.export.compressed_inputs import compress_input
from qframework.export.compressed_weights import CompressedWeight, Unsupported, compress_weight
from qframework.export.errors import CheckpointError
from qframework.export.evaluating import evaluating
from qframework.proxy import QuantProxy
from qframework.quant_tensor import QuantTensor

CONFIG = "config.json"


def export_compressed_tensors(model: nn.Module, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Write a model whose linear layers have quantized weights, as compressed-tensors has it.

    The folder then has ``model.safetensors``, with the names of modules that the model has, and ``config.json`` with
    ``quantization_config``: of ``model.config``, if there is one, and of a ``config.json`` that is there already the other entries stay.

    Weights, inputs, and the layout that they get:

    - integers of 2 to 8 bits, for the tensor, channels or groups, with zero points or without; inputs in float, or integers: ``pack-quantized``
    - 8-bit integers for the tensor or channels; inputs of 8-bit integers, static or dynamic: ``int-quantized``
    - FP8 E4M3 for the tensor or channels; inputs in float, or FP8: ``float-quantized``
    - MXFP4; inputs in float, or MXFP4: ``mxfp4-pack-quantized``
    - NVFP4; inputs in float: ``nvfp4-pack-quantized``

    Linear layers without a quantizer go to ``ignore``. Several layouts in one model are ``mixed-precision``.

    Args:
        model: with quantized layers; in any mode, written as it evaluates. It isn't changed.
        folder: made where it isn't there.

    Returns:
        The ``quantization_config``.

    Raises:
        CheckpointError: something is quantized that has no place in such a file; all of it is named, with what would do.
        ImportError: safetensors isn't installed.
    """
    check_module(model, "export_compressed_tensors")
    to_bytes: Any = safetensors_torch()
    with evaluating(model), torch.no_grad():
        written = _Written(model)
        written.check()
        config = written.config()
        tensors = {n: t.detach().cpu().contiguous() for n, t in written.tensors.items()}
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    whole = {**_config_of(model), **_config_in(place), "quantization_config": config}
    content = to_bytes.save(tensors, metadata={"format": "pt"})
    text = (json.dumps(whole, indent=2) + "\n").encode()
    replace_file(place / TENSORS, lambda file: file.write(content))
    replace_file(place / CONFIG, lambda file: file.write(text))
    return config


class _Written:
    """What is written for a model.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.layers: dict[str, tuple[CompressedWeight, dict[str, Any] | None]] = {}
        self.ignored: list[str] = []
        self.obstacles: list[str] = []
        self._seen: set[Tensor] = set()
        inside = {m for p in model.modules() if isinstance(p, QuantProxy) for m in p.modules()}
        for name, module in model.named_modules():
            if module not in inside:
                self._write_module(name, module)

    def check(self) -> None:
        """Refuse a model with obstacles, or with nothing to compress."""
        if not self.layers and not self.obstacles:
            self.obstacles = ["no linear layer has a quantized weight"]
        if self.obstacles:
            shown = "; ".join(self.obstacles[:8])
            more = f"; and {len(self.obstacles) - 8} more" if len(self.obstacles) > 8 else ""
            raise CheckpointError(f"export_compressed_tensors: {shown}{more}")

    def _write_module(self, name: str, module: nn.Module) -> None:
        proxies = {
            n: m
            for n, m in module.named_children()
            if isinstance(m, QuantProxy) and m.is_quant_enabled
        }
        weight = proxies.pop("weight_quant", None)
        if weight is not None:
            try:
                self._write_linear(name, module, proxies.pop("input_quant", None))
            except (Unsupported, RuntimeError) as why:
                self.obstacles.append(f"{name or 'the model'}.weight_quant: {why}")
        elif isinstance(module, nn.Linear):
            self.ignored.append(name)
        for other in proxies:
            self.obstacles.append(
                f"{name or 'the model'}.{other}: only weights and inputs of linear layers have a place; {other}=None leaves it float"
            )
        compressed = weight is not None
        saved = [n for n in module._buffers if n not in module._non_persistent_buffers_set]
        for key in (*module._parameters, *saved):
            tensor = module._parameters.get(key, module._buffers.get(key))
            if tensor is None or tensor in self._seen or (compressed and key == "weight"):
                continue
            self._seen.add(tensor)  # one that is tied is written once
            self._put(f"{name}.{key}".lstrip("."), tensor)

    def _write_linear(self, name: str, module: Any, input_quant: QuantProxy | None) -> None:
        if not isinstance(module, nn.Linear):
            raise Unsupported(
                f"a {type(module).__name__} has no layout; weight_quant=None leaves it float"
            )
        layer: Any = module
        q = layer.quant_weight()
        if not isinstance(q, QuantTensor):
            raise Unsupported("its weight isn't quantized")
        given = None if input_quant is None else compress_input(input_quant, module.in_features)
        is_int8 = (
            given is not None
            and given.arguments["type"] == "int"
            and given.arguments["num_bits"] == 8
        )
        made = compress_weight(q, is_int8)
        if given is not None and given.arguments["type"] != made.arguments["type"]:
            raise Unsupported(
                "integers and floats for weight and input of one layer; use one kind for both"
            )
        if given is not None and made.format == "nvfp4-pack-quantized":
            raise Unsupported("a quantized input beside NVFP4; use input_quant=None")
        self.layers[name] = (made, None if given is None else given.arguments)
        tensors = made.tensors | ({} if given is None else given.tensors)
        for key, tensor in tensors.items():
            self._put(f"{name}.{key}".lstrip("."), tensor)

    def _put(self, name: str, tensor: Tensor) -> None:
        if tensor.is_meta:
            raise CheckpointError(
                f"export_compressed_tensors: {name} is on the meta device, without numbers"
            )
        self.tensors[name] = tensor.detach().contiguous().clone()

    def config(self) -> dict[str, Any]:
        """``quantization_config``."""
        groups: list[tuple[dict[str, Any], list[str]]] = []
        for name, (weight, given) in self.layers.items():
            scheme = {
                "weights": {**_ARGUMENTS, **weight.arguments},
                "input_activations": None if given is None else {**_ARGUMENTS, **given},
                "output_activations": None,
                "format": weight.format,
            }
            for known, names in groups:
                if known == scheme:
                    names.append(name)
                    break
            else:
                groups.append((scheme, [name]))
        formats = {scheme["format"] for scheme, _ in groups}
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "config_groups": {
                f"group_{i}": {"targets": ["Linear"] if len(groups) == 1 else names, **scheme}
                for i, (scheme, names) in enumerate(groups)
            },
            "ignore": self.ignored,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


#: What a scheme says of a tensor unless it says otherwise.
_ARGUMENTS: dict[str, Any] = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "tensor",
    "group_size": None,
    "dynamic": False,
}


def _config_of(model: Any) -> dict[str, Any]:
    """The configuration that a model of transformers has."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    found = to_dict() if callable(to_dict) else {}
    return found if isinstance(found, dict) else {}


def _config_in(place: Path) -> dict[str, Any]:
    """What a folder's own configuration says."""
    if not (place / CONFIG).is_file():
        return {}
    try:
        found = json.loads((place / CONFIG).read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{place / CONFIG} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{place / CONFIG} holds a {type(found).__name__}, not an object")
    return found
