"""Files that are truncated, changed, hostile or of another model are refused, and the model stays as it was."""

import copy
import json
import pickle
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

from qframework.export import CheckpointError, load_quantized, save_quantized
from qframework.export.recipe import checksum_of
from qframework.layers import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU
from qframework.quantizers import (
    Fp8e4m3OCPWeightPerChannelFloat,
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFloat,
)

X = torch.linspace(-1, 1, 36).reshape(1, 1, 6, 6)


class Own(Int8WeightPerChannelFloat):
    bit_width = 4


def floats() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Identity(), nn.Flatten(), nn.Linear(48, 4)
    ).eval()


@cache
def files() -> tuple[bytes, bytes]:
    """Tensors and recipe of a small network."""
    torch.manual_seed(0)
    model = nn.Sequential(
        QuantConv2d(1, 3, 3, weight_quant=Own),
        QuantReLU(),
        QuantIdentity(),
        nn.Flatten(),
        QuantLinear(
            48, 4, weight_quant=Fp8e4m3OCPWeightPerChannelFloat, input_quant=Int8ActPerTensorFloat
        ),
    )
    with torch.no_grad():
        model.train()(X)
    with TemporaryDirectory() as place:
        save_quantized(model, place)
        return tuple((Path(place) / n).read_bytes() for n in ("model.safetensors", "recipe.json"))  # type: ignore[return-value]


def put(folder: Path, tensors: bytes, recipe: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(tensors)
    (folder / "recipe.json").write_bytes(recipe)
    return folder


def signed(data: dict[str, object], tensors: bytes | None = None) -> bytes:
    """A recipe whose checksum is right, as somebody writes one who means harm."""
    import hashlib

    if tensors is not None:
        data = {**data, "sha256": hashlib.sha256(tensors).hexdigest()}
    return json.dumps({**data, "checksum": checksum_of(data)}).encode()


def state(model: nn.Module) -> tuple[list[tuple[str, type, int]], dict[str, Tensor]]:
    modules = [(n, type(m), id(m)) for n, m in model.named_modules()]
    return modules, copy.deepcopy(model.state_dict())


def refused(folder: Path, model: nn.Module) -> str:
    """The message of the error, after which the model is what it was."""
    modules, tensors = state(model)
    parameters = list(model.parameters())
    with pytest.raises(CheckpointError) as caught:
        load_quantized(folder, model)
    after, now = state(model)
    assert after == modules
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert tensors.keys() == now.keys()
    assert all(torch.equal(t, now[n]) for n, t in tensors.items())
    return str(caught.value)


def test_the_files_themselves_load(tmp_path) -> None:
    model = load_quantized(put(tmp_path, *files()), floats())
    assert isinstance(model[0], QuantConv2d)


@given(st.data())
def test_truncated_files_are_refused(data) -> None:
    tensors, recipe = files()
    if data.draw(st.booleans()):
        tensors = tensors[: data.draw(st.integers(0, len(tensors) - 1))]
    else:
        recipe = recipe[: data.draw(st.integers(0, len(recipe) - 1))]
    with TemporaryDirectory() as place:
        refused(put(Path(place), tensors, recipe), floats())


@given(st.data())
def test_changed_bytes_are_refused(data) -> None:
    parts = [bytearray(p) for p in files()]
    which = data.draw(st.integers(0, 1))
    at = data.draw(st.integers(0, len(parts[which]) - 1))
    before = parts[which][at]
    parts[which][at] ^= data.draw(st.integers(1, 255))
    blank = (ord(" "), ord("\n"), ord("\t"), ord("\r"))
    if which and before in blank and parts[which][at] in blank:
        return  # the same recipe, written otherwise
    with TemporaryDirectory() as place:
        refused(put(Path(place), *map(bytes, parts)), floats())


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["", "0", "0.weight", "bit_width", "QuantLinear", "class", "a.b.c", "..."])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["of", "own", "tuple", "enum", "class", "x"]), inner, max_size=2
        )
    ),
    max_leaves=5,
)


