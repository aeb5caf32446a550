import subprocess
import sys

import pytest
import torch

import qframework
from qframework.layers import QuantLinear


def test_settings_last_as_long_as_their_block() -> None:
    before = qframework.settings.kernels
    with pytest.raises(KeyError), qframework.settings.use(kernels="reference", cache=False):
        assert (qframework.settings.kernels, qframework.settings.cache) == ("reference", False)
        raise KeyError
    assert (qframework.settings.kernels, qframework.settings.cache) == (before, True)


def test_wrong_settings_are_refused_with_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="'fused', 'compiled', 'reference'"):
        qframework.settings.kernels = "fast"
    with pytest.raises(TypeError, match="True or False"):
        qframework.settings.cache = 1
    with pytest.raises(AttributeError, match="no setting 'kernel'"):
        qframework.settings.kernel = "fused"
    with pytest.raises(AttributeError), qframework.settings.use(kernels="reference", caches=True):
        pass
    assert "kernels=" in repr(qframework.settings)


def test_the_environment_sets_the_start() -> None:
    code = "import qframework; print(qframework.settings.kernels)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"QFRAMEWORK_KERNELS": "reference", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "reference"


def test_the_cache_can_be_switched_off() -> None:
    layer = QuantLinear(4, 4).eval()
    with torch.no_grad(), qframework.settings.use(cache=False):
        assert layer.quant_weight() is not layer.quant_weight()
    with torch.no_grad():
        assert layer.quant_weight() is layer.quant_weight()
