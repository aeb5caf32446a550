"""Finished layers in a folder, so that work that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn


class ResumeError(ValueError, RuntimeError):
    """A folder that holds something else."""


class LayerStore:
    """Weights of finished layers, a file each, written at once or not at all.

    Args:
        folder: is made where it isn't there.
        identity: what the results depend on; a folder with another one is refused.

    Attributes:
        step: number of the step that layers are kept of.
        prefix: of the layers' names.

    Raises:
        ResumeError: the folder is that of other work.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / "identity.json"
        digest = hashlib.sha256(identity.encode()).hexdigest()
        if note.exists():
            found = json.loads(note.read_text())
            if found.get("digest") != digest:
                raise ResumeError(
                    f"ptq: {folder} holds the work of another recipe or model; give another folder, or empty it"
                )
        else:
            _write(note, json.dumps({"digest": digest}).encode())
        self.step = 0
        self.prefix = ""

    def _file(self, name: str) -> Path:
        full = (self.prefix + name).strip(".") or "model"
        return self.folder / f"{self.step:02d}-{full}.pt"

    def check(self, name: str, digest: str) -> None:
        """Note what a block held before; where something else is noted, the folder is that of other work.

        Raises:
            ResumeError: it is.
        """
        note = self.folder / f"{name}.json"
        if not note.exists():
            _write(note, json.dumps({"digest": digest}).encode())
        elif json.loads(note.read_text()).get("digest") != digest:
            raise ResumeError(
                f"ptq: {self.folder} holds the work of other weights of {name}; give another folder, or empty it"
            )

    def has(self, name: str) -> bool:
        """Whether a layer is kept."""
        return self._file(name).exists()

    def load(self, name: str, layer: nn.Module) -> dict[str, Any] | None:
        """Give a layer what was kept of it; what was noted with it, None where nothing was kept."""
        file = self._file(name)
        if not file.exists():
            return None
        kept = torch.load(file, map_location="cpu", weights_only=True)
        held: Any = layer
        with torch.no_grad():
            held.weight_quant.stop_following()
            held._parameters["weight"].copy_(kept["weight"])
        if kept["quantizer"]:
            held.weight_quant.load_state_dict(kept["quantizer"])
        held.weight_quant.stop_following()
        return dict(kept["note"])

    def save(self, name: str, layer: nn.Module, note: dict[str, Any]) -> None:
        """Keep a layer."""
        held: Any = layer
        kept = {
            "weight": held._parameters["weight"].detach().cpu(),
            "quantizer": {k: v.cpu() for k, v in held.weight_quant.state_dict().items()},
            "note": note,
        }
        file = self._file(name)
        part = file.with_suffix(".part")
        torch.save(kept, part)
        os.replace(part, file)


def _write(file: Path, contents: bytes) -> None:
    part = file.with_suffix(".part")
    part.write_bytes(contents)
    os.replace(part, file)


def fingerprint_of(model: nn.Module) -> str:
    """Digest of a model's names and numbers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if isinstance(tensor, torch.Tensor) and not tensor.is_meta and tensor.numel():
            wide = tensor.detach().to("cpu", torch.float64).flatten()
            place = torch.arange(1, wide.numel() + 1, dtype=torch.float64)
            digest.update(repr((float(wide.sum()), float((wide * place).sum()))).encode())
    return digest.hexdigest()
