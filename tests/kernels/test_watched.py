"""What C++ tells of Python's objects: whether they are what they were, and no more."""

import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn

from qframework.core.base import CoreModule
from qframework.kernels import native, trust
from qframework.kernels.native.watched import can_watch, watch
from qframework.layers import QuantReLU

pytestmark = pytest.mark.skipif(not native.available(), reason="there is no C++ compiler")


class _Part(CoreModule):
    setting = 1

    def forward(self) -> int:
        return self.setting


@pytest.fixture
def part() -> _Part:
    return _Part()


def watched(part: _Part, entries: list = ()) -> object:
    kind = type(part)
    mine = [(vars(kind), "forward", kind.forward), (vars(kind), "setting", 1), *entries]
    lengths = [(vars(part), len(vars(part))), (part._modules, 0), ([1, 2], 2)]
    return watch(mine, lengths, [(part, kind)])


def test_all_is_what_it_was(part) -> None:
    assert can_watch()
    assert watched(part)()


def test_a_replaced_and_a_removed_method_are_seen(part, monkeypatch) -> None:
    holds = watched(part)
    monkeypatch.setattr(_Part, "forward", lambda self: 2)
    assert not holds()
    monkeypatch.undo()
    assert holds()
    monkeypatch.delattr(_Part, "forward")
    assert not holds()


def test_what_is_added_to_an_object_and_another_class_of_it_are_seen(part) -> None:
    holds = watched(part)
    part.more = 1
    assert not holds()
    del part.more
    assert holds()
    part.__class__ = type("Other", (_Part,), {})
    assert not holds()


def test_an_equal_object_in_the_place_of_one_is_left_to_python(part) -> None:
    number = 12345678901
    part.number = number
    holds = watched(part, [(vars(part), "number", number)])
    assert holds()
    part.number = int("12345678901")
    assert not holds()


def test_what_was_lengthened_or_replaced_before_is_seen_at_once(part) -> None:
    """Whatever is said counts, not what is there when it is said."""
    assert not watch([(vars(part), "training", False)], [(vars(part), 1)])()
    assert not watch([], [(vars(part), len(vars(part)) + 1)])()
    assert not watch([], [], [(part, nn.Module)])()


def test_containers_with_a_length_of_their_own_are_left_to_python(part) -> None:
    class Longer(OrderedDict):
        def __len__(self) -> int:
            return 7

    assert watch([], [(Longer(), 7)]) is None
    assert watch([], [((1, 2), 2)]) is None
    assert watch([(part, "training", True)], []) is None


def test_nothing_is_held_or_let_go_by_asking(part) -> None:
    holds = watched(part)
    kept = (part, vars(part), _Part, _Part.__dict__["forward"], _Part.__dict__["setting"])
    before = [sys.getrefcount(x) for x in kept]
    for _ in range(1000):
        holds()
    del vars(part)["training"]
    for _ in range(1000):
        assert not holds()
    part.training = True
    assert [sys.getrefcount(x) for x in kept] == before


def test_a_change_between_the_plan_and_the_library_is_seen(monkeypatch) -> None:
    """The plan is made before there is a library, which is asked from then on."""
    layer, x = QuantReLU().eval(), torch.randn(8, 8)
    with pytest.warns(UserWarning, match="has seen no data"):
        layer(x)
    proxy = layer.act_quant
    with monkeypatch.context() as early:
        early.setattr(trust, "can_watch", lambda: False)
        proxy._plan = None
        plan = proxy._planned()
    proxy.tensor_quant.int_quant.min_int = lambda bit_width: bit_width
    assert not plan.guards.hold()
