"""The names of ``qframework.kernels.native.tensors``, looked up there when they are asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    return getattr(import_module("qframework.kernels.native.tensors"), name)
