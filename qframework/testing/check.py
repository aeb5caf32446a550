"""How a check says, in one line, what failed and why."""

from __future__ import annotations

import functools
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qframework.quant_tensor import QuantTensor

SLOW = "slow: compiles code, which takes seconds; a check of qframework.testing"


def check(promise: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Make a method a check.

    An error in it fails the test by one line: what is checked, the promise that isn't kept, the error, and where it came from. Log records
    of compilers are left out.

    Args:
        promise: what every quantizer or layer has to do.
    """

    def decorate(function: Callable[[Any], None]) -> Callable[[Any], None]:
        @functools.wraps(function)
        def run(self: Any) -> None:
            failed = None
            try:
                with _without_logs():
                    function(self)
            except Exception as error:
                failed = f"{self.subject()}: {promise}. {reason(error)}"
            if failed is not None:  # outside of the handler, so that nothing is chained to it
                pytest.fail(failed, pytrace=False)

        return run

    return decorate


@contextmanager
def _without_logs() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def reason(error: BaseException) -> str:
    """An error in one line: the first line of its text, what notes add, and the place outside of the checks that raised it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if not isinstance(error, AssertionError):
        text = f"{type(error).__name__}: {text}"
    notes = getattr(error, "__notes__", ())
    text = "; ".join([text, *(str(n).splitlines()[0] for n in notes)])
    place = _place(error)
    return f"{text} ({place})" if place else text


def _place(error: BaseException) -> str:
    """The last line of a program that isn't torch's, pytest's or a check's."""
    ours = Path(__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.parent == ours or "torch" in path.parts or "_pytest" in path.parts:
            continue
        if path.is_file():
            return f"{path.name}:{frame.lineno}"
    return ""


def slow(function: Any) -> Any:
    """The mark ``slow``, which is registered where the project hasn't done so."""
    _register(SLOW)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
        try:
            return pytest.mark.slow(function)
        except pytest.fail.Exception:  # unknown, and markers are strict
            return function


def _register(marker: str) -> None:
    config = getattr(pytest.mark, "_config", None)  # None outside of a run of pytest
    if config is None:
        return
    name = marker.partition(":")[0]
    known = {line.partition(":")[0].partition("(")[0].strip() for line in config.getini("markers")}
    if name not in known:
        config.addinivalue_line("markers", marker)


def same(a: Tensor, b: Tensor) -> None:
    """Assert that two tensors are equal bit for bit."""
    assert a.shape == b.shape, f"shapes are {tuple(a.shape)} and {tuple(b.shape)}"
    assert torch.equal(a, b), f"values differ by up to {float((a - b).abs().max()):.3g}"


def close(a: Any, b: Any) -> None:
    """Assert that two results are equal, but for rounding."""
    a, b = plain(a), plain(b)
    assert a.shape == b.shape, f"shapes are {tuple(a.shape)} and {tuple(b.shape)}"
    fits = torch.isclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert bool(fits.all()), (
        f"{int((~fits).sum())} of {fits.numel()} values differ, by up to {float((a - b).abs().max()):.3g}"
    )


def plain(x: Any) -> Tensor:
    """The values of a result."""
    value: Tensor = x.value if isinstance(x, QuantTensor) else x
    return value


def refuses(build: Callable[[], object], given: str, named: str) -> None:
    """Assert that something is a TypeError whose text has a name."""
    try:
        build()
    except TypeError as error:
        assert named in str(error), f"the error for {given} doesn't name {named}: {error}"
    else:
        raise AssertionError(f"{given} is taken")
