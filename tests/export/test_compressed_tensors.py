"""Files in the layout of compressed-tensors give the values of the quantized weights again, read by that package or by hand."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qframework.export import CheckpointError, export_compressed_tensors
from qframework.layers import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU
from qframework.quantizers import (
    Fp8e4m3OCPActPerTensorFloat,
    Fp8e4m3OCPDynamicActPerRowFloat,
    Fp8e4m3OCPWeightPerChannelFloat,
    Fp8e4m3OCPWeightPerTensorFloat,
    Fp8e5m2OCPWeightPerTensorFloat,
    Int8ActPerTensorFloat,
    Int8DynamicActPerRowFloat,
    Int8DynamicActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerGroupFloat,
    Int8WeightPerTensorFloat,
    Int16Bias,
    MXFloat4e2m1Act,
    MXFloat4e2m1Weight,
    MXFloat8e4m3Weight,
    NF4WeightPerTensorFloat,
    NVFloat4Act,
    NVFloat4Weight,
    ShiftedUint8ActPerTensorFloat,
    ShiftedUint8WeightGroupQuantFloat,
    ShiftedUint8WeightPerChannelFloat,
    ShiftedUint8WeightPerTensorFloat,
    SignedBinaryWeightPerTensorConst,
    SignedTernaryWeightPerTensorConst,
)

#: Weights, keywords, inputs, layout, strategy of the weight.
CASES: dict[str, tuple[object, dict[str, object], object, str, str]] = {}
for bits in (2, 3, 4, 8):
    for kind, keywords, strategy in (
        (Int8WeightPerTensorFloat, {}, "channel"),
        (Int8WeightPerChannelFloat, {}, "channel"),
        (Int8WeightPerGroupFloat, {"group_size": 32}, "group"),
        (ShiftedUint8WeightPerTensorFloat, {}, "channel"),
        (ShiftedUint8WeightPerChannelFloat, {}, "channel"),
        (ShiftedUint8WeightGroupQuantFloat, {"group_size": 16}, "group"),
    ):
        given = {**keywords, "bit_width": bits}
        CASES[f"{kind.__name__} {bits}"] = (kind, given, None, "pack-quantized", strategy)
CASES |= {
    "not narrow": (
        Int8WeightPerChannelFloat,
        {"bit_width": 4, "narrow_range": False},
        None,
        "pack-quantized",
        "channel",
    ),
    "ternary": (SignedTernaryWeightPerTensorConst, {}, None, "pack-quantized", "channel"),
    "binary": (SignedBinaryWeightPerTensorConst, {}, None, "pack-quantized", "channel"),
    "w8a8 static": (
        Int8WeightPerChannelFloat,
        {},
        Int8ActPerTensorFloat,
        "int-quantized",
        "channel",
    ),
    "w8a8 shifted": (
        ShiftedUint8WeightPerChannelFloat,
        {},
        ShiftedUint8ActPerTensorFloat,
        "int-quantized",
        "channel",
    ),
    "w8a8 token": (
        Int8WeightPerChannelFloat,
        {},
        Int8DynamicActPerRowFloat,
        "int-quantized",
        "channel",
    ),
    "w8a8 dynamic": (
        Int8WeightPerTensorFloat,
        {},
        Int8DynamicActPerTensorFloat,
        "int-quantized",
        "channel",
    ),
    "w4a8": (
        Int8WeightPerGroupFloat,
        {"bit_width": 4, "group_size": 32},
        Int8DynamicActPerRowFloat,
        "pack-quantized",
        "group",
    ),
    "fp8": (Fp8e4m3OCPWeightPerChannelFloat, {}, None, "float-quantized", "channel"),
    "fp8 static": (
        Fp8e4m3OCPWeightPerTensorFloat,
        {},
        Fp8e4m3OCPActPerTensorFloat,
        "float-quantized",
        "tensor",
    ),
    "fp8 token": (
        Fp8e4m3OCPWeightPerChannelFloat,
        {},
        Fp8e4m3OCPDynamicActPerRowFloat,
        "float-quantized",
        "channel",
    ),
    "mxfp4": (MXFloat4e2m1Weight, {}, None, "mxfp4-pack-quantized", "group"),
    "mxfp4 both": (MXFloat4e2m1Weight, {}, MXFloat4e2m1Act, "mxfp4-pack-quantized", "group"),
    "nvfp4": (NVFloat4Weight, {}, None, "nvfp4-pack-quantized", "tensor_group"),
}


def model_for(case: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    quantizer, keywords, given, *_ = CASES[case]
    torch.manual_seed(0)
    named = {f"weight_{n}": v for n, v in keywords.items()}
    layer = QuantLinear(96, 40, weight_quant=quantizer, input_quant=given, **named)
    model = nn.Sequential(layer, nn.Linear(40, 4)).to(dtype)
    with torch.no_grad():
        model.train()(torch.randn(3, 96).to(dtype))
    return model.eval()


def entries(folder, layer: str) -> dict[str, Tensor]:
    found = load_file(folder / "model.safetensors")
    return {n.removeprefix(f"{layer}."): t for n, t in found.items() if n.startswith(f"{layer}.")}


def rows_of(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Codes from words of 32 bits, bit after bit, as the layout says."""
    words = packed.to(torch.int64) & 0xFFFFFFFF
    single = ((words[..., None] >> torch.arange(32)) & 1).flatten(1)[:, : columns * bits]
    return (single.unflatten(1, (columns, bits)) << torch.arange(bits)).sum(2)


