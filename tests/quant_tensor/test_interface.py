import copy
import io
import pickle

import numpy as np
import pytest
import torch

from qframework.quant_tensor import IntQuantTensor


def make(shape=(2, 3, 4, 4), bits: float = 8.0, signed: bool = True, scale=0.05) -> IntQuantTensor:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-100 if signed else 0, 100, shape, generator=generator).float()
    scale = torch.as_tensor(scale)
    return IntQuantTensor(q * scale, scale, 0.0, bits, signed)


def test_numbers_become_tensors() -> None:
    q = IntQuantTensor(torch.zeros(2), 0.1, 3, 8, True)
    for part in (q.scale, q.zero_point, q.bit_width):
        assert isinstance(part, torch.Tensor)
        assert part.dtype == torch.float32
    assert q.training is False


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"scale": 0.0}, ValueError, "scale must be positive"),
        ({"scale": -1.0}, ValueError, "scale must be positive"),
        ({"scale": float("nan")}, ValueError, "scale must be positive"),
        ({"scale": float("inf")}, ValueError, "scale must be positive and finite"),
        ({"scale": torch.ones(5)}, ValueError, r"scale of shape \(5,\) doesn't broadcast"),
        ({"zero_point": torch.ones(4, 3)}, ValueError, "zero_point of shape"),
        ({"zero_point": float("nan")}, ValueError, "zero_point must be finite"),
        ({"bit_width": 0}, ValueError, "bit_width must be at least 1"),
        ({"bit_width": "8"}, TypeError, "bit_width must be a number"),
        ({"signed": "yes"}, TypeError, "signed must be True or False"),
        (
            {"value": torch.zeros(2, 3, dtype=torch.int8)},
            TypeError,
            "floating-point tensor.*torch.int8",
        ),
        ({"value": [1.0]}, TypeError, "floating-point tensor.*list"),
    ],
)
def test_nonsense_is_refused(fields, error, message) -> None:
    good = {
        "value": torch.zeros(2, 3),
        "scale": 0.1,
        "zero_point": 0.0,
        "bit_width": 8,
        "signed": True,
    }
    with pytest.raises(error, match=message):
        IntQuantTensor(**{**good, **fields})


def test_it_looks_like_a_tensor() -> None:
    q = make()
    assert q.shape == (2, 3, 4, 4)
    assert (q.dtype, q.ndim, q.dim(), q.numel(), q.device.type) == (torch.float32, 4, 4, 96, "cpu")
    assert q.size(1) == 3
    assert len(q) == 2
    assert q.requires_grad is False
    assert [type(part) for part in q] == [IntQuantTensor, IntQuantTensor]
    assert torch.equal(q[0].value, q.value[0])
    assert torch.equal(q == q, torch.ones(2, 3, 4, 4, dtype=torch.bool))
    assert torch.equal(q > 0.1, q.value > 0.1)
    assert torch.equal(q > 0.1, q.value > 0.1)
    assert hash(q) == id(q)
    with pytest.raises(RuntimeError, match="ambiguous"):
        bool(q)
    assert torch.equal(q.tanh(), q.value.tanh())
    assert torch.equal(torch.tanh(q), q.value.tanh())
    assert q.sum().item() == q.value.sum().item()
    assert torch.equal(q**2, q.value**2)
    assert np.asarray(q).shape == (2, 3, 4, 4)
    assert not isinstance(q, tuple)
    with pytest.raises(AttributeError, match=r"neither has torch\.Tensor"):
        _ = q.no_such_thing


def test_it_does_not_change() -> None:
    q = make()
    for change in (lambda: q.mul_(2), lambda: q.clamp_(0), lambda: q.zero_()):
        with pytest.raises(TypeError, match="would change values under their scale"):
            change()
    assert torch.nn.ReLU(inplace=True)(q) is not q
    assert q.is_valid
    with pytest.raises(AttributeError, match=r"q.set\(scale=...\)"):
        q.scale = 3
    assert q.set(signed=False).signed is False
    with pytest.raises(TypeError, match="Did you mean 'scale'"):
        q.set(scael=1)


def test_conversion_keeps_metadata_wide_and_flags_bool() -> None:
    q = make()
    half = q.half()
    assert (half.dtype, half.scale.dtype, half.signed, half.training) == (
        torch.float16,
        torch.float32,
        True,
        False,
    )
    assert half.is_valid
    assert q.to(torch.float64).value.dtype == torch.float64
    assert q.to("meta").scale.is_meta
    assert q.cpu().is_valid


def test_parts_on_different_devices_are_reported() -> None:
    q = make().set(scale=torch.ones((), device="meta"))
    with pytest.raises(RuntimeError, match="scale on meta"):
        _ = q.device


