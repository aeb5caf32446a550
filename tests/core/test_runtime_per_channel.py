"""Statistics of activations per channel, in training and evaluation, against sorted rows."""

import numpy as np
import pytest
import torch

from qframework import quantizers as q
from qframework.layers import QuantIdentity

PER_CHANNEL = {
    "scaling_per_output_type": "channel",
    "per_channel_broadcastable_shape": (1, 3, 1, 1),
    "scaling_stats_permute_dims": (1, 0, 2, 3),
}
X = [
    torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(s))
    * torch.tensor([1.0, 4.0, 0.2]).reshape(1, 3, 1, 1)
    - 0.3
    for s in range(4)
]


def rows(x: torch.Tensor) -> np.ndarray:
    return np.sort(x.permute(1, 0, 2, 3).reshape(3, -1).numpy(), axis=1)


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0])
def test_percentile_of_each_channel_is_collected_then_learned(percentile) -> None:
    layer = QuantIdentity(
        high_percentile_q=percentile, collect_stats_steps=2, return_quant_tensor=True, **PER_CHANNEL
    )
    seen = []
    for x in X[:2]:
        magnitudes = np.sort(np.abs(rows(x)), axis=1)
        rank = int(np.floor(0.01 * percentile * magnitudes.shape[1] + 0.5))
        seen.append(magnitudes[:, rank - 1])
        out = layer(x)
        np.testing.assert_allclose(out.scale.detach().reshape(3), seen[-1] / 128, rtol=1e-6)
    layer(X[2])
    learned = layer.act_quant.tensor_quant.scaling_impl.value
    np.testing.assert_allclose(
        learned.detach().reshape(3), 0.9 * seen[0] + 0.1 * seen[1], rtol=1e-6
    )
    layer(X[3]).value.square().sum().backward()
    assert learned.grad.shape == (1, 3, 1, 1) and bool((learned.grad != 0).all())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_those_of_batch_normalization(momentum) -> None:
    layer = QuantIdentity(
        scaling_impl_type="stats",
        scaling_stats_op="max",
        scaling_stats_momentum=momentum,
        return_quant_tensor=True,
        **PER_CHANNEL,
    )
    tops = [np.abs(rows(x)).max(axis=1) for x in X]
    running = tops[0]
    for k, (x, top) in enumerate(zip(X, tops, strict=True)):
        np.testing.assert_allclose(layer(x).scale.reshape(3), top / 128, rtol=1e-6)
        if k:
            share = momentum or 1 / (k + 1)
            running = (1 - share) * running + share * top
    layer.eval()
    np.testing.assert_allclose(layer(X[0]).scale.reshape(3), running / 128, rtol=1e-5)
    assert "act_quant.tensor_quant.scaling_impl.runtime_stats.running_stats" in layer.state_dict()


def test_interval_and_zero_point_of_each_channel() -> None:
    layer = QuantIdentity(
        q.ShiftedUint8ActPerTensorFloat,
        low_percentile_q=2.0,
        high_percentile_q=98.0,
        return_quant_tensor=True,
        **PER_CHANNEL,
    )
    out = layer(X[0])
    ordered = rows(X[0])
    n = ordered.shape[1]
    low = np.minimum(ordered[:, int(np.ceil(0.02 * n)) - 1], 0)
    high = np.maximum(ordered[:, int(np.floor(0.98 * n + 0.5)) - 1], 0)
    np.testing.assert_allclose(out.scale.reshape(3), (high - low) / 255, rtol=1e-5)
    np.testing.assert_array_equal(out.zero_point.reshape(3), np.rint(-low / ((high - low) / 255)))


@pytest.mark.parametrize("name", ["Int8ActPerTensorFloatMSE", "ShiftedUint8ActPerTensorFloatMSE"])
def test_the_least_squared_error_of_each_channel(name) -> None:
    whole = QuantIdentity(getattr(q, name), bit_width=4, return_quant_tensor=True)
    split = QuantIdentity(getattr(q, name), bit_width=4, return_quant_tensor=True, **PER_CHANNEL)
    error = [(m(X[0]).value - X[0]).square().sum((0, 2, 3)) for m in (whole, split)]
    assert split(X[1]).scale.shape == (1, 3, 1, 1)
    assert error[1].sum() < 0.9 * error[0].sum()