def places(data: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    found = [path] if path else []
    items = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
    for key, value in items:
        found += places(value, (*path, key))
    return found


def hostile(data) -> dict[str, object]:
    """The recipe with something else somewhere."""
    recipe = json.loads(files()[1])
    at = data.draw(st.sampled_from(places(recipe)))
    holder = recipe
    for key in at[:-1]:
        holder = holder[key]
    if data.draw(st.integers(0, 3)) == 0:
        del holder[at[-1]]
    else:
        holder[at[-1]] = data.draw(JSON)
    return recipe  # type: ignore[no-any-return]


@given(st.data())
def test_hostile_recipes_are_refused_or_make_a_model(data) -> None:
    """Nothing but CheckpointError comes out, and it leaves the model alone."""
    recipe = hostile(data)
    with TemporaryDirectory() as place:
        folder = put(Path(place), files()[0], signed(recipe))
        model = floats()
        modules, tensors = state(model)
        try:
            load_quantized(folder, model)
        except CheckpointError:
            after, now = state(model)
            assert after == modules
            assert all(torch.equal(t, now[n]) for n, t in tensors.items())


@given(st.data())
def test_hostile_tensors_are_refused_or_make_a_model(data) -> None:
    tensors, recipe = load(files()[0]), json.loads(files()[1])
    name = data.draw(st.sampled_from(sorted(tensors)))
    old = tensors[name]
    kind = data.draw(
        st.sampled_from(["gone", "other", "shape", "dtype", "nan", "zero", "huge", "bits"])
    )
    made = {
        "gone": None,
        "other": None,
        "shape": old.reshape(-1)[:-1].contiguous(),
        "dtype": old.to(torch.float64 if old.dtype is not torch.float64 else torch.int8),
        "nan": torch.full_like(old, float("nan")) if old.is_floating_point() else old + 1,
        "zero": torch.zeros_like(old),
        "huge": torch.full_like(old, torch.finfo(old.dtype).max)
        if old.is_floating_point()
        else old - 1,
        "bits": old ^ 255 if old.dtype is torch.uint8 else -old,
    }[kind]
    if kind in ("gone", "other"):
        del tensors[name]
    if kind == "other":
        made, name = old, name + "x"
    if made is not None:
        tensors[name] = made
    content = save(tensors)
    with TemporaryDirectory() as place:
        folder = put(Path(place), content, signed(recipe, content))
        model = floats()
        modules, before = state(model)
        try:
            load_quantized(folder, model)
        except CheckpointError:
            after, now = state(model)
            assert after == modules
            assert all(torch.equal(t, now[n]) for n, t in before.items())
        else:
            assert kind not in ("gone", "other", "shape", "dtype")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.Conv2d(1, 3, 3)), "the model has no module"),
        (
            lambda: nn.Sequential(*floats()[:4], nn.Linear(48, 5)),
            r"4 \(QuantLinear\): out_features is 4 in the checkpoint, 5 in the model",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 3, 5), *floats()[1:]),
            r"kernel_size is \(3, 3\) in the checkpoint, \(5, 5\) in the model",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.Sigmoid(), *floats()[2:]),
            "1: the checkpoint has a QuantReLU here, the model a Sigmoid, which it can't stand for",
        ),
        (lambda: floats().to(torch.float64), r"float64.*in the model"),
        (
            lambda: nn.Sequential(*floats(), nn.Linear(4, 4)),
            "the checkpoint has no '5.weight', which the model has",
        ),
        (
            lambda: nn.Sequential(*floats(), QuantIdentity()),
            "5 is a QuantIdentity, and in the checkpoint it isn't quantized",
        ),
        (
            lambda: nn.Sequential(QuantLinear(1, 3), *floats()[1:]),
            "0: the checkpoint has a QuantConv2d here, the model a QuantLinear",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), *floats()[1:4], nn.Linear(48, 4)),
            None,
        ),
    ],
)
def test_other_models_are_refused(model, message, tmp_path) -> None:
    put(tmp_path, *files())
    if message is None:  # a bias that the model lacks is made
        load_quantized(tmp_path, model())
        return
    text = refused(tmp_path, model())
    import re

    assert re.search(message, text, re.DOTALL), text
    assert len(text) < 1500


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version '2'; this release reads version 1"),
        ({"version": True}, "has version 'True'"),
        ({"format": "other"}, "isn't one of qframework"),
        ({"surprise": 1}, "wrong at surprise"),
        ({"quantizers": [{}]}, r"wrong at quantizers\.0\.places"),
    ],
)
def test_other_recipes_are_refused(change, message, tmp_path) -> None:
    tensors, recipe = files()
    put(tmp_path, tensors, signed({**json.loads(recipe), **change}))
    with pytest.raises(CheckpointError, match=message):
        load_quantized(tmp_path, floats())


