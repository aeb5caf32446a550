import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qframework.core.stats import (
    AbsAve,
    AbsMax,
    AbsMaxAve,
    AbsMaxL2,
    AbsMinMax,
    AbsPercentile,
    MeanLearnedSigmaStd,
    MeanSigmaStd,
    NegativeMinOrZero,
    NegativePercentileOrZero,
    PercentileInterval,
    SignedAbsMax,
)

X = torch.tensor([[1.0, -4.0, 2.0, 0.5], [-3.0, 0.25, 6.0, -7.0]])


@pytest.mark.parametrize(
    ("statistic", "whole", "rows"),
    [
        (AbsMax, 7.0, [4.0, 7.0]),
        (AbsAve, 23.75 / 8, [7.5 / 4, 16.25 / 4]),
        (AbsMinMax, 13.0, [6.0, 13.0]),
        (NegativeMinOrZero, -7.0, [-4.0, -7.0]),
        (SignedAbsMax, 7.0, [4.0, 7.0]),
    ],
)
def test_statistic_of_all_and_of_rows(statistic, whole, rows) -> None:
    assert statistic()(X).item() == pytest.approx(whole)
    assert statistic(stats_reduce_dim=1)(X).tolist() == pytest.approx(rows)


def test_means_over_rows() -> None:
    assert AbsMaxAve(stats_reduce_dim=1)(X).item() == pytest.approx(5.5)
    assert AbsMaxL2(stats_reduce_dim=1)(X).item() == pytest.approx((65 / 2) ** 0.5)


def test_mean_plus_sigma_deviations() -> None:
    expected = X.abs().mean() + 3 * (X.abs().var() + 1e-8).sqrt()
    assert MeanSigmaStd(3.0)(X).item() == pytest.approx(expected.item())
    learned = MeanLearnedSigmaStd(3.0)
    assert learned(X).item() == pytest.approx(expected.item())
    learned(X).backward()
    assert learned.value.grad is not None


@given(st.floats(0.001, 100), st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=300))
def test_percentiles_are_order_statistics(q, numbers) -> None:
    x = torch.tensor(numbers, dtype=torch.float32)
    n = len(numbers)
    order = np.sort(np.abs(np.float32(numbers)))
    rank = min(max(int(np.floor(0.01 * q * n + 0.5)), 1), n)
    assert AbsPercentile(q)(x).item() == order[rank - 1]
    low = np.sort(np.float32(numbers))[min(max(int(np.ceil(0.01 * q * n)), 1), n) - 1]
    assert NegativePercentileOrZero(q)(x).item() == min(low, 0)


@pytest.mark.parametrize(
    ("x", "width"), [([-6.0, -5.0], 6.0), ([5.0, 6.0], 6.0), ([-1.0, 2.0], 3.0)]
)
def test_ranges_hold_zero(x, width) -> None:
    assert AbsMinMax()(torch.tensor(x)).item() == width
    assert PercentileInterval(0.001, 99.999)(torch.tensor(x)).item() == width


def test_low_precision_is_reduced_in_float32() -> None:
    assert AbsMax()(X.bfloat16()).dtype == torch.float32
    assert AbsPercentile(99.0)(X.half()).dtype == torch.float32


def test_a_percentage_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="high_percentile_q is a percentage"):
        AbsPercentile(101.0)
    with pytest.raises(ValueError, match="low_percentile_q=60 must be below"):
        PercentileInterval(60, 40)
