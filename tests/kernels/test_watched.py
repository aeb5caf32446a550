"""What C++ is asked of Python's objects."""

import gc
import sys
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch

from qframework.kernels import guards, native
from qframework.kernels.native.watched import can_watch, watch
from qframework.layers import QuantReLU


class Thing:
    """With an attribute of its own, and one of its class."""

    of_class = 1

    def __init__(self) -> None:
        self.own = object()


@pytest.fixture(autouse=True)
def _loaded() -> None:
    if not native.available() or not can_watch():
        pytest.skip("there is no compiler, or no symbols of Python")


def watched(thing: Thing, held: Any) -> Any:
    kind = type(thing)
    entries = [(vars(thing), "own", thing.own), (vars(kind), "of_class", kind.of_class)]
    return watch(entries, [(held, len(held)), (vars(kind), len(vars(kind)))], [(thing, kind, vars(thing))])  # fmt: skip


CHANGES = {
    "an attribute": lambda thing, held: setattr(thing, "own", object()),
    "none": lambda thing, held: delattr(thing, "own"),
    "an attribute of the class": lambda thing, held: setattr(type(thing), "of_class", 2),
    "none of the class": lambda thing, held: delattr(type(thing), "of_class"),
    "a method": lambda thing, held: setattr(type(thing), "method", lambda self: None),
    "a class": lambda thing, held: setattr(thing, "__class__", type("Other", (Thing,), {})),
    "a dictionary": lambda thing, held: setattr(thing, "__dict__", dict(vars(thing))),
    "a length": lambda thing, held: held.clear(),
}


@pytest.mark.parametrize("held", [{"a": 1}, [1], OrderedDict(a=1)], ids=lambda h: type(h).__name__)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_each_change_is_seen_at_once(change, held) -> None:
    class Own(Thing):
        of_class = 1

    thing, held = Own(), held.copy()
    asks = watched(thing, held)
    assert asks() and asks()
    change(thing, held)
    assert not asks() and not asks()
    assert sys.exc_info() == (None, None, None)


def test_objects_are_held_as_often_as_before() -> None:
    thing, held = Thing(), [1]
    asks = watched(thing, held)
    objects = (thing, vars(thing), thing.own, Thing, held)
    before = [sys.getrefcount(o) for o in objects]
    for _ in range(100):
        asks()
    thing.own, before[2] = 3, before[2] - 1
    for _ in range(100):
        asks()
    after = [sys.getrefcount(o) for o in objects]
    assert after == before


def test_what_watches_goes_with_what_is_watched() -> None:
    thing = Thing()
    thing.asks = watched(thing, [1])  # type: ignore[attr-defined]
    gone = weakref.ref(thing)
    del thing
    gc.collect()
    assert gone() is None


class _Counted(dict[Any, Any]):
    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize("held", [_Counted(), (1,), {1}, "text"])
def test_other_containers_are_left_to_python(held) -> None:
    assert watch([], [(held, 1)]) is None


def test_an_equal_object_in_the_place_of_one_is_left_to_python() -> None:
    thing = Thing()
    thing.own = 12345678901
    asks = watched(thing, [1])
    assert asks()
    thing.own = int("12345678901")
    assert not asks()


def test_what_is_said_counts_and_not_what_is_there_when_it_is_said() -> None:
    thing = Thing()
    own, kind = vars(thing), type(thing)
    assert not watch([(own, "own", 1)], [])()
    assert not watch([], [(own, len(own) + 1)])()
    assert not watch([], [], [(thing, object, own)])()
    assert not watch([], [], [(thing, kind, {})])()


def test_a_change_between_the_plan_and_the_library_is_seen(monkeypatch) -> None:
    """The plan is made before there is a library, which is asked from then on."""
    layer = QuantReLU().eval()
    proxy = layer.act_quant
    with monkeypatch.context() as early, torch.no_grad():
        early.setattr(guards, "can_watch", lambda: False)
        plan = proxy._planned()
        assert plan.guards.hold()
    proxy.tensor_quant.int_quant.min_int = lambda bit_width: bit_width
    assert not plan.guards.hold()
