"""The statistics that the recipes share, against tables, counting and plain formulas."""

import math
from itertools import pairwise

import numpy as np
import pytest
from load_recipe import import_recipe

(stats,) = import_recipe(".", "stats")


QUANTILES = {1: 12.706, 2: 4.303, 4: 2.776, 8: 2.306, 9: 2.262, 10: 2.228, 14: 2.145, 19: 2.093, 29: 2.045, 99: 1.984}


@pytest.mark.parametrize(("degrees", "quantile"), QUANTILES.items())
def test_intervals_over_seeds_are_students(degrees, quantile):
    assert round(stats.t_975(degrees), 3) == quantile
    values = np.random.default_rng(0).normal(size=(degrees + 1, 3))
    exact = quantile * values.std(0, ddof=1) / math.sqrt(degrees + 1)
    assert stats.half_width(values) == pytest.approx(exact, rel=3e-4)
    assert stats.mean_and_half(values)["half"] == stats.half_width(values).tolist()


def test_the_quantile_falls_where_the_series_takes_over():
    quantiles = [stats.t_975(degrees) for degrees in range(1, 200)]
    assert all(first > second for first, second in pairwise(quantiles)) and quantiles[-1] > 1.96


def test_shares_are_of_samples_with_replacement():
    seeds, prompts = stats.crossed_shares(3, 40, 500)
    assert seeds.shape == (500, 3) and prompts.shape == (500, 40)
    for shares in (seeds, prompts):
        number = shares.shape[1]
        assert shares.sum(1) == pytest.approx(1) and (shares * number) == pytest.approx((shares * number).round())
        assert shares.mean() * number == pytest.approx(1)
        assert (shares * number).var() == pytest.approx(1 - 1 / number, abs=0.1)  # of a binomial
    low, high = stats.percentiles(prompts @ np.arange(40.0))
    assert (high - low) / 2 == pytest.approx(1.96 * np.arange(40).std() / math.sqrt(40), rel=0.1)


def test_rank_correlation_with_ties():
    assert stats.ranks([3, 1, 3, 2]).tolist() == [3.5, 1, 3.5, 2]
    assert stats.spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)
    assert stats.spearman([1, 1, 5], [2, 1, 3]) == pytest.approx(math.sqrt(3) / 2)
    assert stats.correlation(np.ones(3), np.arange(3)) == stats.spearman([2, 2, 2], [1, 2, 3]) == 0.0


def test_a_tie_is_half_a_win_and_no_number_is_none():
    found = stats.wins(np.array([2.0, 1.0, 0.0, np.nan]), np.array([1.0, 1.0, 1.0, 1.0]))
    assert found[:3].tolist() == [1, 0.5, 0] and np.isnan(found[3])


def test_values_at_a_kl_are_linear_in_its_root():
    kl = np.array([[0.0, -0.01, 0.0], [0.25, 0.04, 0.0], [1.0, 0.09, -0.1]])
    values = np.stack([0.1 * np.sqrt(np.maximum(kl, 0)), kl], axis=-1)
    found = stats.at_kl(kl, values, 0.5625)
    assert found[0] == pytest.approx([0.075, (0.25 + 1) / 2]) and np.isnan(found[1:]).all()
    found = stats.at_kl(kl, values, np.array([0.25, 0.01, 0.0]))
    assert found == pytest.approx(np.array([[0.05, 0.25], [0.01, -0.01 + 0.05 / 2], [0.0, 0.0]]))
