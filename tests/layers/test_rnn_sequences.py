"""All steps of a recurrent layer as one function, against the same steps composed of plain functions."""

import copy
from collections.abc import Iterator

import pytest
import torch

import qframework
from qframework.core.function_wrapper import TensorClampSte
from qframework.functional import gru_sequence, lstm_sequence, rnn_sequence
from qframework.graph import calibration_mode
from qframework.layers import QuantGRU, QuantLSTM, QuantRNN, recurrent_cells
from qframework.quantizers import Int8ActPerTensorFloat, Uint8ActPerTensorFloat


class Floor(Int8ActPerTensorFloat):
    float_to_int_impl_type = "floor"


KINDS = {"RNN": QuantRNN, "LSTM": QuantLSTM, "GRU": QuantGRU}
OPTIONS = [
    {},
    {"bias": False, "num_layers": 2, "bidirectional": True},
    {"gate_acc_quant": None},
    {"io_quant": None, "bias_quant": None},
    {"gate_acc_bit_width": 3, "io_bit_width": 2},
    {"gate_acc_quant": Floor, "io_quant": Floor},
    {"gate_acc_tensor_clamp_impl": TensorClampSte},
]
GATED = [
    {"sigmoid_quant": None},
    {"tanh_quant": None},
    {"tanh_quant": Floor},
    {"sigmoid_quant": None, "tanh_quant": None},
    {"update_acc_bit_width": 4, "sigmoid_bit_width": 3, "tanh_bit_width": 2},
    {
        "update_acc_bit_width": 4,
        "update_sigmoid_bit_width": 3,
        "gate_acc_tensor_clamp_impl": TensorClampSte,
    },
    {"update_acc_quant": Floor},
]
OF_LSTM = [
    {"cell_state_quant": None},
    {"output_sigmoid_quant": None, "hidden_state_tanh_quant": None},
    {"cell_state_bit_width": 3, "cell_state_quant": Uint8ActPerTensorFloat},
]
#: Quantizers of neighbouring columns that differ in more than scale and width: they go step by step.
APART = [
    {"output_sigmoid_quant": None, "hidden_state_tanh_quant": None},
    {"forget_acc_quant": Floor},
    {"update_acc_quant": Floor},
]


def options_of(kind: str) -> list[dict]:
    found = OPTIONS + (GATED if kind != "RNN" else [])
    found = [
        {
            ("forget" + k[6:] if kind == "LSTM" and k.startswith("update") else k): v
            for k, v in o.items()
        }
        for o in found
    ]
    return found + (OF_LSTM if kind == "LSTM" else [])


CASES = [(kind, o) for kind in KINDS for o in options_of(kind)]


def calibrated(kind, options):
    torch.manual_seed(0)
    layer = KINDS[kind](4, 3, dtype=torch.float64, **options)
    with calibration_mode(layer):
        layer(2 * torch.randn(6, 5, 4, dtype=torch.float64))
    return layer.train()


def inputs(kind, layer):
    torch.manual_seed(1)
    count = layer.num_layers * (1 + layer.bidirectional)
    x = 2 * torch.randn(7, 5, 4, dtype=torch.float64)
    states = [torch.randn(count, 5, 3, dtype=torch.float64) for _ in layer.state_names]
    return [t.requires_grad_() for t in (x, *states)]


def run(layer, given):
    out, states = layer(*given)
    return [out, *(states if isinstance(states, tuple) else (states,))]


