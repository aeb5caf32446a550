"""The two files of a checkpoint: tensors, and the recipe that says what they are. Nothing in them is code."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import ModuleType
from typing import Any

from torch import Tensor

from qframework.export.errors import CheckpointError
from qframework.export.recipe import Recipe, checksum_of, read_recipe

TENSORS, RECIPE = "model.safetensors", "recipe.json"
#: Bytes of a recipe, beyond which it isn't read.
_LARGEST_RECIPE = 1 << 28


def safetensors_torch() -> ModuleType:
    """The package that reads and writes tensors.

    Raises:
        ImportError: it isn't installed; the message names the extra.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "checkpoints need the package safetensors: pip install 'qframework[export]'"
        ) from error
    return safetensors.torch


def write_checkpoint(
    folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], recipe: Mapping[str, Any]
) -> Recipe:
    """Write both files, each of them at once: a reader never finds half a file.

    Args:
        folder: made where it isn't there.
        tensors: by name.
        recipe: what the recipe says, without the digest of the tensors.
    """
    to_bytes: Any = safetensors_torch()
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    written = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    content: bytes = to_bytes.save(written)
    said = {**recipe, "sha256": hashlib.sha256(content).hexdigest()}
    made = Recipe.model_validate({**said, "checksum": checksum_of(said)})
    replace_file(place / TENSORS, lambda file: file.write(content))
    text = made.model_dump_json(indent=1).encode()
    replace_file(place / RECIPE, lambda file: file.write(text))
    return made


def replace_file(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file under another name, and give it its own when all of it is on the disk."""
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            file.close()
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(file.name, 0o666 & ~mask)
            os.replace(file.name, path)
        except BaseException:
            file.close()
            os.unlink(file.name)
            raise


def read_checkpoint(folder: str | os.PathLike[str]) -> tuple[Recipe, dict[str, Tensor]]:
    """Both files of a folder.

    Raises:
        FileNotFoundError: one of them isn't there.
        CheckpointError: one of them is broken, or they aren't of one checkpoint.
    """
    load: Any = safetensors_torch()
    place = Path(folder)
    for name in (RECIPE, TENSORS):
        if not (place / name).is_file():
            raise FileNotFoundError(f"{place}: no checkpoint, it has no {name}")
    if (place / RECIPE).stat().st_size > _LARGEST_RECIPE:
        raise CheckpointError(f"{place / RECIPE}: larger than {_LARGEST_RECIPE} bytes")
    try:
        recipe = read_recipe((place / RECIPE).read_bytes())
    except CheckpointError as error:
        raise CheckpointError(f"{place}: {error}") from None
    content = (place / TENSORS).read_bytes()
    if hashlib.sha256(content).hexdigest() != recipe.sha256:
        raise CheckpointError(
            f"{place / TENSORS}: not the file that the recipe was written for; it is truncated, changed, or of another "
            "checkpoint"
        )
    try:
        return recipe, load.load(content)
    except Exception as error:  # whatever the package raises for a broken file
        raise CheckpointError(f"{place / TENSORS}: {error}") from None
