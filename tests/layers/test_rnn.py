"""Recurrent layers: torch's results without quantizers, torch's weights, one quantizer for each gate."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from qframework.graph import calibration_mode
from qframework.layers import QuantGRU, QuantLSTM, QuantRNN, QuantSigmoid
from qframework.quant_tensor import FloatQuantTensor, IntQuantTensor
from qframework.quantizers import (
    Fp8e4m3OCPActPerTensorFloat,
    Int8ActPerTensorFloat,
    Int8DynamicActPerTensorFloat,
    Int8WeightPerChannelFloat,
    MXInt8OCPWeight,
)

KINDS = {
    "RNN": (QuantRNN, nn.RNN, ("gate_acc",)),
    "LSTM": (QuantLSTM, nn.LSTM, ("gate_acc", "sigmoid", "tanh", "cell_state")),
    "GRU": (QuantGRU, nn.GRU, ("gate_acc", "sigmoid", "tanh")),
}
OPTIONS = [
    {},
    {"bias": False},
    {"num_layers": 3, "bidirectional": True},
    {"batch_first": True, "bidirectional": True},
    {"num_layers": 11},
]


def off(kind: str) -> dict[str, None]:
    return {f"{n}_quant": None for n in ("weight", "bias", "io", *KINDS[kind][2])}


def flat(result) -> list[torch.Tensor]:
    out, states = result
    return [out, *(states if isinstance(states, tuple) else (states,))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_torch_weights_load_strictly_and_give_torch_outputs(kind, options) -> None:
    torch.manual_seed(0)
    ours, theirs, _ = KINDS[kind]
    reference = theirs(4, 3, **options)
    layer = ours(4, 3, **options, **off(kind))
    layer.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(5, 2, 4)
    count = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    batch = 5 if options.get("batch_first") else 2
    h = torch.randn(count, batch, 3)
    states = (h, torch.randn(count, batch, 3)) if kind == "LSTM" else h
    for given in ((x,), (x, states)):
        for a, b in zip(flat(layer(*given)), flat(reference(*given)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_torch_without_quantizers(kind) -> None:
    torch.manual_seed(0)
    ours, theirs, _ = KINDS[kind]
    reference, layer = theirs(4, 3), ours(4, 3, **off(kind))
    layer.load_state_dict(reference.state_dict())
    x, y = torch.randn(5, 2, 4, requires_grad=True), torch.randn(5, 2, 4)
    y = x.detach().clone().requires_grad_()
    layer(x)[0].square().sum().backward(), reference(y)[0].square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_a_sequence_without_a_batch_is_taken_as_torch_takes_it() -> None:
    reference, layer = nn.LSTM(4, 3), QuantLSTM(4, 3, **off("LSTM"))
    layer.load_state_dict(reference.state_dict())
    x = torch.randn(5, 4)
    for a, b in zip(flat(layer(x)), flat(reference(x)), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b)


def test_both_forms_of_the_states_of_an_lstm_are_one() -> None:
    layer = QuantLSTM(4, 3, **off("LSTM"))
    x, h, c = torch.randn(5, 2, 4), torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    assert torch.equal(layer(x, (h, c))[0], layer(x, h, c)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_steps_together_are_the_steps_one_by_one(kind) -> None:
    """Once scales are known the quantizers of a step work together; their values are those of each proxy alone."""
    torch.manual_seed(0)
    layer = KINDS[kind][0](4, 3, num_layers=2, bidirectional=True)
    x = torch.randn(6, 2, 4)
    with calibration_mode(layer):
        layer(x)
    layer.eval()
    together = layer(x)
    slow = copy.deepcopy(layer)
    for module in slow.modules():
        if hasattr(module, "is_quant_enabled"):
            module.register_forward_hook(lambda *a: None)  # so that each step goes through it
    for a, b in zip(flat(together), flat(slow(x)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_learned_scales_get_the_gradients_of_the_proxies(kind) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind][0](4, 3)
    x = torch.randn(4, 2, 4)
    with calibration_mode(layer):
        layer(x)
    layer.train()
    slow = copy.deepcopy(layer)
    for module in slow.modules():
        if hasattr(module, "is_quant_enabled"):
            module.register_forward_hook(lambda *a: None)
    layer(x)[0].square().sum().backward(), slow(x)[0].square().sum().backward()
    theirs = dict(slow.named_parameters())
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5)
        if "scaling_impl" in name:
            assert parameter.grad is not None, name


def test_quantized_results_are_valid() -> None:
    layer = QuantLSTM(4, 3, num_layers=2, bidirectional=True, return_quant_tensor=True)
    layer(torch.randn(5, 2, 4))
    layer.eval()
    out, (h, c) = layer(torch.randn(5, 2, 4))
    for q, shape in ((out, (5, 2, 6)), (h, (4, 2, 3)), (c, (4, 2, 3))):
        assert isinstance(q, IntQuantTensor) and q.is_valid and q.shape == shape
    again = QuantLSTM(6, 3, return_quant_tensor=True, quantize_output_only=True)
    assert isinstance(again(out)[0], IntQuantTensor)


def test_each_gate_has_quantizers_of_its_own() -> None:
    layer = QuantLSTM(
        4,
        3,
        weight_bit_width=6,
        forget_gate_weight_bit_width=4,
        gate_acc_bit_width=12,
        output_acc_bit_width=10,
        input_sigmoid_bit_width=5,
        hidden_state_tanh_bit_width=3,
        cell_acc_quant=None,
    )
    direction = layer.layers[0][0]
    widths = {
        g: float(direction.parameters_of(g).input_weight.weight_quant.bit_width())
        for g in direction.gates
    }
    assert widths == {"input": 6, "forget": 4, "output": 6, "cell": 6}
    cell = direction.cell
    assert cell.input_acc_quant.bit_width() == 12 and cell.output_acc_quant.bit_width() == 10
    assert not cell.cell_acc_quant.is_quant_enabled
    assert cell.input_sigmoid_quant.bit_width() == 5 and cell.forget_sigmoid_quant.bit_width() == 8
    assert cell.hidden_state_tanh_quant.bit_width() == 3 and cell.cell_tanh_quant.bit_width() == 8
    assert layer(torch.randn(3, 2, 4))[0].shape == (3, 2, 3)


def test_quantizers_are_shared_as_asked() -> None:
    layer = QuantLSTM(
        4,
        3,
        num_layers=2,
        shared_intra_layer_weight_quant=True,
        shared_intra_layer_gate_acc_quant=True,
    )
    first, second = layer.layers[0][0], layer.layers[1][0]
    assert (
        first.cell.input_acc_quant
        is first.cell.output_acc_quant
        is not second.cell.output_acc_quant
    )
    weights = {id(first.parameters_of(g).hidden_weight.weight_quant) for g in first.gates}
    assert len(weights) == 1
    assert first.cell.cell_state_quant is second.cell.cell_state_quant
    assert first.io_quant is second.cell.output_quant is layer.io_quant
    apart = QuantLSTM(4, 3, num_layers=2, shared_cell_state_quant=False)
    assert apart.layers[0][0].cell.cell_state_quant is not apart.layers[1][0].cell.cell_state_quant


def test_shared_weights_for_the_input_are_those_of_both_directions() -> None:
    layer = QuantLSTM(4, 3, bidirectional=True, shared_input_hidden_weights=True)
    one, other = layer.layers[0]
    for gate in one.gates:
        assert one.parameters_of(gate).input_weight is other.parameters_of(gate).input_weight
        assert one.parameters_of(gate).hidden_weight is not other.parameters_of(gate).hidden_weight
    assert layer(torch.randn(3, 2, 4))[0].shape == (3, 2, 6)


def test_a_coupled_forget_gate_is_what_the_input_gate_leaves() -> None:
    layer = QuantLSTM(4, 3, coupled_input_forget_gates=True, **off("LSTM"))
    torch.manual_seed(0)
    x, h, c = torch.randn(1, 2, 4), torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    gates = {}
    for gate in ("input", "output", "cell"):
        p = layer.layers[0][0].parameters_of(gate)
        gates[gate] = x[0] @ p.input_weight.weight.t() + h[0] @ p.hidden_weight.weight.t() + p.bias
    i = torch.sigmoid(gates["input"])
    state = (1 - i) * c[0] + i * torch.tanh(gates["cell"])
    out, (_, got) = layer(x, h, c)
    torch.testing.assert_close(got[0], state)
    torch.testing.assert_close(out[0], torch.sigmoid(gates["output"]) * torch.tanh(state))


def test_brain_floats_come_back_as_they_came() -> None:
    layer = QuantLSTM(4, 3).bfloat16()
    x = torch.randn(3, 2, 4).bfloat16()
    layer(x)[0].float().sum().backward()
    assert layer.eval()(x)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("quantizer", [Int8WeightPerChannelFloat, MXInt8OCPWeight])
def test_weights_take_any_granularity(quantizer) -> None:
    layer = QuantLSTM(4, 3, weight_quant=quantizer, bias_quant=None)
    layer(torch.randn(3, 2, 4))[0].sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_both_directions_may_have_grids_of_their_own(kind, training) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind][0](4, 3, bidirectional=True, io_quant=Int8DynamicActPerTensorFloat)
    alone = KINDS[kind][0](4, 3, io_quant=Int8DynamicActPerTensorFloat)
    missing = alone.load_state_dict(layer.state_dict(), strict=False).missing_keys
    assert not missing
    x = torch.randn(3, 2, 4)
    layer.train(training), alone.train(training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no statistics: placeholders are as good
        assert torch.equal(layer(x)[0][..., :3], alone(x)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_minifloats_are_returned_on_their_grid(kind, training) -> None:
    torch.manual_seed(0)
    minifloat = Fp8e4m3OCPActPerTensorFloat
    options = {"cell_state_quant": minifloat} if kind == "LSTM" else {}
    layer = KINDS[kind][0](4, 3, num_layers=2, bidirectional=True, io_quant=minifloat, bias_quant=None, return_quant_tensor=True, **options)  # fmt: skip
    x = torch.randn(5, 2, 4)
    with calibration_mode(layer):
        layer(x)
    for q in flat(layer.train(training)(x)):
        assert isinstance(q, FloatQuantTensor) and q.is_valid


@pytest.mark.parametrize("kind", KINDS)
def test_results_with_a_scale_for_each_step_arent_returned_as_one_tensor(kind) -> None:
    make, dynamic = KINDS[kind][0], Int8DynamicActPerTensorFloat
    with pytest.raises(RuntimeError, match=r"io_quant.*another at each step"):
        make(4, 3, io_quant=dynamic, return_quant_tensor=True)
    if kind == "LSTM":
        with pytest.raises(RuntimeError, match=r"cell_state_quant.*another at each step"):
            make(4, 3, cell_state_quant=dynamic, return_quant_tensor=True)
    assert type(make(4, 3, io_quant=dynamic)(torch.randn(3, 2, 4))[0]) is torch.Tensor


def test_a_quantizer_that_was_switched_off_cant_give_a_quantized_result() -> None:
    layer = QuantRNN(4, 3, return_quant_tensor=True, bias_quant=None)
    layer.io_quant.disable_quant = True
    with pytest.raises(RuntimeError, match="the result is not quantized"):
        layer(torch.randn(3, 2, 4))


def test_mistakes_are_named() -> None:
    layer = QuantLSTM(4, 3)
    x = torch.randn(3, 2, 4)
    with pytest.raises(TypeError, match="PackedSequence"):
        layer(pack_padded_sequence(x, [3, 2]))
    with pytest.raises(ValueError, match="input_size=4"):
        layer(torch.randn(3, 2, 5))
    with pytest.raises(ValueError, match=r"hx has shape \(2, 2, 3\)"):
        layer(x, torch.randn(2, 2, 3))
    with pytest.raises(TypeError, match="gate_acc_bit_width"):
        QuantLSTM(4, 3, gateacc_bit_width=4)
    with pytest.raises(TypeError, match="bit_width"):
        QuantLSTM(4, 3, forget_acc_bitwidth=4)
    with pytest.raises(RuntimeError, match="bidirectional=True"):
        QuantRNN(4, 3, shared_input_hidden_weights=True)
    with pytest.raises(RuntimeError, match="io_quant"):
        QuantRNN(4, 3, io_quant=None, return_quant_tensor=True)
    with pytest.raises(ValueError, match="'tanh' and 'relu'"):
        QuantRNN(4, 3, nonlinearity="gelu")
    with pytest.raises(RuntimeError, match="different grids"):
        QuantLSTM(4, 3, num_layers=2, shared_cell_state_quant=False, return_quant_tensor=True)
    with pytest.raises(RuntimeError, match="needs cell_state_quant"):
        QuantLSTM(4, 3, cell_state_quant=None, return_quant_tensor=True)
    with pytest.raises(TypeError, match=r"input_sigmoid_quant.*applies Sigmoid first"):
        QuantLSTM(4, 3, sigmoid_quant=QuantSigmoid().act_quant)


def test_keywords_for_one_gate_are_refused_where_gates_share_a_quantizer() -> None:
    with pytest.raises(
        TypeError, match=r"cell_acc_bit_width is for one gate.*'gate_acc_bit_width'"
    ):
        QuantLSTM(4, 3, shared_intra_layer_gate_acc_quant=True, cell_acc_bit_width=4)
    with pytest.raises(TypeError, match=r"new_gate_weight_bit_width.*'weight_bit_width'"):
        QuantGRU(4, 3, shared_intra_layer_weight_quant=True, new_gate_weight_bit_width=4)
    layer = QuantLSTM(4, 3, shared_intra_layer_gate_acc_quant=True, gate_acc_bit_width=4)
    assert layer.layers[0][0].cell.cell_acc_quant.bit_width() == 4


@pytest.mark.parametrize("single", [False, True])
def test_cell_states_that_are_returned_as_a_list_can_be_fed_back(single) -> None:
    torch.manual_seed(0)
    options = {"num_layers": 2, "bidirectional": True}
    layer = QuantLSTM(4, 3, **options, **off("LSTM"), cat_output_cell_states=False)
    joined = QuantLSTM(4, 3, **options, **off("LSTM"))
    joined.load_state_dict(layer.state_dict())
    x = torch.randn(5, 4) if single else torch.randn(5, 2, 4)
    _, (h, cells) = layer(x)
    assert isinstance(cells, list) and len(cells) == 4
    again, expected = layer(x, (h, cells)), joined(x, joined(x)[1])
    torch.testing.assert_close(again[0], expected[0])
    with pytest.raises(ValueError, match="a list of 4 states"):
        layer(x, (h, cells[:3]))


def test_a_bias_on_the_input_scale_needs_a_quantized_input() -> None:
    layer = QuantRNN(4, 3, quantize_output_only=True)
    with pytest.raises(RuntimeError, match="Input scale required"):
        layer(torch.randn(3, 2, 4))
    assert QuantRNN(4, 3, quantize_output_only=True, bias_quant=None)(torch.randn(3, 2, 4))


#: Each phase once; the others take minutes. An LSTM is compiled in the tests of sequences.
QUICKLY_COMPILED = {("RNN", "collecting"), ("RNN", "learning"), ("GRU", "evaluating")}
PHASES = ("collecting", "learning", "evaluating")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "phase"),
    [
        pytest.param(*case, marks=() if case in QUICKLY_COMPILED else pytest.mark.exhaustive)
        for case in itertools.product(KINDS, PHASES)
    ],
)
def test_a_sequence_compiles_as_one_graph_with_its_gradients(kind, phase) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind][0](4, 3)
    x = torch.randn(2, 2, 4)
    if phase != "collecting":
        with calibration_mode(layer):
            layer(x)
    layer.train(phase != "evaluating")
    other = copy.deepcopy(layer)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    got, expected = compiled(x)[0], layer(x)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    got.square().sum().backward(), expected.square().sum().backward()
    theirs = dict(other.named_parameters())
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(theirs[name].grad, parameter.grad, rtol=1e-4, atol=1e-5)
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(other.get_buffer(name), buffer)


def test_an_activation_quantizer_may_be_any() -> None:
    layer = QuantGRU(
        4, 3, io_quant=Int8ActPerTensorFloat, io_bit_width=6, update_sigmoid_bit_width=4
    )
    assert layer.io_quant.bit_width() == 6
    assert "GRU" in repr(layer) and "weight: int8" in repr(layer)


@pytest.mark.parametrize("layer", [QuantRNN, QuantLSTM, QuantGRU])
def test_dropout_stands_between_layers_in_training(layer) -> None:
    torch.manual_seed(0)
    net = layer(4, 6, 2, dropout=0.5, io_collect_stats_steps=1)
    x = torch.randn(8, 50, 4)
    for _ in range(3):
        net(x)  # while statistics are collected, each step has a scale of its own
    seen = []
    second = net.layers[1][0]
    run = second.run
    second.run = lambda x, *a: (seen.append(x), run(x, *a))[1]
    assert not torch.equal(net(x)[0], net(x)[0])
    dropped, other = seen
    assert 0.4 < float((dropped.value == 0).float().mean()) < 0.7
    assert dropped.is_valid and other.is_valid
    net.eval()
    assert torch.equal(net(x)[0], net(x)[0])


@pytest.mark.parametrize("layer", [QuantRNN, QuantLSTM, QuantGRU])
def test_arguments_that_cannot_be_are_refused_by_name(layer) -> None:
    for name in ("bidirectional", "batch_first", "bias", "quantize_output_only"):
        with pytest.raises(TypeError, match=rf"{name}=0\.5"):
            layer(4, 6, **{name: 0.5})
    with pytest.raises(ValueError, match=r"dropout=1\.5"):
        layer(4, 6, 2, dropout=1.5)
    with pytest.warns(UserWarning, match="between layers"):
        layer(4, 6, dropout=0.5)
