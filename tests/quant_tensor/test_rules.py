"""What torch functions do to quantized tensors, against the same function on exact integers."""

import pytest
import torch
from exact_tensors import integers, make, per_channel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from qframework.quant_tensor import IntQuantTensor
from qframework.quant_tensor.rules_linear import accumulator_bits

MOVES = [
    ("reshape", lambda x: x.reshape(6, 4, 2)),
    ("view", lambda x: x.view(2, 3, 8)),
    ("flatten", lambda x: torch.flatten(x, 1)),
    ("flatten all", lambda x: x.flatten()),
    ("permute", lambda x: x.permute(2, 0, 3, 1)),
    ("transpose", lambda x: torch.transpose(x, 1, 3)),
    ("movedim", lambda x: torch.movedim(x, 1, -1)),
    ("unsqueeze", lambda x: x.unsqueeze(1)),
    ("squeeze", lambda x: x[:, :, :1].squeeze(2)),
    ("squeeze all", lambda x: x[:1].squeeze()),
    ("mT", lambda x: x.mT),
    ("index", lambda x: x[:, 1]),
    ("slice", lambda x: x[..., 1:3]),
    ("fancy index", lambda x: x[:, [0, 2]]),
    ("mask", lambda x: x[:, torch.tensor([True, False, True])]),
    ("expand", lambda x: x[:, :, :1].expand(2, 3, 5, 2)),
    ("repeat", lambda x: x.repeat(1, 2, 1, 1)),
    ("flip", lambda x: torch.flip(x, (1,))),
    ("roll", lambda x: torch.roll(x, 1, 1)),
    ("narrow", lambda x: x.narrow(1, 1, 2)),
    ("select", lambda x: x.select(1, 2)),
    ("index_select", lambda x: torch.index_select(x, 1, torch.tensor([2, 0]))),
    ("chunk", lambda x: torch.chunk(x, 3, 1)[1]),
    ("split", lambda x: x.split(2, 1)[1]),
    ("unbind", lambda x: x.unbind(1)[2]),
    ("pad", lambda x: F.pad(x, (1, 2, 0, 1))),
    ("pad reflect", lambda x: F.pad(x, (1, 0, 0, 1), mode="reflect")),
    ("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2)),
    ("max_pool2d", lambda x: F.max_pool2d(x, 2)),
    ("adaptive_max_pool2d", lambda x: F.adaptive_max_pool2d(x, 1)),
    ("relu", lambda x: torch.relu(x)),
    ("F.relu", lambda x: F.relu(x)),
    ("method relu", lambda x: x.relu()),
    ("nearest", lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest")),
    ("nearest-exact", lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest-exact")),
    ("dropout off", lambda x: F.dropout(x, 0.5, training=False)),
    ("cat", lambda x: torch.cat([x, x], 1)),
    ("stack", lambda x: torch.stack([x, x], 1)),
]


@pytest.mark.parametrize("channels", [None, 1, 3], ids=["per tensor", "per channel", "per column"])
@pytest.mark.parametrize(("name", "move"), MOVES, ids=[m[0] for m in MOVES])
def test_functions_that_keep_a_grid_do_to_the_integers_what_they_do_to_the_values(
    name, move, channels
) -> None:
    shape = (2, 3, 4, 2)
    q = make(shape, scale=0.125 if channels is None else per_channel(shape, channels))
    result = move(q)
    assert torch.equal(torch.as_tensor(getattr(result, "value", result)), move(q.value))
    if isinstance(result, IntQuantTensor):
        assert torch.equal(integers(result), move(integers(q)))
        assert (result.bit_width, result.signed) == (q.bit_width, q.signed)
    else:  # a window over several scales, or a pattern that mixes them
        assert channels == 3
        assert name in ("max_pool2d", "adaptive_max_pool2d", "nearest", "nearest-exact")


def test_max_pooling_returns_its_indices() -> None:
    q = make((1, 2, 4, 4))
    pooled, where = F.max_pool2d(q, 2, return_indices=True)
    expected, places = F.max_pool2d(q.value, 2, return_indices=True)
    assert torch.equal(pooled.value, expected)
    assert torch.equal(where, places)


@pytest.mark.parametrize(
    "function",
    [
        torch.tanh,
        torch.sigmoid,
        lambda x: F.leaky_relu(x, 0.1),
        lambda x: F.pad(x, (1, 1), value=0.033),
        lambda x: F.dropout(x, 0.5, training=True),
        lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
        lambda x: x.std(),
        lambda x: F.batch_norm(x, torch.zeros(3), torch.ones(3)),
    ],
)
def test_functions_that_leave_the_grid_give_floats(function) -> None:
    q = make((1, 3, 4, 4)).float()
    torch.manual_seed(0)
    result = function(q)
    torch.manual_seed(0)
    assert type(result) is torch.Tensor
    assert torch.equal(result, function(q.value))


def test_a_zero_point_that_is_no_integer_has_no_zero_on_the_grid() -> None:
    q = make((1, 3, 4, 4)) + 0.03
    assert type(F.relu(q)) is torch.Tensor
    assert type(F.pad(q, (1, 1))) is torch.Tensor


def test_shifted_integers_go_through_relu_and_padding() -> None:
    q = make((1, 3, 4, 4), signed=False, zero=7.0)
    assert torch.equal(F.relu(q).int(), q.int().clamp(min=7))
    assert torch.equal(F.pad(q, (1, 1)).int(), F.pad(q.int(), (1, 1), value=7))


def test_tensors_of_different_signs_are_not_joined() -> None:
    with pytest.raises(RuntimeError, match="signed and unsigned"):
        torch.cat([make((2, 2)), make((2, 2), signed=False)])
    joined = torch.cat([make((2, 2)), torch.zeros(2, 2, dtype=torch.float64)])
    assert type(joined) is torch.Tensor


CONVOLUTIONS = [
    (F.linear, (2, 6), (4, 6), {}),
    (F.linear, (6,), (4, 6), {}),
    (F.linear, (2, 3, 6), (4, 6), {}),
    (F.conv1d, (2, 4, 9), (6, 4, 3), {"stride": 2, "padding": 1}),
    (F.conv1d, (4, 9), (6, 2, 3), {"groups": 2}),
    (F.conv2d, (1, 4, 5, 5), (6, 2, 3, 3), {"groups": 2, "padding": 1}),
    (F.conv3d, (1, 2, 4, 4, 4), (3, 2, 2, 2, 2), {}),
    (F.conv_transpose1d, (1, 3, 5), (3, 4, 3), {"stride": 2}),
    (F.conv_transpose2d, (1, 3, 4, 4), (3, 4, 3, 3), {"stride": 2, "dilation": 2}),
    (F.conv_transpose2d, (1, 3, 4, 4), (3, 4, 3, 3), {}),
]


@pytest.mark.parametrize("channelwise", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize(("function", "shape", "weight_shape", "options"), CONVOLUTIONS)
def test_sums_of_products_are_exact_and_fit_their_accumulator(
    function, shape, weight_shape, options, channelwise
) -> None:
    transposed = "transpose" in function.__name__
    axis = 1 if transposed else 0
    scale = per_channel(weight_shape, axis) if channelwise else 0.5
    for signed in (True, False):
        # the worst case: every product as large as it can be
        x = make(shape, 4, signed)
        top = -8.0 if signed else 15.0
        x = x.set(value=torch.full(shape, top, dtype=torch.float64) * x.scale)
        w = make(weight_shape, 3, True, scale)
        w = w.set(value=torch.full(weight_shape, -4.0, dtype=torch.float64) * w.scale)
        out = function(x, w, **options)
        assert isinstance(out, IntQuantTensor)
        expected = function(integers(x), integers(w), **options)
        assert torch.equal(integers(out), expected)
        assert out.symmetric
        assert (out.scale.dim() == 0) == (not channelwise)


@pytest.mark.parametrize("kind", ["float", "on scale", "own scale"])
def test_biases(kind) -> None:
    x, w = make((2, 6), 4), make((3, 6), 4, scale=per_channel((3, 6), 0))
    accumulator = (w.scale * x.scale).flatten()
    plain = F.linear(x, w)
    if kind == "float":
        bias = torch.tensor([0.3, -0.7, 0.11], dtype=torch.float64)
        out = F.linear(x, w, bias)
        assert out.bit_width == plain.bit_width
    else:
        scale = accumulator if kind == "on scale" else torch.tensor(0.3, dtype=torch.float64)
        q = torch.tensor([5.0, -3.0, 7.0], dtype=torch.float64)
        bias = IntQuantTensor(q * scale, scale, 0.0, 4.0, True)
        out = F.linear(x, w, bias)
        assert out.bit_width == plain.bit_width + 1
    assert out.symmetric == (kind == "on scale")
    assert torch.equal(out.value, F.linear(x.value, w.value, getattr(bias, "value", bias)))
    assert out.is_valid
    if kind == "on scale":
        assert torch.equal(
            integers(out), F.linear(integers(x), integers(w)) + torch.tensor([5, -3, 7])
        )
    else:
        assert torch.equal(integers(out), integers(plain))


def test_depthwise_convolutions_accept_a_scale_per_input_channel() -> None:
    x = make((1, 3, 4, 4), 4, scale=per_channel((1, 3, 4, 4), 1))
    w = make((6, 1, 3, 3), 4)
    out = F.conv2d(x, w, groups=3)
    assert torch.equal(integers(out), F.conv2d(integers(x), integers(w), groups=3))
    full = F.conv2d(x, make((2, 3, 3, 3), 4))
    assert type(full) is torch.Tensor  # different scales in one sum


def test_a_weight_scale_along_its_inputs_makes_a_float_product() -> None:
    x = make((2, 3), 4)
    for scale in (per_channel((3, 3), 1), torch.tensor([0.5, 0.25, 0.125])):
        w = make((3, 3), 4, scale=scale)
        out = F.linear(x, w)
        assert type(out) is torch.Tensor
        assert torch.equal(out, F.linear(x.value, w.value))


def test_zero_points_make_products_floats() -> None:
    x = make((2, 6), 4, signed=False, zero=3.0)
    assert type(F.linear(x, make((3, 6)))) is torch.Tensor
    assert type(F.linear(make((2, 6)), torch.zeros(3, 6, dtype=torch.float64))) is torch.Tensor


def test_matrix_products() -> None:
    a, b = make((2, 3, 6), 4), make((2, 6, 5), 4, seed=1)
    for out in (a @ b, torch.matmul(a, b), torch.bmm(a, b)):
        assert torch.equal(integers(out), integers(a) @ integers(b))


@pytest.mark.parametrize("zero", [0.0, 3.0])
@pytest.mark.parametrize(("bits", "signed"), [(4, False), (2, True), (8, True)])
@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"divisor_override": 5}])
def test_average_pooling_divides_the_scale(options, bits, signed, zero) -> None:
    zero = min(zero, 1.0) if bits == 2 else zero
    q = make((1, 2, 6, 6), bits, signed=signed, zero=zero)
    q = (
        q.set(value=(torch.full((1, 2, 6, 6), -(2.0 ** (bits - 1))) - zero) * q.scale)
        if signed
        else q
    )
    out = F.avg_pool2d(q, 3, **options)
    assert out.is_valid
    padded = F.pad(integers(q), (options.get("padding", 0),) * 4, value=zero)
    assert torch.equal(integers(out), F.avg_pool2d(padded, 3, divisor_override=1, stride=3))
    whole = F.adaptive_avg_pool2d(q, 2)
    assert torch.equal(integers(whole), F.avg_pool2d(integers(q), 3, divisor_override=1))
    assert type(F.adaptive_avg_pool2d(q, 4)) is torch.Tensor


def test_windows_of_unequal_size_are_floats() -> None:
    q = make((1, 2, 5, 5))
    for options in ({"padding": 1, "count_include_pad": False}, {"ceil_mode": True}):
        assert type(F.avg_pool2d(q, 2, **options)) is torch.Tensor


def test_equal_zero_points_stay_one_number() -> None:
    joined = torch.cat(
        [make((2, 3), 4, signed=False, zero=7.0), make((2, 3), 4, signed=False, zero=7.0, seed=1)]
    )
    assert joined.is_valid
    assert joined.zero_point.numel() == 1


def test_padding_keeps_scales_per_channel_small() -> None:
    q = make((2, 3, 4, 4), scale=per_channel((2, 3, 4, 4), 1))
    assert F.pad(q, (1, 1, 1, 1)).scale.shape == (1, 3, 1, 1)


def test_embedding_takes_rows() -> None:
    table, rows = make((5, 3), 4), torch.tensor([[0, 4], [2, 2]])
    assert torch.equal(integers(F.embedding(rows, table)), integers(table)[rows])
    with pytest.raises(RuntimeError, match="one scale"):
        F.embedding(rows, make((5, 3), 4, scale=per_channel((5, 3), 0)))


CHAIN = [
    lambda x: x.permute(0, 2, 1),
    lambda x: x + x,
    lambda x: -x,
    lambda x: F.relu(x),
    lambda x: x[:, :2],
    lambda x: x.flatten(1).unsqueeze(1),
    lambda x: F.pad(x, (1, 0)),
    lambda x: abs(x),
    lambda x: x - x.flip(1),
    lambda x: torch.cat([x, x], 1),
]


@settings(max_examples=100)
@given(st.lists(st.sampled_from(range(len(CHAIN))), max_size=6), st.booleans())
def test_chains_are_exact_as_long_as_they_stay_quantized(steps, channelwise) -> None:
    shape = (2, 3, 4)
    x = make(shape, 4, scale=per_channel(shape, 1) if channelwise else 0.25)
    q = integers(x)
    for step in steps:
        try:
            x = CHAIN[step](x)
        except RuntimeError as error:  # two scales per channel in another order
            assert "different scales" in str(error) or "scales of shapes" in str(error)
            return
        if not isinstance(x, IntQuantTensor):
            return
        q = CHAIN[step](q)
        assert x.is_valid
        assert torch.equal(integers(x), q)


def bits_needed(low: int, high: int) -> int:
    """By Python's integers."""
    return high.bit_length() if low >= 0 else max((-low - 1).bit_length(), high.bit_length()) + 1


@pytest.mark.parametrize("products", [1, 3, 9, 27, 576, 4096, 2**15, 2**16])
def test_accumulators_hold_every_sum_of_every_pair_of_types(products) -> None:
    """In float32 ``log2(2^k + 1)`` is k above 2^20: one bit short."""
    kinds = [(bits, signed) for bits in range(1, 17) for signed in (False, True)]
    ranges = [(-(2 ** (b - 1)), 2 ** (b - 1) - 1) if s else (0, 2**b - 1) for b, s in kinds]
    types = [
        IntQuantTensor.unchecked(
            torch.zeros(()), torch.ones(()), torch.zeros(()), torch.tensor(float(b)), s, False
        )
        for b, s in kinds
    ]
    for x, range_x in zip(types, ranges, strict=True):
        for w, range_w in zip(types, ranges, strict=True):
            ends = [p * q * products for p in range_x for q in range_w]
            assert accumulator_bits(x, w, products).item() >= bits_needed(min(ends), max(ends))


def test_sums_have_the_same_width_with_and_without_a_shared_width() -> None:
    for bits in range(1, 17):
        for signed in (True, False):
            x = make((2,), bits, signed)
            other = x.set(bit_width=x.bit_width.clone())
            for combine in (torch.add, torch.sub):
                assert combine(x, x).bit_width.item() == combine(x, other).bit_width.item()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("window", [2, 3, (1, 5)])
def test_average_pools_hold_the_lowest_sum(bits, window) -> None:
    q = make((1, 1, 5, 5), bits)
    q = q.set(value=torch.full_like(q.value, -(2.0 ** (bits - 1))) * q.scale)
    out = F.avg_pool2d(q, window)
    area = window**2 if isinstance(window, int) else window[0] * window[1]
    assert out.int().unique().tolist() == [-(2 ** (bits - 1)) * area]


def test_max_pools_return_indices_as_the_function_called_does() -> None:
    q, line = make((1, 2, 4, 4)), make((1, 2, 4))
    for function, x in (
        (F.max_pool2d_with_indices, q),
        (F.max_pool1d_with_indices, line),
        (torch.max_pool1d_with_indices, line),
        (torch.adaptive_max_pool1d, line),
    ):
        pooled, indices = function(x, 2)
        expected, expected_indices = function(x.value, 2)
        assert isinstance(pooled, IntQuantTensor)
        assert torch.equal(pooled.value, expected)
        assert torch.equal(indices, expected_indices)
    for function, x in ((torch.max_pool2d, q), (F.adaptive_max_pool1d, line)):
        assert isinstance(function(x, 2), IntQuantTensor)


def test_arguments_by_name_are_those_of_torch() -> None:
    x, w = make((2, 3)), make((4, 3))
    for by_name, by_place in (
        (torch.add(input=x, other=1), x + 1),
        (x.sub(other=x), x - x),
        (torch.neg(input=x), -x),
        (torch.flatten(input=x, start_dim=0), x.flatten()),
        (torch.matmul(x, other=w.mT), x @ w.mT),
        (torch.mm(x, mat2=w.mT), x @ w.mT),
        (F.linear(input=x, weight=w), F.linear(x, w)),
        (x.view(size=(3, 2)), x.view(3, 2)),
    ):
        assert isinstance(by_name, IntQuantTensor)
        assert torch.equal(by_name.value, by_place.value)
        assert torch.equal(by_name.bit_width, by_place.bit_width)


def test_weights_with_other_than_one_scale_per_output_give_floats() -> None:
    x = make((2, 4))
    for rows in (3, 4):
        assert type(F.linear(x, make((rows, 4), scale=per_channel((4,), 0)))) is torch.Tensor
    assert type(F.linear(x, make((4,)))) is torch.Tensor


def test_embeddings_that_rescale_their_rows_give_floats() -> None:
    table = make((5, 3), 4)
    before = table.value.clone()
    out = F.embedding(torch.tensor([0, 2]), table, max_norm=0.5)
    assert type(out) is torch.Tensor
    assert torch.equal(table.value, before)
