"""What a checkpoint says beside its tensors: which layers quantize what, by which quantizers, and how weights are packed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from qframework.export.errors import CheckpointError

#: Raised when a recipe of before can't be read as one of now.
VERSION = 1


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class LayerRecipe(_Data):
    """A quantized layer.

    Attributes:
        kind: name of its class.
        own: whether the class is one of a program, not of the library.
        arguments: of its constructor, as far as they are numbers, flags and words.
    """

    kind: str
    own: bool
    arguments: dict[str, JsonValue]


class QuantizerRecipe(_Data):
    """A quantizer, in all the places where it stands.

    Attributes:
        places: names of the modules, ``layer.weight_quant``.
        layers: names of the layers that share it, in their order.
        quantizer: the class, as data.
        overrides: keywords that it was built with, as data.
        disabled: whether it is switched off.
        kept: its parts whose number is kept: ``{"scaling_impl": name of the tensor}``.
        state: its entries: ``{"tensor_quant.scaling_impl.value": name of the tensor}``.
    """

    places: Annotated[list[str], Field(min_length=1)]
    layers: Annotated[list[str], Field(min_length=1)]
    quantizer: dict[str, JsonValue]
    overrides: dict[str, JsonValue]
    disabled: bool
    kept: dict[str, str]
    state: dict[str, str]


class WeightRecipe(_Data):
    """A weight whose tensor in the file holds packed codes.

    Attributes:
        quantizer: number of the quantizer that makes the codes of it.
        shape: of the weight.
        dtype: of the weight.
        bits: of a code.
        form: ``integer``: a code stands for the integer ``low + step * code``; ``table``: for an entry of ``levels``.
        low: see ``form``.
        step: see ``form``.
        levels: name of the tensor of levels, in units of the scale; None for integers.
    """

    quantizer: Annotated[int, Field(ge=0)]
    shape: list[Annotated[int, Field(ge=0)]]
    dtype: Literal["float16", "bfloat16", "float32", "float64"]
    bits: Annotated[int, Field(ge=1, le=32)]
    form: Literal["integer", "table"]
    low: Annotated[int, Field(ge=-(1 << 32), le=1 << 32)]
    step: Annotated[int, Field(ge=1, le=2)]
    levels: str | None


class Recipe(_Data):
    """A quantized model without its numbers.

    Attributes:
        format: that of this library.
        version: of the recipe.
        library: version of the library that wrote it.
        sha256: of the file of tensors.
        checksum: of everything else that the recipe says, see :func:`checksum_of`.
        layers: by their names in the model.
        quantizers: all of the model.
        weights: packed ones, by their names in the model.
        tensors: parameters and buffers that are in the file as they are: from names in the model to names in the file.
        widened: tensors that are in the file in a narrower dtype, without loss: from names in the file to their own dtype.
    """

    format: Literal["qframework"]
    version: Literal[1]
    library: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    checksum: str
    layers: dict[str, LayerRecipe]
    quantizers: list[QuantizerRecipe]
    weights: dict[str, WeightRecipe]
    tensors: dict[str, str]
    widened: dict[str, Literal["float32", "float64"]]


def checksum_of(data: Mapping[str, Any]) -> str:
    """SHA-256 of a recipe as data, in one way of writing it, without its own checksum."""
    rest = {name: value for name, value in data.items() if name != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_recipe(text: bytes) -> Recipe:
    """A recipe from JSON.

    Raises:
        CheckpointError: it is none, or one of another version.
    """
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the recipe is no JSON: {error}") from None
    if not isinstance(data, dict) or data.get("format") != "qframework":
        raise CheckpointError("the recipe isn't one of qframework")
    if data.get("version") != VERSION or type(data.get("version")) is not int:
        raise CheckpointError(
            f"the recipe has version {str(data.get('version'))[:20]!r}; this release reads version {VERSION}"
        )
    if data.get("checksum") != checksum_of(data):
        raise CheckpointError("the recipe was changed after it was written")
    try:
        return Recipe.model_validate(data)
    except (ValidationError, RecursionError) as error:
        problems = error.errors() if isinstance(error, ValidationError) else []
        first = problems[0] if problems else {"loc": (), "msg": "nested too deeply"}
        where = ".".join(str(part)[:40] for part in first["loc"])
        raise CheckpointError(
            f"the recipe is wrong at {where or 'its top'}: {first['msg']}"
        ) from None
