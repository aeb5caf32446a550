"""Numbers of channels: the same ones have one root, and what is told of one counts for all."""

import pytest

from qframework.graph.channel_numbers import ChannelNumbers


def test_joined_channels_share_a_root_and_the_first_reason() -> None:
    numbers = ChannelNumbers()
    a, b, c = numbers.new(2), numbers.new(2), numbers.new(2)
    numbers.block([c[0]], "first")
    numbers.block([c[0]], "second")
    numbers.join(a, b)
    numbers.join(b, c)
    assert numbers.root(a[0]) == numbers.root(c[0]) != numbers.root(a[1])
    assert numbers.reasons() == {numbers.root(a[0]): "first"}


def test_the_tightest_bound_holds() -> None:
    numbers = ChannelNumbers()
    (i,) = numbers.new(1)
    for factor in (3.0, 2.0, 5.0):
        numbers.bound(i, factor)
    assert numbers.most == {i: 2.0}


def test_sides_of_unlike_length_are_not_joined() -> None:
    numbers = ChannelNumbers()
    with pytest.raises(ValueError, match=r"longer|shorter"):
        numbers.join(numbers.new(1), numbers.new(2))
