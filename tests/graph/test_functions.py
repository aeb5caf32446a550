"""Functions that modules call themselves: told by module and line, quantized with ``functions=True``."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qframework.graph import Rule, calibration_mode, quantize_model
from qframework.layers import QuantScaledDotProductAttention
from qframework.quantizers import Int8ActPerTensorFloat, Int8WeightPerChannelFloat


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


class Block(nn.Module):
    """Calls functions in every way that code does."""

    def __init__(self):
        super().__init__()
        self.attention, self.up, self.down = Attention(), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = x + self.attention(x) * 2
        x = x + self.down(F.gelu(self.up(x)))
        y = torch.cat([x, F.relu(x)], dim=-1)
        y += 1.0
        return (y @ y.transpose(1, 2) / 16).softmax(-1) @ x


class Untraceable(Block):
    def forward(self, x):
        return super().forward(x) if x.sum() < 1e9 else x


LINES, START = inspect.getsourcelines(Block.forward)
CALLS = ["add", "add", "gelu", "cat", "relu", "matmul", "softmax", "matmul"]
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def line_of(text):
    return f"test_functions.py:{START + next(i for i, line in enumerate(LINES) if text in line)}"


def block(kind=Block):
    torch.manual_seed(0)
    return kind().eval()


def test_functions_are_listed_with_module_and_line() -> None:
    _, report = quantize_model(block())
    found = {(f.module, f.function, f.place) for f in report.float_functions}
    assert ("", "gelu", line_of("F.gelu")) in found and ("", "cat", line_of("torch.cat")) in found
    assert ("", "add", line_of("self.attention(x)")) in found
    assert [f.function for f in report.functions if f.module == "attention"] == [
        "scaled_dot_product_attention"
    ]
    assert sorted(f.function for f in report.functions if f.module == "") == sorted(CALLS)
    assert "gelu -> float (functions=True quantizes it)" in str(report)


def test_functions_of_modules_that_cannot_be_traced_are_listed_after_the_first_forward() -> None:
    model, report = quantize_model(block(Untraceable))
    assert not [f for f in report.functions if f.module == ""]
    model(X)
    assert sorted(f.function for f in report.functions if f.module == "") == sorted(CALLS)


def converted(kind=Block, **options):
    net = block(kind)
    example = None if kind is Block else (X,)
    model, report = quantize_model(
        net,
        weight_quant=Int8WeightPerChannelFloat,
        functions=True,
        example_input=example,
        **options,
    )
    with torch.no_grad(), calibration_mode(model):
        torch.testing.assert_close(model(X), net(X))
    return net, model, report


@pytest.mark.parametrize("kind", [Block, Untraceable])
def test_functions_are_quantized_where_they_are_called(kind) -> None:
    net, model, report = converted(kind)
    made = [f.quantized_type for f in report.functions if f.module == ""]
    assert sorted(m for m in made if m) == [
        "QuantConcatenation", "QuantGELU", "QuantMatMul", "QuantMatMul", "QuantReLU", "QuantSum", "QuantSum",
    ]  # fmt: skip
    assert isinstance(model, kind)
    got = model(X)
    assert 0.001 < (got - net(X)).abs().max() < 0.2
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(again(X), got)
    assert torch.equal(torch.compile(model, backend="eager")(X), got)
    got.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("weight"))


def test_sums_and_concatenations_have_one_scale_for_all_their_elements() -> None:
    _, model, _ = converted()
    add, _, _, _, cat, *_ = model.quantized_functions.values()
    small, large = torch.full((2, 5, 8), 0.1), torch.randn(2, 5, 8)
    for layer in (add, cat):
        layer.act_quant.init_tensor_quant()
        with torch.no_grad(), calibration_mode(layer):
            layer(small, large) if layer is add else layer([small, large])
        scale = layer.act_quant.scale()
        assert scale == large.abs().max() / 128
        steps = (layer(small, large) if layer is add else layer([small, large])) / scale
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


def test_attention_weights_have_no_sign() -> None:
    _, model, _ = converted()
    (attention,) = model.attention.quantized_functions.values()
    assert isinstance(attention, QuantScaledDotProductAttention)
    assert not attention.attn_output_weights_quant.act_quant.is_signed


def test_what_comes_from_a_softmax_has_no_sign() -> None:
    _, model, _ = converted()
    products = [x for x in model.quantized_functions.values() if hasattr(x, "other_quant")]
    assert [p.input_quant.is_signed for p in products] == [True, False]


def test_keywords_and_rules_for_activations_hold_for_functions() -> None:
    rules = [Rule("", act_bit_width=5), Rule("attention", keep_float=True)]
    _, model, report = converted(act_bit_width=6, rules=rules)
    assert not hasattr(model.attention, "quantized_functions")
    assert [f.reason for f in report.functions if f.module == "attention"] == ["as a rule says"]
    widths = {
        float(p.bit_width()) for x in model.quantized_functions.values() for p in x.children() if p.is_quant_enabled
    }  # fmt: skip
    assert widths == {5.0}
    _, model, report = converted(act_quant=None)
    assert not any(f.quantized_type for f in report.functions)


def test_masks_and_biases_are_not_taken_for_residual_sums() -> None:
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))

        def forward(self, x):
            scores = x @ x.transpose(-1, -2)
            return (scores + self.mask).softmax(-1) @ self.lin(x)

    net = Masked().eval()
    x = torch.randn(2, 4, 4)
    for example in (None, (x,)):
        model, report = quantize_model(net, functions=True, example_input=example)
        assert next(f for f in report.functions if f.function == "add").quantized_type is None
        with torch.no_grad(), calibration_mode(model):
            torch.testing.assert_close(model(x), net(x))
        assert torch.isfinite(model(x)).all()


def test_a_module_that_cannot_be_traced_needs_an_example() -> None:
    _, report = quantize_model(block(Untraceable), functions=True)
    (entry,) = [f for f in report.functions if f.function == "unknown"]
    assert "give example_input" in entry.reason
    with pytest.raises(TypeError, match="example_input must be a tuple"):
        quantize_model(block(), example_input=X)


def test_the_input_of_a_product_with_a_layers_weight_is_quantized_too() -> None:
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x):
            return F.linear(x, self.lin.weight)

    net = Reads().eval()
    model, _ = quantize_model(net, functions=True, act_quant=Int8ActPerTensorFloat)
    x = torch.randn(3, 4)
    with torch.no_grad(), calibration_mode(model):
        model(x)
    (holder,) = model.quantized_functions.values()
    assert torch.equal(model(x), F.linear(holder(x), model.lin.quant_weight().value))


def test_example_inputs_leave_the_model_alone() -> None:
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.norm = 0, nn.BatchNorm1d(4)

        def forward(self, x):
            self.calls += 1
            return self.norm(x) + x

    net = Counts().train()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    numbers = torch.get_rng_state()
    quantize_model(
        net, functions=True, example_input=(torch.randn(3, 4, generator=torch.Generator()),)
    )
    assert net.calls == 0 and net.training and torch.equal(numbers, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_a_container_that_iterates_over_its_children_keeps_its_functions_float() -> None:
    class Dense(nn.ModuleDict):
        def forward(self, x):
            found = [x]
            for layer in self.values():
                found.append(layer(found[-1]))
            return torch.cat(found, 1)

    net = Dense({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    x = torch.randn(2, 4)
    model, report = quantize_model(net, functions=True, example_input=(x,), weight_quant=None)
    assert torch.equal(model(x), net(x))
    assert "iterates over its children" in report.functions[0].reason


@pytest.mark.parametrize("by_example", [False, True])
def test_a_sum_that_an_operator_binds_anew_is_quantized_and_one_in_place_is_not(by_example) -> None:
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x):
            y = self.lin(x)
            y += x
            z = self.lin(y)
            z.add_(y)
            return z

    net = Residual().eval()
    x = torch.randn(2, 4)
    example = (x,) if by_example else None
    model, report = quantize_model(net, functions=True, example_input=example, weight_quant=None)
    found = [(f.function, f.quantized_type) for f in report.functions]
    assert found == [("add", "QuantSum"), ("add_", None)]
    with torch.no_grad(), calibration_mode(model):
        torch.testing.assert_close(model(x), net(x))
    assert not torch.equal(model(x), net(x))
    model(x).sum().backward()