def by_hand(weights: dict[str, object], held: dict[str, Tensor], form: str) -> Tensor:
    """The values of a weight as a reader without the package makes them."""
    scale = held["weight_scale"]
    bits, size = int(weights["num_bits"]), weights["group_size"]
    if form in ("mxfp4-pack-quantized", "nvfp4-pack-quantized"):
        both = torch.stack((held["weight_packed"] & 15, held["weight_packed"] >> 4), 2).flatten(1)
        level = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[(both & 7).long()]
        level = torch.where(both >= 8, -level, level)
        if scale.dtype is torch.uint8:
            scale = torch.ones(scale.shape).ldexp(scale.int() - 127)
        else:
            scale = scale.float() / held["weight_global_scale"]
        return level * scale.repeat_interleave(int(size), 1)
    zero = torch.zeros_like(scale)
    if form == "pack-quantized":
        rows, columns = held["weight_shape"].tolist()
        codes = rows_of(held["weight_packed"], bits, columns) - 2 ** (bits - 1)
        if "weight_zero_point" in held:
            zero = rows_of(held["weight_zero_point"].t(), bits, rows).t() - 2.0 ** (bits - 1)
    else:
        codes = held["weight"].float()
        zero = held.get("weight_zero_point", zero).float()
    if size is not None:
        scale, zero = (t.repeat_interleave(int(size), 1) for t in (scale, zero))
    return (codes - zero) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_values_read_by_hand_are_those_of_the_weight(case, dtype, tmp_path) -> None:
    model = model_for(case, dtype)
    *_, form, strategy = CASES[case]
    config = export_compressed_tensors(model, tmp_path)
    assert config["format"] == form and config["ignore"] == ["1"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert weights["strategy"] == strategy
    value = by_hand(weights, entries(tmp_path, "0"), form)
    expected = model[0].quant_weight().value.detach()
    if form == "nvfp4-pack-quantized":
        value, expected = value.bfloat16(), expected.bfloat16()
    assert torch.equal(value.to(expected.dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_values_read_by_the_package_are_those_of_the_weight(case, dtype, tmp_path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    model = model_for(case, dtype)
    export_compressed_tensors(model, tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(said)
    (scheme,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    held = entries(tmp_path, "0")
    assert set(compressor.compression_param_names(scheme)) <= held.keys()
    value = compressor.decompress(held, scheme)["weight"]
    expected = model[0].quant_weight().value.detach()
    if value.dtype is torch.bfloat16:
        expected = expected.bfloat16()
    assert torch.equal(value.to(expected.dtype), expected)


def test_what_the_files_hold_beside_weights(tmp_path) -> None:
    model = model_for("w8a8 static")
    export_compressed_tensors(model, tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    assert sorted(held) == [
        "0.bias",
        "0.input_scale",
        "0.weight",
        "0.weight_scale",
        "1.bias",
        "1.weight",
    ]
    assert torch.equal(held["0.input_scale"][0], model[0].input_quant.scale())
    assert torch.equal(held["1.weight"], model[1].weight)
    given = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert given["quant_method"] == "compressed-tensors"
    assert given["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert given["config_groups"]["group_0"]["input_activations"]["dynamic"] is False


def test_a_shifted_input_has_a_signed_zero_point(tmp_path) -> None:
    model = model_for("w8a8 shifted")
    config = export_compressed_tensors(model, tmp_path)
    held = entries(tmp_path, "0")
    assert config["config_groups"]["group_0"]["input_activations"]["symmetric"] is False
    expected = model[0].input_quant.zero_point() - 128
    assert held["input_zero_point"].dtype is torch.int8
    assert held["input_zero_point"].item() == expected.item()


def test_several_layouts_are_a_mixed_precision(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        QuantLinear(32, 32, weight_quant=Int8WeightPerChannelFloat, weight_bit_width=4),
        QuantLinear(32, 32, weight_quant=Fp8e4m3OCPWeightPerChannelFloat),
        QuantLinear(32, 32, weight_quant=Int8WeightPerChannelFloat, weight_bit_width=4),
        QuantLinear(32, 4, weight_quant=None),
    )
    config = export_compressed_tensors(model, tmp_path)
    assert config["format"] == "mixed-precision" and config["ignore"] == ["3"]
    groups = config["config_groups"].values()
    assert [g["targets"] for g in groups] == [["0", "2"], ["1"]]
    assert [g["format"] for g in groups] == ["pack-quantized", "float-quantized"]


class Configured(nn.Module):
    class config:
        @staticmethod
        def to_dict() -> dict[str, object]:
            return {"model_type": "tiny", "hidden_size": 32}

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 32)
        self.proj = QuantLinear(32, 32, bias=False)
        self.head = nn.Linear(32, 10, bias=False)
        self.head.weight = self.embed.weight


def test_a_configuration_keeps_its_other_entries(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "architectures": ["Tiny"]}')
    export_compressed_tensors(Configured(), tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert (found["model_type"], found["hidden_size"], found["architectures"]) == (
        "tiny",
        64,
        ["Tiny"],
    )
    # what is tied is written once
    assert set(load_file(tmp_path / "model.safetensors")) == {
        "embed.weight",
        "proj.weight_packed",
        "proj.weight_scale",
        "proj.weight_shape",
    }


def linear(quantizer: object, **keywords: object) -> nn.Sequential:
    return nn.Sequential(QuantLinear(64, 32, weight_quant=quantizer, **keywords))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), "no linear layer has a quantized weight"),
        (
            lambda: linear(Int8WeightPerTensorFloat, weight_bit_width=16),
            "0.weight_quant: integers of 16 bits",
        ),
        (
            lambda: linear(NF4WeightPerTensorFloat),
            "CodebookQuantTensor has no layout; use integers",
        ),
        (lambda: linear(Fp8e5m2OCPWeightPerTensorFloat), "aren't FP8 E4M3"),
        (lambda: linear(MXFloat8e4m3Weight), "aren't E2M1"),
        (
            lambda: linear(Int8WeightPerGroupFloat, weight_group_size=48),
            "groups of 48 don't divide 64",
        ),
        (lambda: linear(Int8WeightPerGroupFloat, weight_group_dim=0), "use group_dim=1"),
        (
            lambda: linear(ShiftedUint8WeightPerTensorFloat, weight_quantize_zero_point=False),
            "zero point that isn't a whole number",
        ),
        (
            lambda: linear(Int8WeightPerTensorFloat, input_quant=Fp8e4m3OCPActPerTensorFloat),
            "one kind for both",
        ),
        (lambda: linear(NVFloat4Weight, input_quant=NVFloat4Act), "input"),
        (
            lambda: linear(
                Int8WeightPerTensorFloat, input_quant=Int8ActPerTensorFloat, bias_quant=Int16Bias
            ),
            "0.bias_quant: only weights and inputs of linear layers have a place",
        ),
        (lambda: nn.Sequential(QuantConv2d(1, 4, 3)), "a QuantConv2d has no layout"),
        (
            lambda: linear(
                Int8WeightPerTensorFloat, input_quant=Int8ActPerTensorFloat, input_bit_width=6
            ),
            "6 bits",
        ),
    ],
)
def test_what_has_no_place_is_refused(model, message, tmp_path) -> None:
    made = model()
    if isinstance(made[0], QuantLinear):
        with torch.no_grad():
            made.train()(torch.randn(3, 64))
    with pytest.raises(CheckpointError, match=message):
        export_compressed_tensors(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_input_that_saw_no_data_has_to_be_calibrated(tmp_path) -> None:
    model = linear(Int8WeightPerTensorFloat, input_quant=Int8ActPerTensorFloat)
    with pytest.raises(CheckpointError, match="seen no data"):
        export_compressed_tensors(model, tmp_path)


def test_all_obstacles_are_named_at_once(tmp_path) -> None:
    model = nn.Sequential(QuantConv2d(1, 4, 3), QuantReLU(), QuantIdentity(), QuantLinear(4, 4))
    with pytest.raises(CheckpointError) as caught:
        export_compressed_tensors(model, tmp_path)
    for name in ("0.weight_quant", "1.act_quant", "2.act_quant"):
        assert name in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_unsigned_integers_without_a_zero_point_are_shifted(tmp_path) -> None:
    torch.manual_seed(0)
    model = linear(Int8WeightPerTensorFloat, weight_signed=False)
    with torch.no_grad():
        model[0].weight.abs_()
    config = export_compressed_tensors(model, tmp_path)
    weights = config["config_groups"]["group_0"]["weights"]
    value = by_hand(weights, entries(tmp_path, "0"), "pack-quantized")
    assert weights["symmetric"] is False
    assert torch.equal(value, model[0].quant_weight().value)


def test_exporting_changes_nothing(tmp_path) -> None:
    model = model_for("w8a8 token").train()
    modes = [m.training for m in model.modules()]
    state = {n: t.clone() for n, t in model.state_dict().items()}
    export_compressed_tensors(model, tmp_path)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["packed", "fp8"])
def test_a_language_model_is_read_by_transformers(name, tmp_path) -> None:
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    from qframework.graph import Rule, quantize_model

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    keywords = {
        "packed": {
            "weight_quant": Int8WeightPerGroupFloat,
            "weight_bit_width": 4,
            "weight_group_size": 32,
        },
        "fp8": {"weight_quant": Fp8e4m3OCPWeightPerChannelFloat},
    }[name]
    rules = [Rule(n, keep_float=True) for n in ("*embed_tokens", "lm_head", "*act_fn")]
    quantized, _ = quantize_model(model, rules=rules, **keywords)
    said = export_compressed_tensors(quantized.eval(), tmp_path)
    assert said["ignore"] == ["lm_head"]
    tokens = torch.randint(128, (1, 9))
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(read(tokens).logits, quantized(tokens).logits)
