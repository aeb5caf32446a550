"""Each module of quantizers/ lists its own names; the package offers all of them, and nothing else."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from types import ModuleType

import pytest

from qframework import quantizers
from qframework.inject.injector import InjectorType

#: Offers under one name what others list.
GATHERING = {"solver"}
MODULES = [
    importlib.import_module(f"{quantizers.__name__}.{found.name}")
    for found in pkgutil.iter_modules(quantizers.__path__)
    if found.name not in GATHERING
]
#: What modules of the package share without offering it.
SHARED = {"Groups", "ParameterQuantSolver", "PerChannel", "PerChannel2d", "PerTensor"}


def of(module: ModuleType) -> set[str]:
    """The public classes that a module defines."""
    return {
        name
        for name, found in vars(module).items()
        if isinstance(found, type)
        and found.__module__ == module.__name__
        and not name.startswith("_")
    }


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rpartition(".")[2])
def test_a_module_lists_all_its_public_classes_in_order(module) -> None:
    assert set(module.__all__) == of(module) - SHARED
    assert module.__all__ == sorted(module.__all__)
    assert all(isinstance(getattr(module, name), InjectorType) for name in module.__all__)


def test_no_name_is_listed_twice() -> None:
    listed = Counter(name for module in MODULES for name in module.__all__)
    assert [name for name, count in listed.items() if count > 1] == []
    assert len(quantizers.__all__) == len(set(quantizers.__all__))


def test_the_package_offers_what_its_modules_list() -> None:
    union = {name for module in MODULES for name in module.__all__}
    assert set(quantizers.__all__) == union
    submodules = {module.__name__.rpartition(".")[2] for module in MODULES}
    assert {n for n in dir(quantizers) if not n.startswith("_")} == union | submodules | GATHERING


def test_a_star_import_gives_these_names() -> None:
    space: dict[str, object] = {}
    exec("from qframework.quantizers import *", space)
    assert space.keys() - {"__builtins__"} == set(quantizers.__all__)


def test_what_is_shared_exists_once() -> None:
    assert sorted(n for module in MODULES for n in of(module) & SHARED) == sorted(SHARED)
