"""A model that is saved and loaded has the same quantizers and the same outputs, bit for bit."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qframework.quantizers
from qframework.export import CheckpointError, load_quantized, save_quantized
from qframework.graph import quantize_model
from qframework.inject import QuantizerError, value
from qframework.inject.injector import InjectorType
from qframework.layers import (
    QuantConv2d,
    QuantEltwiseAdd,
    QuantELU,
    QuantEmbedding,
    QuantGELU,
    QuantGRU,
    QuantHardTanh,
    QuantIdentity,
    QuantLayerNorm,
    QuantLeakyReLU,
    QuantLinear,
    QuantLSTM,
    QuantMultiheadAttention,
    QuantPReLU,
    QuantReLU,
    QuantRNN,
    QuantSoftmax,
    QuantTransformerEncoderLayer,
    TruncAvgPool2d,
)
from qframework.proxy import WeightQuantProxyFromInjector
from qframework.quant_tensor import QuantTensor
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFloat,
    Int16Bias,
    ShiftedUint8WeightPerChannelFloat,
    Uint8ActPerTensorFloat,
)

#: Formats whose numbers aren't those of a scale times a level that depends on the element alone.
IN_FLOATS = {
    "Int8AccumulatorAwareWeightQuant",
    "Int8AccumulatorAwareZeroCenterWeightQuant",
    "Uint8WeightPerTensorDoReFa",
}


def leaves(out: object) -> list[Tensor]:
    found = torch.utils._pytree.tree_leaves(out, is_leaf=lambda o: isinstance(o, QuantTensor))
    return [o.value if isinstance(o, QuantTensor) else o for o in found if o is not None]


def trained(model: nn.Module, *x: Tensor) -> nn.Module:
    """After two batches, in evaluation mode."""
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(*x)
    return model.eval()


def check(model: nn.Module, fresh: nn.Module, folder: Path, *x: Tensor, own=()) -> nn.Module:
    """Save a model, load it into another one, compare."""
    with torch.no_grad():
        expected = leaves(model(*x))
        save_quantized(model, folder)
        again = leaves(model(*x))
        loaded = load_quantized(folder, fresh.eval(), own=own)
        got = leaves(loaded(*x))
    assert len(expected) == len(got)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    return loaded


def weights_of(folder: Path) -> dict[str, dict[str, object]]:
    return json.loads((folder / "recipe.json").read_text())["weights"]  # type: ignore[no-any-return]


def weight_quantizers() -> list[str]:
    found = []
    for name in dir(qframework.quantizers):
        cls = getattr(qframework.quantizers, name)
        if not isinstance(cls, InjectorType) or "proxy_class" not in cls:
            continue
        if not issubclass(cls.proxy_class, WeightQuantProxyFromInjector):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                layer = QuantLinear(4, 4, weight_quant=cls)
        except QuantizerError:
            continue  # a part of quantizers
        if layer.weight_quant.tensor_quant is not None:
            found.append(name)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", weight_quantizers())
def test_every_weight_quantizer_gives_the_same_outputs(name, dtype, tmp_path) -> None:
    torch.manual_seed(0)
    quantizer = getattr(qframework.quantizers, name)
    probe = QuantLinear(48, 32, weight_quant=quantizer)
    given = Uint8ActPerTensorFloat if probe.weight_quant.requires_quant_input else None
    x = torch.randn(3, 48).abs().to(dtype)
    model = nn.Sequential(QuantLinear(48, 32, weight_quant=quantizer, input_quant=given)).to(dtype)
    loaded = check(trained(model, x), nn.Sequential(nn.Linear(48, 32)).to(dtype), tmp_path, x)
    assert loaded[0].weight_quant.quantizer is quantizer
    bits = weights_of(tmp_path).get("0.weight", {}).get("bits")
    if name in IN_FLOATS or ("WeightNorm" in name and dtype is torch.bfloat16):
        assert bits is None or "WeightNorm" in name
    else:
        width = model[0].weight_quant.bit_width()
        assert bits is not None and bits <= float(width)
    save_quantized(loaded, tmp_path / "again")
    first, second = (p / "model.safetensors" for p in (tmp_path, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    "keywords",
    [
        {"float_to_int_impl_type": "floor"},
        {"float_to_int_impl_type": "ceil"},
        {"float_to_int_impl_type": "round_to_zero"},
        {"float_to_int_impl_type": "learned_round"},
        {"float_to_int_impl_type": "stochastic_round"},
        {"bit_width_impl_type": "parameter"},
        {"scaling_impl_type": "parameter_from_stats"},
        {"scaling_impl_type": "const", "scaling_const": 0.1},
        {"bit_width": 16},
        {"bit_width": 3, "narrow_range": False},
        {"scaling_affine_rescaling_init": 1.5},
    ],
    ids=str,
)
def test_keywords_of_quantizers_are_kept(keywords, tmp_path) -> None:
    torch.manual_seed(0)
    given = {f"weight_{n}": v for n, v in keywords.items()}
    quantizer = (
        Int8WeightPerTensorFloat if "scaling_const" in keywords else Int8WeightPerChannelFloat
    )
    x = torch.randn(3, 40)
    model = nn.Sequential(QuantLinear(40, 24, weight_quant=quantizer, **given))
    loaded = check(trained(model, x), nn.Sequential(nn.Linear(40, 24)), tmp_path, x)
    mine, theirs = (m[0].weight_quant.explain() for m in (model, loaded))
    assert [(r.name, r.value, r.origin) for r in mine] == [
        (r.name, r.value, r.origin) for r in theirs
    ]


class Attention(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]  # type: ignore[no-any-return]


class Sum(nn.Module):
    def __init__(self, add: nn.Module) -> None:
        super().__init__()
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, 2 * x)  # type: ignore[no-any-return]


SEQUENCE, IMAGE, ROWS = (5, 2, 16), (2, 4, 8, 8), (3, 16)
LAYERS = {
    "rnn": (lambda: QuantRNN(16, 8), lambda: nn.RNN(16, 8), SEQUENCE),
    "lstm": (
        lambda: QuantLSTM(16, 8, num_layers=2, bidirectional=True),
        lambda: nn.LSTM(16, 8, num_layers=2, bidirectional=True),
        SEQUENCE,
    ),
    "lstm with one quantizer": (
        lambda: QuantLSTM(16, 8, shared_intra_layer_weight_quant=True),
        lambda: nn.LSTM(16, 8),
        SEQUENCE,
    ),
    "gru": (lambda: QuantGRU(16, 8), lambda: nn.GRU(16, 8), SEQUENCE),
    "attention": (
        lambda: Attention(QuantMultiheadAttention(16, 4)),
        lambda: Attention(nn.MultiheadAttention(16, 4)),
        SEQUENCE,
    ),
    "attention, packed": (
        lambda: Attention(QuantMultiheadAttention(16, 4, packed_in_proj=True)),
        lambda: Attention(nn.MultiheadAttention(16, 4)),
        SEQUENCE,
    ),
    "encoder": (
        lambda: QuantTransformerEncoderLayer(16, 4, 32),
        lambda: nn.TransformerEncoderLayer(16, 4, 32),
        SEQUENCE,
    ),
    "hard tanh": (lambda: QuantHardTanh(min_val=-1.0, max_val=1.0), nn.Hardtanh, ROWS),
    "hard tanh at an identity": (
        lambda: QuantHardTanh(min_val=-1.0, max_val=1.0),
        nn.Identity,
        ROWS,
    ),
    "prelu": (QuantPReLU, nn.PReLU, ROWS),
    "elu": (lambda: QuantELU(alpha=0.5), lambda: nn.ELU(0.5), ROWS),
    "leaky relu": (lambda: QuantLeakyReLU(0.2), lambda: nn.LeakyReLU(0.2), ROWS),
    "gelu": (lambda: QuantGELU(approximate="tanh"), lambda: nn.GELU("tanh"), ROWS),
    "softmax": (lambda: QuantSoftmax(dim=1), lambda: nn.Softmax(1), ROWS),
    "layer norm": (
        lambda: QuantLayerNorm(16, weight_quant=Int8WeightPerTensorFloat),
        lambda: nn.LayerNorm(16),
        ROWS,
    ),
    "identity": (QuantIdentity, nn.Identity, ROWS),
    "sum": (lambda: Sum(QuantEltwiseAdd()), lambda: Sum(nn.Identity()), ROWS),
    "truncated pool": (
        lambda: nn.Sequential(QuantIdentity(return_quant_tensor=True), TruncAvgPool2d(2)),
        lambda: nn.Sequential(nn.Identity(), nn.AvgPool2d(2)),
        IMAGE,
    ),
}


@pytest.mark.parametrize("target", ["float", "quantized"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_loaded_into_floats_and_into_their_like(name, target, tmp_path) -> None:
    torch.manual_seed(0)
    quantized, floats, shape = LAYERS[name]
    x = torch.randn(shape)
    model = trained(nn.Sequential(quantized()), x)
    fresh = nn.Sequential((floats if target == "float" else quantized)())
    check(model, fresh, tmp_path, x)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2),
        nn.Flatten(),
        nn.Linear(4 * 81, 10),
    )


def test_a_converted_network_with_a_folded_norm_is_loaded_into_the_float_one(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    model, _ = quantize_model(
        network(),
        fold_batch_norm=True,
        weight_bit_width=3,
        input_quant=Int8ActPerTensorFloat,
        bias_quant=Int16Bias,
    )
    loaded = check(trained(model, x), network(), tmp_path, x)
    assert loaded[0].bias is not None
    assert len(weights_of(tmp_path)) == 3


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.inner(x)) + x


def test_quantized_functions_need_a_model_that_has_them(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS)
    model = trained(quantize_model(Residual(), functions=True)[0], x)
    check(model, quantize_model(Residual(), functions=True)[0], tmp_path, x)
    with pytest.raises(CheckpointError, match="has to be quantized in the same way"):
        load_quantized(tmp_path, Residual())


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_a_class_with_its_own_forward_keeps_it(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS)
    model = trained(quantize_model(nn.Sequential(Doubled(16, 4)))[0], x)
    check(model, nn.Sequential(Doubled(16, 4)), tmp_path, x)


class Tied(nn.Module):
    def __init__(self, embedding: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.embedding, self.head = embedding, head
        head.weight = embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x))  # type: ignore[no-any-return]


def test_a_weight_of_two_layers_stays_exact(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randint(10, (7,))
    model = Tied(QuantEmbedding(10, 8), QuantLinear(8, 10, bias=False))
    fresh = Tied(nn.Embedding(10, 8), nn.Linear(8, 10, bias=False))
    loaded = check(trained(model, x), fresh, tmp_path, x)
    assert loaded.head.weight is loaded.embedding.weight


def test_shared_quantizers_are_shared_again(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS)
    first, act = QuantLinear(16, 16), QuantReLU()
    second = QuantLinear(16, 16, weight_quant=first.weight_quant)
    model = nn.Sequential(first, act, second, QuantIdentity(act_quant=act.act_quant))
    fresh = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Identity())
    loaded = check(trained(model, x), fresh, tmp_path, x)
    assert loaded[0].weight_quant is loaded[2].weight_quant
    assert loaded[1].act_quant is loaded[3].act_quant


def test_an_activation_that_shares_a_quantizer_keeps_its_function(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS)
    first = QuantIdentity()
    model = trained(nn.Sequential(first, QuantReLU(act_quant=first.act_quant)), x)
    check(model, nn.Sequential(nn.Identity(), nn.ReLU()), tmp_path, x)


def test_disabled_quantizers_stay_disabled(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS)
    model = trained(nn.Sequential(QuantLinear(16, 4), QuantIdentity()), x)
    model[0].weight_quant.disable_quant = True
    loaded = check(model, nn.Sequential(nn.Linear(16, 4), nn.Identity()), tmp_path, x)
    assert loaded[0].weight_quant.disable_quant
    assert torch.equal(loaded[0].weight, model[0].weight)


def test_a_layer_by_itself_is_returned_as_a_quantized_one(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS)
    loaded = check(trained(QuantLinear(16, 4), x), nn.Linear(16, 4), tmp_path, x)
    assert isinstance(loaded, QuantLinear)


def test_the_model_itself_is_returned_and_keeps_its_parameters(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS)
    model = trained(nn.Sequential(QuantLinear(16, 4)), x)
    save_quantized(model, tmp_path)
    fresh = nn.Sequential(nn.Linear(16, 4))
    weight = fresh[0].weight
    assert load_quantized(tmp_path, fresh) is fresh
    assert fresh[0].weight is weight and fresh.training and fresh[0].weight_quant.training


class Int4(Int8WeightPerChannelFloat):
    bit_width = 4
    scaling_min_val = 1e-6


class OfTheWeight(Int8WeightPerTensorFloat):
    scaling_impl_type = "const"

    @value
    def scaling_init(module):
        return module.weight.abs().max()


def test_a_quantizer_of_ones_own_that_is_data_needs_nothing(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS)
    model = trained(nn.Sequential(QuantLinear(16, 4, weight_quant=Int4)), x)
    loaded = check(model, nn.Sequential(nn.Linear(16, 4)), tmp_path, x)
    made = loaded[0].weight_quant.quantizer
    assert made is not Int4 and made.__name__ == "Int4" and made.bit_width == 4


def test_a_quantizer_with_code_of_its_own_has_to_be_given(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS)
    model = trained(nn.Sequential(QuantLinear(16, 4, weight_quant=OfTheWeight)), x)
    check(model, nn.Sequential(nn.Linear(16, 4)), tmp_path, x, own=[OfTheWeight])
    with pytest.raises(CheckpointError, match=r"own=\[OfTheWeight\]"):
        load_quantized(tmp_path, nn.Sequential(nn.Linear(16, 4)))
    like = nn.Sequential(QuantLinear(16, 4, weight_quant=OfTheWeight))
    assert torch.equal(load_quantized(tmp_path, like.eval())(x), model(x))


@pytest.mark.parametrize(("bits", "bytes_of_weights"), [(8, 262_144), (4, 131_072), (2, 65_536)])
def test_weights_take_the_bits_that_they_have(bits, bytes_of_weights, tmp_path) -> None:
    torch.manual_seed(0)
    layer = QuantLinear(512, 512, weight_quant=Int8WeightPerChannelFloat, weight_bit_width=bits)
    save_quantized(layer, tmp_path)
    size = sum(p.stat().st_size for p in tmp_path.iterdir())
    assert bytes_of_weights < size < 1.05 * bytes_of_weights + 16_000


def test_scales_are_kept_to_the_last_bit(tmp_path) -> None:
    torch.manual_seed(0)
    layer = QuantLinear(64, 500, weight_quant=ShiftedUint8WeightPerChannelFloat)
    expected = layer.weight_quant.scale()
    save_quantized(layer, tmp_path)
    loaded = load_quantized(tmp_path, nn.Linear(64, 500))
    assert torch.equal(loaded.weight_quant.scale(), expected)
    assert "kept" in loaded.weight_quant.summary()
    loaded.weight_quant.init_tensor_quant()
    assert not torch.equal(loaded.weight_quant.scale(), expected)  # taken anew, they are an ulp off
    assert torch.allclose(loaded.weight_quant.scale(), expected)


def test_kept_scales_go_through_state_dicts_and_copies(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS)
    layer = QuantLinear(16, 200, weight_quant=Int8WeightPerChannelFloat)
    save_quantized(layer, tmp_path)
    loaded = load_quantized(tmp_path, nn.Linear(16, 200))
    fresh = QuantLinear(16, 200, weight_quant=Int8WeightPerChannelFloat)
    fresh.load_state_dict(loaded.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert torch.equal(copy.deepcopy(loaded)(x), layer(x))
    # a checkpoint of floats has none: they are those of its weights
    other = QuantLinear(16, 200, weight_quant=Int8WeightPerChannelFloat)
    loaded.load_state_dict(other.state_dict())
    assert torch.equal(loaded(x), other(x))


def test_a_weight_that_is_assigned_has_its_own_scale(tmp_path) -> None:
    torch.manual_seed(0)
    layer = QuantLinear(16, 4)
    save_quantized(layer, tmp_path)
    loaded = load_quantized(tmp_path, nn.Linear(16, 4))
    loaded.weight = nn.Parameter(3 * torch.randn(4, 16))
    assert torch.equal(
        loaded.quant_weight().value,
        QuantLinear(16, 4).weight_quant(loaded.weight).value,
    )


def test_a_loaded_model_trains(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS)
    save_quantized(trained(nn.Sequential(QuantLinear(16, 4)), x), tmp_path)
    loaded = load_quantized(tmp_path, nn.Sequential(nn.Linear(16, 4)))
    before = loaded[0].weight.clone()
    loaded(x).square().sum().backward()
    torch.optim.SGD(loaded.parameters(), 0.1).step()
    assert not torch.equal(loaded[0].weight, before)


def test_saving_changes_neither_the_model_nor_its_mode(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(QuantConv2d(4, 8, 3), nn.BatchNorm2d(8), QuantReLU()).train()
    model[1].eval()
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    parts = list(model.modules())
    save_quantized(model, tmp_path)
    assert list(model.modules()) == parts
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())


def test_a_model_on_the_meta_device_gets_the_numbers(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS)
    model = trained(nn.Sequential(QuantLinear(16, 4), QuantReLU()), x)
    save_quantized(model, tmp_path)
    with torch.device("meta"):
        fresh = nn.Sequential(nn.Linear(16, 4), nn.ReLU())
    assert torch.equal(load_quantized(tmp_path, fresh.eval())(x), model(x))


def test_what_is_not_quantized_is_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="nothing in this Sequential is quantized"):
        save_quantized(nn.Sequential(nn.Linear(4, 4)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_without_numbers_is_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"0\.weight is on the meta device"):
        save_quantized(nn.Sequential(QuantLinear(4, 4, device=torch.device("meta"))), tmp_path)


def test_state_that_is_no_tensor_is_refused(tmp_path) -> None:
    class Counting(nn.Module):
        def get_extra_state(self) -> object:
            return {"count": 3}

        def set_extra_state(self, state: object) -> None:
            pass

    with pytest.raises(CheckpointError, match=r"1 \(Counting\) has extra state"):
        save_quantized(nn.Sequential(QuantLinear(4, 4), Counting()), tmp_path)


def test_a_loaded_model_can_be_frozen_and_converted(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS)
    save_quantized(QuantLinear(16, 200, weight_quant=Int8WeightPerChannelFloat), tmp_path)
    loaded = load_quantized(tmp_path, nn.Linear(16, 200)).eval()
    with torch.no_grad():
        expected = loaded(x)
        with qframework.frozen(loaded):
            assert torch.equal(loaded(x), expected)
    kept = loaded.weight_quant.tensor_quant.scaling_impl.kept.clone()
    loaded.bfloat16()
    assert torch.equal(loaded.weight_quant.tensor_quant.scaling_impl.kept, kept)


@pytest.mark.slow
def test_a_loaded_model_compiles_in_one_graph(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS)
    model = trained(nn.Sequential(QuantLinear(16, 8), QuantReLU()), x)
    save_quantized(model, tmp_path)
    loaded = load_quantized(tmp_path, nn.Sequential(nn.Linear(16, 8), nn.ReLU()).eval())
    with torch.no_grad():
        compiled = torch.compile(loaded, fullgraph=True)
        assert torch.allclose(compiled(x), model(x))