def test_detach_and_clone() -> None:
    value = torch.ones(3, requires_grad=True)
    q = IntQuantTensor.unchecked(
        value * 2, torch.ones(()), torch.zeros(()), torch.tensor(8.0), True, False
    )
    assert q.requires_grad
    assert not q.detach().requires_grad
    assert q.clone().value is not q.value


def test_copies_pickles_and_saves() -> None:
    q = make()
    buffer = io.BytesIO()
    torch.save(q, buffer)
    buffer.seek(0)
    for again in (
        copy.deepcopy(q),
        pickle.loads(pickle.dumps(q)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(again.value, q.value)
        assert (again.signed, again.is_valid) == (True, True)


def test_printed_form_names_the_fields() -> None:
    text = repr(make((1,)))
    for part in (
        "IntQuantTensor(value=tensor(",
        "scale=",
        "zero_point=",
        "bit_width=",
        "signed=True",
        "training=False",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("bits", "signed", "top", "dtype"),
    [
        (8, True, 100, torch.int8),
        (8, False, 200, torch.uint8),
        (16, True, 30000, torch.int32),
        (16, False, 60000, torch.int32),
        (33, True, 2**31 - 1, torch.int32),
        (33, True, 2**31, torch.int64),
        (32, False, 2**32 - 1, torch.int64),
    ],
)
def test_integers_come_in_the_type_that_holds_them(bits, signed, top, dtype) -> None:
    q = IntQuantTensor(torch.tensor([0.0, float(top)], dtype=torch.float64), 1.0, 0.0, bits, signed)
    assert q.int().dtype == dtype
    assert q.int().tolist() == [0, top]
    assert q.int(float_datatype=True).is_floating_point()


def test_off_grid_and_out_of_range_are_not_valid() -> None:
    q = make()
    assert q.is_valid
    off = q.set(value=q.value + 0.02)
    assert not off.is_valid
    with pytest.raises(
        RuntimeError, match=r"up to 0\.4 away from an integer; allowed are signed integers of 8"
    ):
        off.int()
    assert not q.set(bit_width=torch.tensor(4.0)).is_valid
    assert IntQuantTensor(torch.zeros(0), 1.0, 0.0, 4, True).is_valid


def test_nothing_changes_it_in_place() -> None:
    q = make()
    before = q.value.clone()
    with pytest.raises(TypeError, match=r"IntQuantTensor.add_\(\) would change values"):
        q.add_(1)
    with pytest.raises(TypeError, match="use the form without the underscore"):
        torch.relu_(q)
    assert not hasattr(q, "add_")
    with pytest.raises(TypeError, match="doesn't change"):
        q[0] = 1.0
    for function in (torch.nn.functional.hardtanh, torch.nn.functional.silu):
        function(q, inplace=True)
    plain = torch.ones(2, 3, 4, 4)
    plain += q  # a tensor may change by a quantized one
    assert torch.equal(plain, q.value + 1)
    assert torch.equal(q.value, before)


def test_methods_in_place_that_move_no_value_return_the_tensor_itself() -> None:
    scale = torch.nn.Parameter(torch.tensor(0.5))
    q = IntQuantTensor.unchecked(
        torch.ones(3) * scale, scale, torch.zeros(()), torch.tensor(8.0), True, False
    )
    assert q.detach_() is q
    assert not q.requires_grad
    assert not q.scale.requires_grad
    assert scale.requires_grad
    assert q.requires_grad_() is q
    assert q.requires_grad


def test_integer_types_and_layouts_convert_as_those_of_tensors() -> None:
    q = make()
    assert type(q.to(torch.int8)) is torch.Tensor
    assert q.to(q.value.double()).dtype == q.to(q.double()).dtype == torch.float64
    assert q.contiguous(memory_format=torch.channels_last).value.is_contiguous(
        memory_format=torch.channels_last
    )
    assert int(make((1,))) == int(make((1,)).value)


def test_files_are_loaded_without_trusting_them() -> None:
    buffer = io.BytesIO()
    torch.save({"x": make().set(source=object())}, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True)["x"].is_valid


def test_wide_integers_are_not_rounded_to_a_narrow_scale_type() -> None:
    q = IntQuantTensor(torch.tensor([1001.0]), torch.tensor(1.0, dtype=torch.bfloat16), 0, 12, True)
    assert q.int(float_datatype=True).tolist() == [1001]


def test_metadata_of_one_number_has_no_more_axes_than_the_value() -> None:
    q = IntQuantTensor(torch.zeros(3), torch.ones(1, 1, 1), np.float32(0), np.int64(8), True)
    assert q.int().shape == (3,)
    with pytest.raises(TypeError, match="signed must be True or False"):
        IntQuantTensor(torch.zeros(3), 1.0, 0, 8, torch.ones(2))
