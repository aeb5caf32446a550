"""Layers that a checkpoint names, where a float model or a quantized one has what they were made from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import qframework.layers
from qframework.export.errors import CheckpointError
from qframework.export.layer_arguments import arguments_of_layer, is_layer, library_layer
from qframework.export.recipe import LayerRecipe
from qframework.graph.batch_norm_folding import FoldedBatchNorm
from qframework.graph.conversion import Conversion, NoQuantizedForm, arguments_of
from qframework.graph.forms import Forms
from qframework.graph.own_forward import with_own_forward
from qframework.graph.same_computation import SameComputation
from qframework.graph.taken_over import take_over

assert qframework.layers
#: Arguments that say nothing of the shape of a layer, so that a model may have others.
_FLAGS = frozenset({"return_quant_tensor"})


class Layers:
    """The layers of a model, replaced by those of a recipe.

    Args:
        model: whose modules are looked at; it isn't changed before :meth:`put`.
        own: classes of layers that aren't the library's, by name.
    """

    def __init__(self, model: nn.Module, own: Mapping[str, type[nn.Module]]) -> None:
        self.forms, self.own = Forms(model), own
        self.made: dict[nn.Module, nn.Module] = {}

    def check_others(self, root: nn.Module, names: Mapping[str, LayerRecipe]) -> None:
        """Refuse a model that quantizes what the recipe leaves alone.

        Raises:
            CheckpointError: names the layer.
        """
        for name, module in root.named_modules(remove_duplicate=False):
            if is_layer(module) and name not in names:
                raise CheckpointError(
                    f"{name or 'the model'} is a {type(module).__name__}, and in the checkpoint it isn't quantized; load into the "
                    "float model"
                )

    def put(
        self,
        root: nn.Module,
        name: str,
        entry: LayerRecipe,
        arguments: dict[str, Any],
        keywords: dict[str, Any],
    ) -> nn.Module:
        """Let the layer of a name be that of the recipe.

        Args:
            root: the model.
            name: of the layer.
            entry: what the recipe says of it.
            arguments: of its constructor.
            keywords: of its quantizer, where a layer has no other.

        Returns:
            The model: another one where the layer is all of it.

        Raises:
            CheckpointError: there is no such module, or one that the layer can't stand for.
        """
        try:
            present = root.get_submodule(name)
        except AttributeError:
            raise CheckpointError(
                f"the model has no module {name!r}, where the checkpoint has a {entry.kind}. A model whose functions were "
                "quantized has to be quantized in the same way before it is loaded"
            ) from None
        if present not in self.made:
            layer = self._layer(present, name, entry, arguments, keywords)
            self.made[present] = self.made[layer] = layer
        layer = self.made[present]
        if layer is present:
            return root
        if not name:
            return layer
        parent, _, child = name.rpartition(".")
        root.get_submodule(parent)._modules[child] = layer
        return root

    def _layer(
        self,
        present: nn.Module,
        name: str,
        entry: LayerRecipe,
        arguments: dict[str, Any],
        keywords: dict[str, Any],
    ) -> nn.Module:
        if type(present).__name__ == entry.kind and is_layer(present):
            self._check(name, entry, arguments, arguments_of_layer(present))
            for flag in _FLAGS & arguments.keys():
                setattr(present, flag, arguments[flag])
            return present
        where = f"{name or 'the model'}: the checkpoint has a {entry.kind} here, the model a {type(present).__name__}"
        if is_layer(present):
            raise CheckpointError(where)
        if entry.kind == "FoldedBatchNorm" and isinstance(present, nn.modules.batchnorm._BatchNorm):
            return self._folded(present, name, arguments)
        kind = self.own.get(entry.kind) if entry.own else library_layer(entry.kind)
        conversion = self.forms.conversion(present)
        own_forward = self.forms.own_forward(present)
        if own_forward is not None and entry.kind == f"Quant{type(present).__name__}":
            made = with_own_forward(present, {"weight_quant": None})
            made.train(present.training)
            return made
        if kind is None:
            hint = f"; load_quantized(..., own=[{entry.kind}]) makes it known" if entry.own else ""
            raise CheckpointError(f"{where}, and no layer of that name is known{hint}")
        try:
            if conversion is not None and conversion.layer is kind:
                return self._converted(present, name, entry, arguments, keywords, conversion)
            bare = not any(True for _ in present.parameters())
            if bare and (type(present) is nn.Identity or issubclass(kind, type(present))):
                made = self._built(kind, name, arguments, keywords)
                take_over(present, made, False)
                return made
        except NoQuantizedForm as why:
            raise CheckpointError(f"{where}: {why}") from None
        raise CheckpointError(f"{where}, which it can't stand for")

    def _folded(self, present: nn.Module, name: str, arguments: dict[str, Any]) -> nn.Module:
        made: Any = self._built(FoldedBatchNorm, name, arguments, {})
        if not all(present._modules.get(n) is not None for n in made.then):
            raise CheckpointError(f"{name}: the norm in the checkpoint goes on with {made.then}")
        made.train(present.training)
        for child, held in present._modules.items():
            made._modules[child] = held
        return made  # type: ignore[no-any-return]

    def _converted(
        self,
        present: nn.Module,
        name: str,
        entry: LayerRecipe,
        arguments: dict[str, Any],
        keywords: dict[str, Any],
        conversion: Conversion,
    ) -> nn.Module:
        form = self.forms.of(present)
        base = form.base if isinstance(form, SameComputation) else None
        if base is not None and isinstance(form, SameComputation) and form.weight is not None:
            raise NoQuantizedForm(
                "its weight is computed; quantize the model in the same way before it is loaded"
            )
        theirs = arguments_of(present, conversion.layer, conversion.special, base)
        device = {n: theirs.pop(n) for n in ("device", "dtype") if n in theirs}
        self._check(name, entry, arguments, theirs)
        made = self._built(conversion.layer, name, theirs | arguments | device, keywords)
        take_over(present, made, conversion.copies)
        return made

    def _built(
        self, kind: type[nn.Module], name: str, arguments: dict[str, Any], keywords: dict[str, Any]
    ) -> nn.Module:
        accepted = inspect.signature(kind.__init__).parameters
        given = {n: v for n, v in arguments.items() if n in accepted}
        try:
            with torch.random.fork_rng(devices=[]):
                return kind(**given, **{n: v for n, v in keywords.items() if n not in given})
        except Exception as error:  # whatever a constructor says of its arguments
            raise CheckpointError(f"{name or 'the model'}: {error}") from error

    def _check(
        self, name: str, entry: LayerRecipe, arguments: dict[str, Any], theirs: dict[str, Any]
    ) -> None:
        """Refuse a layer of another shape."""
        for argument in arguments.keys() & theirs.keys() - _FLAGS - {"bias"}:
            if arguments[argument] != theirs[argument]:
                raise CheckpointError(
                    f"{name or 'the model'} ({entry.kind}): {argument} is {arguments[argument]!r} in the checkpoint, "
                    f"{theirs[argument]!r} in the model"
                )