@pytest.fixture(autouse=True)
def fused() -> Iterator[None]:
    """These functions, also where all others are tested composed."""
    with qframework.settings.use(kernels="fused"):
        yield


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Names of the functions of whole sequences, as they are called."""
    made = []
    for function in (rnn_sequence, lstm_sequence, gru_sequence):
        name = function.__name__

        def spy(*args, name=name, function=function):
            made.append(name)
            return function(*args)

        monkeypatch.setattr(recurrent_cells, name, spy)
    return made


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_values_and_gradients_are_those_of_the_steps(kind, options, calls) -> None:
    whole = calibrated(kind, options)
    composed = copy.deepcopy(whole)
    ours, theirs = inputs(kind, whole), inputs(kind, whole)
    weights = None
    for layer, given, kernels in ((whole, ours, "fused"), (composed, theirs, "reference")):
        with qframework.settings.use(kernels=kernels):
            results = run(layer, given)
            if weights is None:
                whole_calls = (
                    0 if options in APART else layer.num_layers * (1 + layer.bidirectional)
                )
                assert calls == [f"{kind.lower()}_sequence"] * whole_calls
                weights = [torch.randn_like(r) for r in results]
                expected = results
            sum((r * w).sum() for r, w in zip(results, weights, strict=True)).backward()
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)
    named = {n: p.grad for n, p in composed.named_parameters()}
    pairs = [(p.grad, named[n], n) for n, p in whole.named_parameters()]
    pairs += [(a.grad, b.grad, "input") for a, b in zip(ours, theirs, strict=True)]
    for a, b, name in pairs:
        assert (a is None) == (b is None), name
        if a is not None:
            # Scales stay in float32.
            torch.testing.assert_close(
                a, b, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_gives_what_training_gives(kind) -> None:
    layer = calibrated(kind, {"num_layers": 2, "bidirectional": True})
    given = inputs(kind, layer)
    trained = run(layer, given)
    with torch.no_grad():
        evaluated = run(layer.eval(), given)
    for a, b in zip(trained, evaluated, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_the_definition_of_a_sequence(kind, dtype, calls) -> None:
    whole = calibrated(kind, {}).to(dtype)
    composed = copy.deepcopy(whole)
    found = []
    for layer, kernels in ((whole, "fused"), (composed, "reference")):
        given = [t.detach().to(dtype).requires_grad_() for t in inputs(kind, layer)]
        with qframework.settings.use(kernels=kernels):
            results = run(layer, given)
            sum(r.float().square().sum() for r in results).backward()
        found.append([*results, *(t.grad for t in given)])
    assert calls[:1] == [f"{kind.lower()}_sequence"]
    for a, b in zip(*found, strict=True):
        assert a.dtype == dtype and torch.isfinite(a).all()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_derivative_is_refused_with_a_remedy_that_works(kind) -> None:
    layer = calibrated(kind, {})
    x, *states = inputs(kind, layer)
    with pytest.raises(RuntimeError, match=r"no second derivative.*kernels='reference'"):
        torch.autograd.grad(run(layer, [x, *states])[0].sum(), x, create_graph=True)
    with qframework.settings.use(kernels="reference"):
        out = run(layer, [x, *states])[0].sum()
        (grad,) = torch.autograd.grad(out, x, create_graph=True)
        grad.square().sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_several_gradients_at_once_are_refused_with_a_remedy_that_works(kind) -> None:
    layer = calibrated(kind, {})
    x = inputs(kind, layer)[0]
    upstream = torch.randn(3, 7, 5, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="one gradient at a time"):
        torch.autograd.grad(layer(x)[0], x, upstream, is_grads_batched=True)
    with qframework.settings.use(kernels="reference"):
        (together,) = torch.autograd.grad(layer(x)[0], x, upstream, is_grads_batched=True)
    (alone,) = torch.autograd.grad(layer(x)[0], x, upstream[1])
    torch.testing.assert_close(together[1], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_give_the_same_and_leave_nothing_behind(kind) -> None:
    layer = calibrated(kind, {})
    x = inputs(kind, layer)[0].detach()
    named = dict(layer.named_parameters())

    def loss(parameters):
        # Torch leaves the given parameters in modules that have several names, unless told that names aren't tied.
        call = torch.func.functional_call
        return call(layer, parameters, (x,), tie_weights=False)[0].square().sum()

    found = torch.func.grad(loss)(named)
    layer(x)[0].square().sum().backward()
    for name, parameter in named.items():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-6)
    layer.eval()
    many = torch.stack([x, -x])
    with torch.no_grad():
        together = torch.vmap(lambda one: layer(one)[0])(many)
        assert torch.equal(together, torch.stack([layer(one)[0] for one in many]))
    assert copy.deepcopy(layer).to("meta")(x.to("meta"))[0].shape == together[0].shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_under_autocast_results_are_in_half_precision(kind, training) -> None:
    layer = calibrated(kind, {}).float().train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(inputs(kind, layer)[0].detach().float())[0]
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_is_taken_and_a_sequence_without_steps_refused(kind) -> None:
    layer = calibrated(kind, {})
    x = inputs(kind, layer)[0]
    out = layer(x[:, :0])[0]
    assert out.shape == (7, 0, 3)
    out.sum().backward()
    with pytest.raises(ValueError, match="no steps"):
        layer(x[:0])


@pytest.mark.parametrize("kind", KINDS)
def test_little_is_kept_for_the_backward_pass(kind) -> None:
    """At most eleven numbers for each of the state at each step; an LSTM of plain functions keeps as many."""
    steps, batch, size = 12, 16, 32
    torch.manual_seed(0)
    layer = KINDS[kind](4, size)
    x = torch.randn(steps, batch, 4)
    with calibration_mode(layer):
        layer(x)
    layer.train()
    saved = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.dim() == 3:
            saved[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert sum(saved.values()) <= 11 * steps * batch * size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_every_change_is_seen_by_the_next_call(kind, quantized, training) -> None:
    layer = calibrated(kind, {} if quantized else {"weight_quant": None, "bias_quant": None})
    layer.train(training)
    x = inputs(kind, layer)[0].detach()
    direction = layer.layers[0][0]
    gate = direction.parameters_of(direction.gates[0])
    state = copy.deepcopy(layer.state_dict())
    changes = [
        lambda: gate.hidden_weight.weight.mul_(2),
        lambda: gate.bias.add_(0.5),
        lambda: gate.input_weight.weight.data.copy_(gate.input_weight.weight * 3),
        lambda: layer.io_quant.tensor_quant.scaling_impl.value.mul_(3),
        lambda: layer.load_state_dict(state),
    ]
    if not quantized:  # a quantized bias needs the scale of the input
        changes.append(lambda: setattr(layer.io_quant, "disable_quant", True))
    with torch.no_grad():
        before = layer(x)[0]
        for i, change in enumerate(changes):
            change()
            now = layer(x)[0]
            assert torch.equal(now, copy.deepcopy(layer)(x)[0]), i
            assert not torch.equal(now, before), i
            before = now


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"forget_acc_bit_width": 4, "output_sigmoid_bit_width": 3, "cell_state_quant": None},
        *[
            pytest.param(options, marks=pytest.mark.exhaustive)
            for options in (
                {"forget_acc_bit_width": 4, "output_sigmoid_bit_width": 3},
                {"cell_state_quant": None},
                {"output_sigmoid_quant": None},
            )
        ],
    ],
    ids=str,
)
def test_compilers_get_the_same_of_other_widths_and_of_absent_quantizers(options) -> None:
    layer = calibrated("LSTM", options)
    other = copy.deepcopy(layer)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    x = inputs("LSTM", layer)[0].detach()[:2]
    got, expected = compiled(x)[0], layer(x)[0]
    assert torch.equal(got, expected)
    got.square().sum().backward(), expected.square().sum().backward()
    theirs = dict(other.named_parameters())
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(theirs[name].grad, parameter.grad, rtol=1e-5, atol=1e-6)
