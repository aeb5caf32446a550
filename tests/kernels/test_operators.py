"""Compiled graphs on CPUs quantize to minifloats by operators that call the C++ functions, with the bits of eager mode."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import qframework
from qframework import quantizers as q
from qframework.functional import (
    MinifloatFormat,
    MinifloatGrid,
    ScaleRule,
    minifloat_quantize,
    quantize_by_absmax,
)
from qframework.graph import calibration_mode
from qframework.kernels import native, operators
from qframework.layers import QuantLinear

E4M3 = MinifloatGrid(MinifloatFormat(3, 7, 448.0))
E5M2 = MinifloatGrid(MinifloatFormat(2, 15, 57344.0, True, torch.inf), "round", False)
E4M3FN = MinifloatGrid(MinifloatFormat(3, 7, 448.0, True, torch.nan))
GRIDS = {"saturating": E4M3, "infinite": E5M2, "nan": E4M3FN}
WHOLE = ScaleRule("absmax", 448.0, minimum=1e-10)
OF_CHANNELS = ScaleRule("absmax", 448.0, minimum=1e-10, shape=(24, 1), channel_axis=0)
OF_ROWS = ScaleRule("absmax", 448.0, "power_of_two", "floor", reduced_axis=-1)
RULES = {"tensor": WHOLE, "channels": OF_CHANNELS, "rows": OF_ROWS}
needs_compiler = pytest.mark.skipif(not native.available(), reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def auto() -> Iterator[None]:
    torch.compiler.reset()
    with qframework.settings.use(kernels="auto"):
        yield


# ------------------------------------------------------------ operators by themselves


def layouts(*shape: int) -> dict[str, Tensor]:
    """Tensors of the same numbers, laid out in ways of which the C++ functions take some."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    return {
        "plain": x,
        "turned": x.t().contiguous().t(),
        "spread": torch.stack((x, x), -1)[..., 0],
        "small": x[:, :8],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_said_of_results_is_so_and_gradients_are_written_in_place(rule, dtype) -> None:
    how = RULES[rule]
    checks = ("test_schema", "test_faketensor")
    for x in (t.to(dtype) for t in layouts(24, 64).values()):
        words = (operators.numbers_of(E4M3), "round", *operators.words_of(how))
        torch.library.opcheck(torch.ops.qframework.absmax, (x, *words), test_utils=checks)
        made, scale, top = torch.ops.qframework.absmax(x, *words)
        g, of_scale = torch.randn_like(made), torch.randn_like(scale)
        given = (g.clone(), of_scale, x, scale, top, *words)
        torch.library.opcheck(torch.ops.qframework.absmax_gradient_, given, test_utils=checks)
        leaf = x.clone().requires_grad_()
        torch.autograd.backward(quantize_by_absmax(leaf, E4M3, how), (g, of_scale))
        torch.ops.qframework.absmax_gradient_(*given)
        tolerance = 1e-6 if x.element_size() >= 4 else 1e-2  # C++ sums in another order
        torch.testing.assert_close(given[0], leaf.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", [None, torch.tensor(0.01), torch.rand(24, 1)])
@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_said_of_minifloats_is_so(grid, scale) -> None:
    checks = ("test_schema", "test_faketensor")
    for x in layouts(24, 64).values():
        how = (operators.numbers_of(GRIDS[grid]), "round")
        for need_scale in (False, True):
            given = (torch.randn(24, x.shape[1]), x, scale, *how, need_scale)
            op = torch.ops.qframework.minifloat_gradients
            torch.library.opcheck(op, given, test_utils=checks)


# ------------------------------------------------------------ which graphs have them


def traced(function, *tensors: Tensor) -> list[str]:
    """The operators in what a compiler would be given."""
    found = []

    def note(graph: torch.fx.GraphModule, _: object) -> object:
        for part in graph.modules():
            nodes = part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ()
            names = (str(node.target) for node in nodes if node.op == "call_function")
            found.extend(n.split(".")[1] for n in names if n.startswith("qframework."))
        return graph.forward

    torch.compile(function, backend=note, fullgraph=True, dynamic=False)(*tensors)
    return found


def by_scale(x: Tensor, scale: Tensor) -> Tensor:
    return minifloat_quantize(x, scale, *E4M3)


def by_absmax(x: Tensor) -> Tensor:
    return quantize_by_absmax(x, E4M3, WHOLE)[0]


@needs_compiler
def test_graphs_on_cpus_have_operators() -> None:
    x = torch.randn(24, 64, requires_grad=True)
    scale = torch.tensor(0.1, requires_grad=True)
    assert traced(by_scale, x, scale) == ["minifloat_gradients"]
    assert traced(by_absmax, x) == ["absmax_gradient_"]
    large = torch.randn(1024, 1024, requires_grad=True)
    assert traced(by_absmax, large) == ["absmax", "absmax_gradient_"]


def test_without_a_compiler_and_for_few_elements_there_are_none(monkeypatch) -> None:
    x = torch.randn(24, 64, requires_grad=True)
    assert not traced(by_absmax, x[:1].detach())
    monkeypatch.setattr(native, "available", lambda: False)
    assert not traced(by_absmax, x)
    assert not traced(by_scale, x, torch.tensor(0.1))


@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_settings_leave_them_out(kernels) -> None:
    with qframework.settings.use(kernels=kernels):
        assert not traced(by_absmax, torch.randn(24, 64))


def test_exports_have_operators_of_torch_alone() -> None:
    layer = QuantLinear(64, 24, weight_quant=q.MXFloat8e4m3Weight)
    for strict in (False, True):
        program = torch.export.export(layer.eval(), (torch.randn(32, 64),), strict=strict)
        targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
        assert "aten.linear.default" in targets
        assert not [t for t in targets if t.startswith("qframework")]


# ------------------------------------------------------------ compiled layers

#: Quantizers of a weight and of inputs.
FORMATS = {
    "fp8 a tensor": (q.Fp8e4m3OCPWeightPerTensorFloat, q.Fp8e4m3OCPActPerTensorFloat),
    "fp8 a channel": (q.Fp8e4m3OCPWeightPerChannelFloat, q.Fp8e4m3OCPActPerTensorFloat),
    "mxfp8": (q.MXFloat8e4m3Weight, q.MXFloat8e4m3Act),
    "mxfp4": (q.MXFloat4e2m1Weight, q.MXFloat4e2m1Act),
    "nvfp4": (q.NVFloat4Weight, q.NVFloat4Act),
    "shifted": (q.ShiftedUint8WeightPerTensorFloat, q.ShiftedUint8ActPerTensorFloat),
    "dynamic rows": (q.Int8WeightPerChannelFloat, q.Int8DynamicActPerRowFloat),
}


class Layers(nn.Module):
    """A layer of each format, beside each other, so that one graph has them all."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.all = nn.ModuleList(
            QuantLinear(64, 32, weight_quant=weight, input_quant=act)
            for weight, act in (FORMATS[name] for name in names)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.all])


def calibrated(names: list[str], dtype: torch.dtype) -> Layers:
    torch.manual_seed(0)
    layers = Layers(names).to(dtype)
    with calibration_mode(layers), torch.no_grad():
        layers(torch.randn(48, 64, dtype=dtype))
    return layers


def trained(run: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Results, and gradients of the input and of all parameters."""
    leaf = x.clone().requires_grad_()
    y = run(leaf)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(x.dtype)
    return y.detach(), list(torch.autograd.grad(y, [leaf, *run.parameters()], upstream))


#: Compiling takes seconds a layer: most of it is left to long runs.
SOME = ["fp8 a channel", "mxfp8"]
RUNS = [
    (["mxfp8"], torch.float32),
    pytest.param(list(FORMATS), torch.float32, marks=pytest.mark.exhaustive),
    pytest.param(SOME, torch.bfloat16, marks=pytest.mark.exhaustive),
    pytest.param(SOME, torch.float64, marks=pytest.mark.exhaustive),
]


@pytest.mark.slow
@pytest.mark.parametrize(("names", "dtype"), RUNS)
def test_compiled_training_has_the_bits_and_the_gradients_of_eager_mode(
    names, dtype, monkeypatch
) -> None:
    monkeypatch.setattr(operators, "_LARGE", 1 if dtype == torch.float32 else operators._LARGE)
    layers = calibrated(names, dtype)
    x = torch.randn(40, 64, dtype=dtype)
    y, gradients = trained(layers, x)
    # Dynamo (2.13) fails at many formats in one graph when told that sizes change; it finds that out by itself.
    many = len(names) > 2
    compiled = torch.compile(layers, fullgraph=True, dynamic=None if many else True)
    found = trained(compiled, x)
    if many:
        trained(compiled, torch.randn(56, 64, dtype=dtype))
    assert torch.equal(found[0], y)
    for a, b in zip(found[1], gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))
    with torch.compiler.set_stance("fail_on_recompile"):
        again = torch.randn(72, 64, dtype=dtype)
        assert torch.equal(trained(compiled, again)[0], trained(layers, again)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [SOME[:1], pytest.param(list(FORMATS), marks=pytest.mark.exhaustive)]
)
def test_compiled_evaluation_has_the_bits_of_eager_mode(names) -> None:
    layers, x = calibrated(names, torch.float32).eval(), torch.randn(40, 64)
    with torch.no_grad():
        expected = layers(x)
        assert torch.equal(torch.compile(layers, fullgraph=True)(x), expected)
        with qframework.frozen(layers):
            assert torch.equal(torch.compile(layers, fullgraph=True)(x), expected)


@needs_compiler
def test_graphs_of_frozen_layers_quantize_no_weight(monkeypatch) -> None:
    monkeypatch.setattr(operators, "_LARGE", 1)
    layers, x = calibrated(SOME, torch.float32).eval(), torch.randn(40, 64)
    with torch.no_grad():
        assert traced(layers, x) == ["absmax"] * 3
        with qframework.frozen(layers):
            assert traced(layers, x) == ["absmax"]
