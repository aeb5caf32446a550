"""The classifier of fixed weights."""

import copy

import pytest
import torch

from qframework.layers import HadamardClassifier, QuantIdentity, QuantReLU
from qframework.layers.hadamard import hadamard_matrix
from qframework.quant_tensor import IntQuantTensor
from qframework.quantizers import ShiftedUint8ActPerTensorFloat


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_rows_of_the_matrix_are_orthogonal(size) -> None:
    matrix = hadamard_matrix(size)
    assert torch.equal(matrix @ matrix.t(), size * torch.eye(size))
    assert set(matrix.unique().tolist()) <= {-1.0, 1.0}


@pytest.mark.parametrize(("inputs", "classes"), [(6, 5), (3, 9), (8, 8)])
def test_logits_are_those_of_the_formula(inputs, classes) -> None:
    torch.manual_seed(0)
    layer, x = HadamardClassifier(inputs, classes), torch.randn(4, inputs)
    expected = -(classes**-0.5) * (x / x.norm()) @ hadamard_matrix(16)[:classes, :inputs].t()
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert layer.proj.shape == (classes, inputs)


def test_only_the_scale_is_saved_and_learned() -> None:
    layer = HadamardClassifier(4, 3)
    layer(torch.randn(2, 4)).square().sum().backward()
    assert list(layer.state_dict()) == ["scale"] and layer.scale.grad != 0
    fixed = HadamardClassifier(4, 3, fixed_scale=True)
    assert not list(fixed.parameters()) and list(fixed.state_dict()) == ["scale"]
    fixed.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("act", [QuantIdentity, QuantReLU])
def test_a_quantized_result_holds_integers_of_its_width(act) -> None:
    torch.manual_seed(0)
    quant, x = act(return_quant_tensor=True), torch.randn(3, 6)
    layer = HadamardClassifier(6, 5, return_quant_tensor=True)
    out = layer(quant(x))
    assert isinstance(out, IntQuantTensor) and out.is_valid and out.signed
    assert torch.allclose(out.value, HadamardClassifier(6, 5)(quant(x)), atol=1e-6)
    extreme = torch.full((1, 6), 1e3)
    assert layer(quant(extreme)).is_valid


def test_what_cant_be_quantized_is_refused_with_a_way_out() -> None:
    layer = HadamardClassifier(4, 3, return_quant_tensor=True)
    with pytest.raises(RuntimeError, match="Feed the layer a quantized tensor"):
        layer(torch.randn(2, 4))
    shifted = QuantIdentity(ShiftedUint8ActPerTensorFloat, return_quant_tensor=True)
    with pytest.raises(RuntimeError, match="zero point"):
        layer(shifted(torch.randn(2, 4)))


def test_an_input_of_zeros_gives_zeros() -> None:
    assert torch.equal(HadamardClassifier(4, 3)(torch.zeros(2, 4)), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_it_keeps_dtypes(dtype) -> None:
    layer = HadamardClassifier(4, 3).to(dtype)
    out = layer(torch.ones(2, 4, dtype=dtype))
    assert out.dtype == dtype and bool(out.isfinite().all())
    assert torch.equal(copy.deepcopy(layer)(torch.ones(2, 4, dtype=dtype)), out)


def test_it_comes_to_life_from_the_meta_device() -> None:
    with torch.device("meta"):
        layer = HadamardClassifier(4, 3)
    layer = layer.to_empty(device="cpu")
    assert torch.equal(layer.proj, hadamard_matrix(4)[:3])


def test_it_compiles_in_one_graph() -> None:
    torch.manual_seed(0)
    layer = HadamardClassifier(6, 5, return_quant_tensor=True)
    model = torch.nn.Sequential(QuantIdentity(return_quant_tensor=True), layer)
    x = torch.randn(3, 6)
    model(x)
    model.eval()
    compiled = torch.compile(lambda x: model(x).value, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), model(x).value)
