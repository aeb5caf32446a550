"""What type checkers and editors know of the keywords of layers."""

import typing

import pytest
from keywords_text import CLASSES, parts, policies, type_text

from qframework.layers import QuantConv2d, QuantLinear, QuantReLU, keywords


@pytest.mark.parametrize(("prefix", "name"), CLASSES.items())
def test_every_policy_and_part_has_a_keyword_of_its_type(prefix, name) -> None:
    wanted = {prefix + policy: type_text(a) for policy, a in policies().items()}
    wanted |= {prefix + part: "Part" for part in parts()}
    found = {k: a.__forward_arg__ for k, a in getattr(keywords, name).__annotations__.items()}
    assert found == wanted, "run python tests/layers/keywords_text.py and ruff format"


@pytest.mark.parametrize("layer", [QuantLinear, QuantConv2d, QuantReLU])
def test_layers_tell_their_keywords(layer) -> None:
    hints = typing.get_type_hints(layer.__init__)
    known = typing.get_args(hints["kwargs"])[0]
    prefix = "act_" if layer is QuantReLU else "weight_"
    assert f"{prefix}bit_width" in typing.get_type_hints(known)
