"""What modules of the engine are made of."""

import copy
import pickle

import pytest
import torch
from torch import nn

from qframework.core.function_wrapper import RoundSte
from qframework.layers import QuantLinear

REGISTERING = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_state_dict_post_hook",
    "register_state_dict_pre_hook",
    "register_load_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
)


def test_every_attribute_of_a_module_is_there() -> None:
    module = RoundSte()
    for name, held in vars(nn.Module()).items():
        assert getattr(module, name) == held


def test_modules_without_hooks_hold_no_dictionaries_for_them() -> None:
    held = [n for m in QuantLinear(4, 4).weight_quant.modules() for n in vars(m) if "hook" in n]
    assert set(held) <= {"_is_full_backward_hook"}


@pytest.mark.parametrize("register", REGISTERING)
def test_a_hook_belongs_to_its_module_alone(register) -> None:
    first, second = QuantLinear(4, 4).weight_quant, QuantLinear(4, 4).weight_quant
    empty = pickle.dumps(second)
    handle = getattr(first, register)(lambda *a: None)
    assert pickle.dumps(second) == empty

    def hooks(module: nn.Module) -> int:
        names = [n for n in vars(nn.Module()) if n.endswith("hooks")]
        return sum(len(getattr(module, n)) for n in names)

    assert hooks(first) == hooks(second) + 1
    handle.remove()
    assert hooks(first) == hooks(second)


def test_hooks_run_and_are_copied() -> None:
    seen = []
    module = RoundSte()
    module.register_forward_hook(lambda *_: seen.append(1))
    module(torch.ones(2))
    copy.deepcopy(module)(torch.ones(2))
    RoundSte()(torch.ones(2))
    assert len(seen) == 2


def test_hooks_that_are_written_by_hand_are_refused_rather_than_shared() -> None:
    with pytest.raises(RuntimeError, match="register_forward_hook"):
        RoundSte()._forward_hooks[0] = print
    assert not RoundSte()._forward_hooks