def quantizer_of(recipe: dict, place: str) -> dict:
    return next(q for q in recipe["quantizers"] if place in q["places"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"of": "os.system"}, "there is no quantizer 'os.system'"),
        ({"of": "annotations"}, "there is no quantizer"),
        ({"own": "Unknown"}, r"load_quantized\(\.\.\., own=\[Unknown\]\)"),
        (
            {"name": "A", "bases": [{"of": "Int8WeightPerTensorFloat"}], "binds": {"__class__": 1}},
            "no name",
        ),
        ({"name": "A", "bases": [], "binds": {}}, "derived from nothing"),
        (
            {
                "name": "A",
                "bases": [{"of": "Int8WeightPerTensorFloat"}],
                "binds": {"tensor_quant": {"class": "subprocess:Popen"}},
            },
            "no value",
        ),
        (
            {
                "name": "A",
                "bases": [{"of": "Int8WeightPerTensorFloat"}],
                "binds": {"mse_iters": 10**12},
            },
            "out of range",
        ),
        ({"of": "Int8ActPerTensorFloat"}, "quantizes another kind of tensor"),
        (
            {
                "name": "A",
                "bases": [{"of": "Int8WeightPerTensorFloat"}],
                "binds": {"bit_width": 99},
            },
            "bit_width=99",
        ),
    ],
)
def test_quantizers_that_are_no_data_of_ours_are_refused(data, message, tmp_path) -> None:
    tensors, text = files()
    recipe = json.loads(text)
    quantizer_of(recipe, "0.weight_quant")["quantizer"] = data
    put(tmp_path, tensors, signed(recipe))
    import re

    assert re.search(message, refused(tmp_path, floats()))


def test_values_nested_without_end_are_refused(tmp_path) -> None:
    tensors, text = files()
    put(tmp_path, tensors, b"[" * 100_000)
    refused(tmp_path, floats())
    recipe = json.loads(text)
    deep: object = 1
    for _ in range(60):
        deep = {"list": [deep]}
    quantizer_of(recipe, "0.weight_quant")["overrides"] = {"bit_width": deep}
    put(tmp_path, tensors, signed(recipe))
    assert "without end" in refused(tmp_path, floats())


def test_a_quantizer_that_makes_other_codes_is_refused(tmp_path) -> None:
    tensors, text = files()
    recipe = json.loads(text)
    quantizer_of(recipe, "0.weight_quant")["overrides"] = {"bit_width": 2}
    put(tmp_path, tensors, signed(recipe))
    assert "0.weight: its quantizer doesn't give" in refused(tmp_path, floats())


def test_a_kept_scale_of_another_shape_is_refused(tmp_path) -> None:
    content, recipe = load(files()[0]), json.loads(files()[1])
    name = quantizer_of(recipe, "0.weight_quant")["kept"]["scaling_impl"]
    content[name] = content[name].reshape(1, 3, 1, 1, 1).repeat(2, 1, 1, 1, 1)
    tensors = save(content)
    put(tmp_path, tensors, signed(recipe, tensors))
    refused(tmp_path, floats())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 0.0])
def test_scales_that_cannot_be_are_refused(wrong, tmp_path) -> None:
    content, recipe = load(files()[0]), json.loads(files()[1])
    name = quantizer_of(recipe, "4.weight_quant")["kept"]["scaling_impl"]
    content[name] = torch.full_like(content[name], wrong)
    tensors = save(content)
    put(tmp_path, tensors, signed(recipe, tensors))
    assert "finite numbers other than 0" in refused(tmp_path, floats())


def test_the_recipe_of_another_checkpoint_is_refused(tmp_path) -> None:
    save_quantized(QuantLinear(4, 4, weight_quant=Int8WeightPerTensorFloat), tmp_path)
    (tmp_path / "recipe.json").write_bytes(files()[1])
    with pytest.raises(CheckpointError, match="not the file that the recipe was written for"):
        load_quantized(tmp_path, floats())


def test_a_folder_without_a_checkpoint_is_told(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint, it has no recipe\.json"):
        load_quantized(tmp_path, floats())
    (tmp_path / "recipe.json").write_bytes(files()[1])
    with pytest.raises(FileNotFoundError, match=r"it has no model\.safetensors"):
        load_quantized(tmp_path, floats())


def test_pickles_are_not_opened(tmp_path) -> None:
    opened = []

    class Trap:
        def __reduce__(self):
            return opened.append, (1,)

    put(tmp_path, pickle.dumps(Trap()), pickle.dumps(Trap()))
    refused(tmp_path, floats())
    content = pickle.dumps(Trap())
    put(tmp_path, content, signed(json.loads(files()[1]), content))
    refused(tmp_path, floats())
    assert not opened


def test_a_quantized_model_that_refuses_a_checkpoint_is_what_it_was(tmp_path) -> None:
    content, recipe = load(files()[0]), json.loads(files()[1])
    recipe["quantizers"][-1]["state"]["surprise"] = next(iter(content))
    put(tmp_path, files()[0], signed(recipe))
    model = load_quantized(put(tmp_path / "right", *files()), floats())
    expected = model(X)
    refused(tmp_path, model)
    assert torch.equal(model(X), expected)


def test_a_save_that_fails_leaves_the_checkpoint_of_before(tmp_path, monkeypatch) -> None:
    put(tmp_path, *files())
    import os

    def fail(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        save_quantized(QuantLinear(4, 4), tmp_path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "recipe.json"]
    load_quantized(tmp_path, floats())
