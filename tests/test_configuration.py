import subprocess
import sys

import pytest

import qframework
from qframework.layers import QuantLinear


def test_settings_last_as_long_as_their_block() -> None:
    settings = qframework.settings
    before = repr(settings)
    with (
        pytest.raises(KeyError),
        settings.use(kernels="reference", recompute="never", verbose=True),
    ):
        assert (settings.kernels, settings.recompute, settings.verbose) == (
            "reference",
            "never",
            True,
        )
        with settings.use(kernels="fused"):
            assert (settings.kernels, settings.recompute) == ("fused", "never")
        assert settings.kernels == "reference"
        raise KeyError
    assert repr(settings) == before


def test_wrong_settings_are_refused_with_what_is_allowed() -> None:
    before = repr(qframework.settings)
    with pytest.raises(ValueError, match="kernels='fast'; allowed: 'auto', 'fused', 'reference'"):
        qframework.settings.kernels = "fast"
    with pytest.raises(ValueError, match="recompute=True; allowed: 'auto', 'always', 'never'"):
        qframework.settings.recompute = True
    with pytest.raises(TypeError, match="verbose=1 must be True or False"):
        qframework.settings.verbose = 1
    with pytest.raises(AttributeError, match=r"no setting 'kernel'.*'kernels', 'recompute'"):
        qframework.settings.kernel = "fused"
    use = qframework.settings.use(kernels="reference", cache=False)
    with pytest.raises(AttributeError, match="no setting 'cache'"), use:
        pass
    assert repr(qframework.settings) == before


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


@pytest.mark.parametrize("kernels", ["auto", "fused", "reference"])
def test_a_layer_that_is_printed_with_verbose_tells_how_its_quantizers_run(kernels) -> None:
    layer = QuantLinear(4, 4)
    with qframework.settings.use(kernels=kernels):
        path = layer.weight_quant.path()
        assert path not in repr(layer)
        with qframework.settings.use(verbose=True):
            assert path in repr(layer)
    assert {"auto": "quantize_by_absmax", "fused": "fused: quantize_by_absmax"}.get(
        kernels, "composed: settings.kernels is 'reference'"
    ) in path
