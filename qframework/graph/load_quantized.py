"""From a folder that ``save_quantized`` wrote to a model with the same quantizers, and the same outputs bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import qframework.quantizers
from qframework.arguments import check_module
from qframework.core.snapshot import unchanged_on_error
from qframework.export.bits import unpack
from qframework.export.checkpoint_files import read_checkpoint
from qframework.export.codes import Codes, NoCodes, weight_for
from qframework.export.declarations import Find, decode_names, decode_quantizer
from qframework.export.errors import CheckpointError
from qframework.export.recipe import QuantizerRecipe, Recipe, WeightRecipe
from qframework.functional import compute_dtype
from qframework.graph.restored_layers import Layers
from qframework.inject.injector import InjectorType
from qframework.inject.names import is_ours
from qframework.inject.resolver import Resolver
from qframework.proxy import (
    ActQuantProxyFromInjector,
    BiasQuantProxyFromInjector,
    QuantProxy,
    TruncQuantProxyFromInjector,
    WeightQuantProxyFromInjector,
)
from qframework.proxy.kept import keep

M = TypeVar("M", bound=nn.Module)
_KINDS = (
    WeightQuantProxyFromInjector,
    BiasQuantProxyFromInjector,
    TruncQuantProxyFromInjector,
    ActQuantProxyFromInjector,
)


def load_quantized(folder: str | os.PathLike[str], model: M, *, own: Iterable[type] = ()) -> M:
    """Give a model the weights, quantizers and scales of a checkpoint; its outputs are those of the model that was saved.

    The model has the architecture of the one that was saved: floats or quantized layers, ``nn.Identity`` where a
    ``QuantIdentity`` or another layer without parameters was. It is changed in place, and stays in its mode; parameters that it has
    keep their identity. Scales that were computed from float weights are kept as they were;
    ``layer.weight_quant.init_tensor_quant()`` takes them anew. While it loads, a copy of the model's tensors is held.

    Args:
        folder: that :func:`qframework.export.save_quantized` wrote.
        model: that is given them.
        own: quantizer and layer classes of one's own, which the checkpoint names. Those that the model has are known.

    Returns:
        The model; the quantized layer where the model is itself a float layer.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        CheckpointError: it is broken, isn't to be trusted, or doesn't fit the model; a ValueError too. The model is as it was.
        ImportError: safetensors isn't installed.
    """
    check_module(model, "load_quantized")
    recipe, tensors = read_checkpoint(folder)
    with unchanged_on_error(model), torch.no_grad():
        try:
            return _Loading(recipe, tensors, model, own).result()  # type: ignore[return-value]
        except CheckpointError as error:
            raise CheckpointError(f"{os.fspath(folder)}: {error}") from error.__cause__
        except Exception as error:  # whatever the classes raise that the recipe names
            raise CheckpointError(f"{os.fspath(folder)}: {error}") from error


class _Loading:
    """One checkpoint that is loaded into one model.

    Args:
        recipe: what it says.
        tensors: what it holds.
        model: that is changed.
        own: classes that are known beside the library's.
    """

    def __init__(
        self, recipe: Recipe, tensors: dict[str, Tensor], model: nn.Module, own: Iterable[type]
    ) -> None:
        self.recipe, self.tensors, self.model = recipe, tensors, model
        self.used: set[str] = set()
        quantizers: dict[str, InjectorType] = {}
        layers: dict[str, type[nn.Module]] = {}
        for module in model.modules():
            if isinstance(module, QuantProxy) and not is_ours(module.quantizer.__module__):
                quantizers[module.quantizer.__name__] = module.quantizer
        for given in own:
            if isinstance(given, InjectorType):
                quantizers[given.__name__] = given
            elif isinstance(given, type) and issubclass(given, nn.Module):
                layers[given.__name__] = given
            else:
                raise TypeError(
                    f"load_quantized: own holds {given!r}; it takes quantizer classes and layer classes"
                )
        self.layers = Layers(model, layers)
        self.find: Find = lambda name: quantizers.get(name) or _known(name)

    def result(self) -> nn.Module:
        """The model, with all of the checkpoint in it."""
        self._put_layers()
        self._set_plain()
        waiting = {name: self._codes(name, entry) for name, entry in self.recipe.weights.items()}
        self._check_names()
        proxies = [self._quantizer(entry) for entry in self.recipe.quantizers]
        self._check_places(proxies)
        for name, codes in waiting.items():
            self._set_weight(name, codes, proxies)
        unused = self.tensors.keys() - self.used
        if unused:
            raise CheckpointError(f"nothing in the recipe names the tensor {min(unused)!r}")
        return self.model

    def _tensor(self, name: str) -> Tensor:
        """A tensor of the file, in its own dtype."""
        if name not in self.tensors:
            raise CheckpointError(f"the tensor {name!r} is missing")
        self.used.add(name)
        found = self.tensors[name]
        wide = self.recipe.widened.get(name)
        if wide is None:
            return found
        if found.dtype not in (torch.uint8, torch.bfloat16, torch.float16):
            raise CheckpointError(f"the tensor {name!r} is {_kind(found)}, not a narrower {wide}")
        if found.dtype is torch.uint8:
            found = found.view(torch.float8_e8m0fnu)
        return found.to(getattr(torch, wide))

    # ------------------------------------------------------------ layers

    def _put_layers(self) -> None:
        self.layers.check_others(self.model, self.recipe.layers)
        of_act = {p: q for q in self.recipe.quantizers for p in q.places}
        for name in sorted(self.recipe.layers, key=lambda n: n.count(".") + bool(n)):
            entry = self.recipe.layers[name]
            act = of_act.get(f"{name}.act_quant".lstrip("."))
            keywords = {} if act is None else decode_names(act.overrides, self.find)
            arguments = decode_names(entry.arguments, self.find)
            keywords = {n: v for n, v in keywords.items() if n in ("min_val", "max_val")}
            self.model = self.layers.put(self.model, name, entry, arguments, keywords)

    # ------------------------------------------------------------ tensors

    def _set_plain(self) -> None:
        """Parameters and buffers as they are in the file."""
        for name, place in self.recipe.tensors.items():
            self._set(name, self._tensor(place))

    def _set(self, name: str, value: Tensor) -> Tensor:
        """Write to a parameter or buffer; a parameter that the layer can have and lacks is made."""
        path, _, key = name.rpartition(".")
        module = self._module(path, name)
        held = module._parameters.get(key, module._buffers.get(key))
        if held is None:
            if module._parameters.get(key, self) is not None:
                raise CheckpointError(f"the model has no {name!r}")
            channels = getattr(module, "out_features", getattr(module, "out_channels", None))
            if value.shape != (channels,) or not value.is_floating_point():
                raise CheckpointError(f"{name}: {_kind(value)} for {channels} channels")
            module.register_parameter(key, nn.Parameter(value.clone()))
            return module._parameters[key]  # type: ignore[return-value]
        if held.shape != value.shape or held.dtype is not value.dtype:
            raise CheckpointError(
                f"{name}: {_kind(value)} in the checkpoint, {_kind(held)} in the model"
                + ("" if held.dtype is value.dtype else f"; call model.to({value.dtype}) first")
            )
        if held.is_meta:
            made = (
                nn.Parameter(value.clone(), held.requires_grad)
                if key in module._parameters
                else value.clone()
            )
            setattr(module, key, made)
            return made
        held.copy_(value)
        return held

    def _module(self, path: str, name: str) -> nn.Module:
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            raise CheckpointError(f"the model has no {name!r}") from None

    def _check_names(self) -> None:
        """All parameters and saved buffers of the model outside of quantizers have to be in the checkpoint."""
        known = self.recipe.tensors.keys() | self.recipe.weights.keys()
        proxies = (m for m in self.model.modules() if isinstance(m, QuantProxy))
        inside = {m for p in proxies for m in p.modules()}
        for prefix, module in self.model.named_modules():
            if module in inside:
                continue
            saved = [n for n in module._buffers if n not in module._non_persistent_buffers_set]
            for key in (*module._parameters, *saved):
                tensor = module._parameters.get(key, module._buffers.get(key))
                name = f"{prefix}.{key}".lstrip(".")
                if tensor is not None and name not in known:
                    raise CheckpointError(f"the checkpoint has no {name!r}, which the model has")

    def _codes(self, name: str, entry: WeightRecipe) -> Codes:
        """The codes of a weight; the model's own has to be of that shape."""
        path, _, key = name.rpartition(".")
        held = self._module(path, name)._parameters.get(key)
        shape, dtype = tuple(entry.shape), getattr(torch, entry.dtype)
        if held is None:
            raise CheckpointError(f"the model has no {name!r}")
        if held.shape != shape or held.dtype is not dtype:
            raise CheckpointError(
                f"{name}: {entry.dtype} of shape {shape} in the checkpoint, {_kind(held)} in the model"
            )
        packed = self._tensor(f"{name}.codes")
        codes = unpack(packed, entry.bits, held.numel()).reshape(shape)
        levels = None
        if (entry.form == "table") is not (entry.levels is not None):
            raise CheckpointError(f"{name}: a table needs levels, and only a table has some")
        if entry.levels is not None:
            levels = self._tensor(entry.levels)
            if (
                levels.dtype is not torch.float32
                or levels.dim() != 1
                or not bool(torch.isfinite(levels).all())
            ):
                raise CheckpointError(
                    f"{entry.levels}: levels are a row of finite float32, got {_kind(levels)}"
                )
            if codes.numel() and int(codes.max()) >= levels.numel():
                raise CheckpointError(f"{name}: a code beyond its {levels.numel()} levels")
        device = "cpu" if held.is_meta else held.device
        codes, levels = codes.to(device), None if levels is None else levels.to(device)
        # until its quantizer is there, which may look at the weight; any will do
        start = (codes if levels is None else levels[codes]).to(dtype)
        self._set(name, start)
        return Codes(entry.form, codes, entry.bits, entry.low, entry.step, levels)

    def _set_weight(self, name: str, codes: Codes, proxies: list[QuantProxy]) -> None:
        number = self.recipe.weights[name].quantizer
        if number >= len(proxies):
            raise CheckpointError(f"{name}: there is no quantizer {number}")
        path, _, key = name.rpartition(".")
        proxy, weight = proxies[number], self.model.get_submodule(path)._parameters[key]
        assert weight is not None
        training = [(m, m.training) for m in proxy.modules()]
        try:
            for module, _ in training:
                module.__dict__["training"] = False
            weight.copy_(weight_for(proxy, codes, weight))
        except NoCodes as why:
            raise CheckpointError(f"{name}: {why}") from None
        finally:
            for module, mode in training:
                module.__dict__["training"] = mode

    # ------------------------------------------------------------ quantizers

    def _quantizer(self, entry: QuantizerRecipe) -> QuantProxy:
        """Make a quantizer and put it into its places."""
        where = entry.places[0]
        present = self._proxy_at(where)
        quantizer = decode_quantizer(entry.quantizer, self.find)
        overrides = decode_names(entry.overrides, self.find)
        proxy_class = Resolver(quantizer, overrides, subject=where).read("proxy_class")
        kind = next(k for k in _KINDS if isinstance(present, k))
        if not (isinstance(proxy_class, type) and issubclass(proxy_class, kind)):
            raise CheckpointError(f"{where}: {quantizer.__name__} quantizes another kind of tensor")
        owners = [self._module(name, name) for name in entry.layers]
        provided = dict(present._provided)
        if "device" in provided:
            provided["device"] = self._device(owners[0], provided["device"])
        with torch.random.fork_rng(devices=[]):
            made: QuantProxy = proxy_class(
                owners[0], quantizer, overrides, present.attribute, present.prefix, provided
            )
            for owner in owners[1:]:
                made.add_tracked_module(owner)
        made.disable_quant = entry.disabled
        made.train(present.training)
        for place in entry.places:
            parent, _, key = place.rpartition(".")
            if not isinstance(self._proxy_at(place), kind):
                raise CheckpointError(
                    f"{place}: {quantizer.__name__} quantizes another kind of tensor"
                )
            setattr(self._module(parent, place), key, made)
        self._load_state(where, made, entry)
        for owner in owners[1:]:
            if hasattr(owner, "_beside_shared"):
                owner.own_activation = owner._beside_shared(made)  # type: ignore[operator]
        return made

    def _load_state(self, where: str, proxy: QuantProxy, entry: QuantizerRecipe) -> None:
        expected = proxy.state_dict()
        state = {}
        for key, name in entry.state.items():
            state[key] = value = self._tensor(name)
            mine = expected.get(key)
            if mine is not None and (mine.dtype is not value.dtype or mine.shape != value.shape):
                raise CheckpointError(
                    f"{where}.{key}: {_kind(value)} in the checkpoint, {_kind(mine)} by its quantizer"
                )
        replaced = {f"tensor_quant.{slot}." for slot in entry.kept}
        for key, mine in expected.items():
            if key.startswith(tuple(replaced)):
                state.setdefault(key, mine)
        if state or expected:
            proxy.load_state_dict(state, strict=True)
        numbers = {slot: self._tensor(name) for slot, name in entry.kept.items()}
        device = self._device(proxy.tracked_module_list[0], None)
        keep(proxy, {slot: t.to(device) for slot, t in numbers.items()})
        self._check_kept(where, proxy, numbers)

    def _check_kept(self, where: str, proxy: QuantProxy, numbers: Mapping[str, Tensor]) -> None:
        for slot, number in numbers.items():
            part: Any = getattr(proxy.tensor_quant, slot)
            allowed = part.why_refused("kept", number, {})
            right = compute_dtype(proxy.tracked_module_list[0].weight.dtype)  # type: ignore[arg-type, union-attr]
            if number.dtype is not right or allowed is not None:
                raise CheckpointError(
                    f"{where}.{slot}: {_kind(number)}; allowed: {allowed or right}"
                )

    def _proxy_at(self, name: str) -> QuantProxy:
        found = self._module(name, name)
        if not isinstance(found, QuantProxy):
            raise CheckpointError(
                f"{name} is a {type(found).__name__}, where the checkpoint has a quantizer"
            )
        return found

    def _check_places(self, proxies: list[QuantProxy]) -> None:
        """Every quantizer of the model has to be one of the checkpoint."""
        known = set(proxies)
        for name, module in self.model.named_modules():
            if isinstance(module, QuantProxy) and module not in known:
                raise CheckpointError(f"the checkpoint says nothing of the quantizer {name}")

    @staticmethod
    def _device(layer: nn.Module, otherwise: Any) -> Any:
        return next((p.device for p in layer.parameters(recurse=False)), otherwise)


def _known(name: str) -> InjectorType | None:
    """A quantizer of the library."""
    found = getattr(qframework.quantizers, name, None)
    return found if isinstance(found, InjectorType) and is_ours(found.__module__) else None


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
