"""Uncertainty of averages."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlsae.statistics import bootstrap_ci95


def test_the_interval_of_many_values_is_that_of_the_normal_approximation():
    values = np.random.default_rng(0).normal(3.0, 2.0, 1000)
    error = values.std() / math.sqrt(len(values))
    low, high = bootstrap_ci95(values)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_the_interval_of_skewed_values_is_skewed_too():
    values = np.random.default_rng(0).exponential(1.0, 20)
    low, high = bootstrap_ci95(values)
    assert high - values.mean() > 1.05 * (values.mean() - low)


def test_intervals_cover_the_true_mean_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    intervals = [bootstrap_ci95(rng.normal(size=40)) for _ in range(60)]
    covered = sum(low <= 0 <= high for low, high in intervals)
    assert 52 <= covered < 60


def test_equal_values_have_an_interval_without_width():
    assert bootstrap_ci95(np.full(10, 0.3)) == pytest.approx([0.3, 0.3])


def test_equal_seeds_give_equal_intervals_and_other_seeds_nearly_the_same():
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap_ci95(values) == bootstrap_ci95(values, seed=0)
    assert bootstrap_ci95(values) != bootstrap_ci95(values, seed=1)
    assert bootstrap_ci95(values) == pytest.approx(bootstrap_ci95(values, seed=1), abs=0.05)


def test_whole_numbers_and_truth_values_are_averaged_as_they_are():
    low, high = bootstrap_ci95(np.array([True, False] * 50))
    assert 0.35 < low < 0.45 < 0.55 < high < 0.65


def test_no_values_have_no_interval():
    assert np.isnan(bootstrap_ci95(np.array([]))).tolist() == [True, True]
