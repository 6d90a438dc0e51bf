import math
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from selfflow_robot.metrics import (
    ROUNDING,
    Estimate,
    action_errors,
    auc,
    bootstrap_difference,
    bootstrap_mean,
    frame_lpips,
    frame_psnr,
    frame_ssim,
    frechet_distance,
    jackknife,
    lpips_missing,
    mean_maximum_rank_violation,
    moving,
    paired_comparison,
    pearson,
    plain,
    psnr,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_published(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson_interval(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_ends_are_exact_and_confidence_widens():
    assert wilson_interval(0, 7)[0] == 0.0 and wilson_interval(7, 7)[1] == 1.0
    narrow, wide = wilson_interval(5, 10, 0.8), wilson_interval(5, 10, 0.99)
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 4), (5, 4)])
def test_wilson_refuses(successes, trials):
    with pytest.raises(ValueError, match=f"{successes} successes in {trials}"):
        wilson_interval(successes, trials)


def outcomes(both, only_first, only_second, none):
    cells = [(True, True)] * both + [(True, False)] * only_first + [(False, True)] * only_second + [(False,) * 2] * none
    return zip(*cells)


@pytest.mark.parametrize(
    ("cells", "p_value", "low", "high"),
    [
        ((1, 1, 7, 12), 0.0703, -0.507, -0.026),  # Fagerland, Lydersen, Laake 2014: airway hyper-responsiveness
        ((36, 12, 2, 0), 0.0129, 0.0569, 0.3404),  # Newcombe 1998, method 10; negative correlation
        ((20, 12, 2, 16), 0.0129, None, None),  # Armitage and Berry 1994, p. 127: two culture media
    ],
)
def test_paired_published(cells, p_value, low, high):
    result = paired_comparison(*outcomes(*cells))
    assert result.p_value == pytest.approx(p_value, abs=5e-5)
    assert (result.only_first, result.only_second) == cells[1:3]
    if low is not None:
        assert result.interval == pytest.approx((low, high), abs=5e-4)


def test_paired_swaps_sign_with_the_arms():
    first, second = outcomes(9, 8, 3, 5)
    there, back = paired_comparison(first, second), paired_comparison(second, first)
    assert back.difference == -there.difference and back.p_value == there.p_value
    assert back.interval == pytest.approx((-there.interval[1], -there.interval[0]))
    assert there.interval[0] < there.difference < there.interval[1]


def test_paired_equal_arms():
    result = paired_comparison([True, False, True], [True, False, True])
    assert result.difference == 0 and result.p_value == 1
    assert result.interval[0] < 0 < result.interval[1]  # three seeds prove nothing


def test_paired_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="same seeds"):
        paired_comparison([True], [True, False])


def test_psnr():
    a = np.full((4, 4, 3), 100, np.uint8)
    assert psnr(a, a) == math.inf
    assert psnr(a, a + 1) == pytest.approx(20 * math.log10(255))
    assert psnr(np.zeros_like(a), np.full_like(a, 255)) == 0  # no wrap-around of uint8
    with pytest.raises(ValueError, match="uint8"):
        psnr(a.astype(float), a.astype(float))


# -- how a simulator ranks policies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("real", "simulated", "expected"),
    [
        ((0.1, 0.4, 0.9), (0.0, 0.2, 0.3), 0.0),  # the same order
        ((0.1, 0.4, 0.9), (0.3, 0.2, 0.0), (0.8 + 0.5 + 0.8) / 3),  # reversed
        ((0.1, 0.4, 0.9), (0.2, 0.1, 0.3), (0.3 + 0.3 + 0.0) / 3),  # two swapped: their real gap, for both
        ((0.9, 0.1, 0.4), (0.3, 0.2, 0.1), (0.0 + 0.3 + 0.3) / 3),  # whatever the order they are listed in
        ((0.1, 0.4, 0.9), (0.2, 0.2, 0.3), (0.3 + 0.0 + 0.0) / 3),  # a tie in simulation counts for the higher one
        ((0.4, 0.4, 0.9), (0.1, 0.2, 0.3), 0.0),  # a tie in reality is no gap
        ((0.5, 0.5), (0.0, 1.0), 0.0),
    ],
)
def test_rank_violation_by_hand(real, simulated, expected):
    assert mean_maximum_rank_violation(real, simulated) == pytest.approx(expected)


def test_rank_violation_is_the_worst_one_of_each_policy():
    """By hand: the last and the first are swapped, 0.8 apart; the two between lose 0.6 and 0.5 to one of them."""
    real, simulated = (0.1, 0.4, 0.7, 0.9), (0.9, 0.4, 0.7, 0.1)
    assert mean_maximum_rank_violation(real, simulated) == pytest.approx((0.8 + 0.5 + 0.6 + 0.8) / 4)


@pytest.mark.parametrize(
    ("real", "simulated", "expected"),
    [
        ((0.1, 0.5), (0.0, 1.0), 1.0),
        ((0.1, 0.5, 0.9), (0.8, 0.6, 0.4), -1.0),
        ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), 0.5),  # deviations (-1, -1, 2) and (-2, 1, 1), over 6
        ((1.0, 0.0, 1.0, 0.0), (1.0, 1.0, 0.0, 0.0), 0.0),
    ],
)
def test_pearson_by_hand(real, simulated, expected):
    assert pearson(real, simulated) == pytest.approx(expected)
    assert pearson(simulated, real) == pytest.approx(expected)


def test_pearson_of_equal_rates_is_undefined():
    assert math.isnan(pearson([0.5, 0.5], [0.1, 0.9])) and math.isnan(pearson([0.1, 0.9], [0.0, 0.0]))


@pytest.mark.parametrize("measure", [pearson, mean_maximum_rank_violation])
@pytest.mark.parametrize(("real", "simulated"), [([0.1], [0.1]), ([], []), ([0.1, 0.2], [0.1, 0.2, 0.3])])
def test_a_ranking_needs_the_same_policies(measure, real, simulated):
    with pytest.raises(ValueError, match=f"at least two: got {len(real)} and {len(simulated)}"):
        measure(real, simulated)


@pytest.mark.parametrize("measure", [pearson, mean_maximum_rank_violation])
def test_a_ranking_refuses_rates_that_are_no_numbers(measure):
    with pytest.raises(ValueError, match="must be numbers"):
        measure([0.1, math.nan, 0.3], [0.1, 0.2, 0.3])


# -- predicted frames --------------------------------------------------------------------------------------------------


def test_what_moves():
    given = np.full((2, 1, 8, 8, 3), 100, np.uint8)
    future = np.repeat(given, 2, 1)
    future[0, 1, 2, 3, 1] = 121  # one channel is enough
    future[1, 0, 5, 5] = 80  # 20 is not more than 20
    future[1, 1, 7, 7] = 10  # no wrap-around of uint8
    expected = np.zeros((2, 2, 8, 8), bool)
    expected[0, 1, 2, 3] = expected[1, 1, 7, 7] = True
    assert np.array_equal(moving(given, future), expected)


def test_psnr_of_every_frame():
    real = np.full((3, 2, 10, 20, 3), 100, np.uint8)
    predicted = real.copy()
    predicted[0, 1] += 5
    predicted[2, 0, :5] += 10
    scores = frame_psnr(real, predicted)
    equal = 10 * math.log10(255**2 / ROUNDING)
    assert scores == pytest.approx(
        np.array([
            [equal, 20 * math.log10(255 / 5)],
            [equal, equal],
            [20 * math.log10(255 / 10) + 10 * math.log10(2), equal],
        ])
    )  # fmt: skip
    counted = np.zeros((3, 2, 10, 20), bool)
    counted[2, 0, 4:6] = True  # half of them wrong by 10
    counted[0, 1, 0, 0] = True  # one pixel of 200 is 0.5 %
    scores = frame_psnr(real, predicted, counted)
    assert scores[2, 0] == pytest.approx(20 * math.log10(255 / 10) + 10 * math.log10(2))
    assert scores[0, 1] == pytest.approx(20 * math.log10(255 / 5))
    assert np.isnan(scores[[0, 1, 1, 2], [0, 0, 1, 1]]).all()
    with pytest.raises(ValueError, match="uint8"):
        frame_psnr(real, predicted[:, :1])


def test_ssim_of_every_frame():
    """Of two even pictures only the luminance term is left: (2 a b + c) / (a^2 + b^2 + c), c = 0.01^2."""
    real = np.random.default_rng(0).integers(0, 256, (2, 2, 32, 48, 3), dtype=np.uint8)
    real[0, 0] = 51
    predicted = real.copy()
    predicted[0, 0] = 204
    predicted[1, 1] = 255 - predicted[1, 1]
    scores = frame_ssim(real, predicted)
    a, b = 0.2, 0.8
    assert scores[0, 0] == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), abs=1e-4)
    assert scores[0, 1] == pytest.approx(1) and scores[1, 0] == pytest.approx(1)
    assert scores[1, 1] < -0.5  # a negative is as unlike as can be
    with pytest.raises(ValueError, match="twice"):
        frame_ssim(real, predicted[0])


def test_lpips_says_what_it_lacks(monkeypatch, tmp_path):
    frames = np.zeros((1, 32, 32, 3), np.uint8)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert "not installed" in lpips_missing() and "pip install" in lpips_missing()
    with pytest.raises(RuntimeError, match="LPIPS: torchvision is not installed"):
        frame_lpips(frames, frames)
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert f"no AlexNet weights in {tmp_path}" in lpips_missing()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/alexnet-owt.pth").touch()
    assert lpips_missing() is None


def test_action_errors_by_hand():
    true = np.zeros((1, 2, 7), np.float32)
    predicted = true.copy()
    predicted[0, 0] = (0.003, 0.004, 0, 0, 0, 0, 1)
    predicted[0, 1] = (0, 0, 0, 0, np.pi / 180, 0, 0.25)
    errors = action_errors(predicted, true)
    assert errors["mm"] == pytest.approx(np.array([[5, 0]]), abs=1e-5)
    assert errors["degrees"] == pytest.approx(np.array([[0, 1]]), abs=1e-5)
    assert errors["gripper"] == pytest.approx(np.array([[1, 0.25]]))


# -- distributions -----------------------------------------------------------------------------------------------------


def gaussian(mean, root, count=200, seed=0):
    """Samples with exactly this mean and the covariance root root'."""
    x = np.random.default_rng(seed).normal(size=(count, len(mean)))
    x = x - x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False).reshape(len(mean), -1))).T
    return x @ np.asarray(root, float).T + mean


def test_frechet_distance_in_closed_form():
    one, other = gaussian([1.0], [[2.0]]), gaussian([4.0], [[0.5]], seed=1)
    assert frechet_distance(one, other) == pytest.approx(3**2 + 1.5**2)
    diagonal = gaussian([0, 0, 0], np.diag([1, 2, 3])), gaussian([1, 0, -1], np.diag([2, 2, 0.5]), seed=1)
    assert frechet_distance(*diagonal) == pytest.approx(2 + 1 + 0 + 2.5**2)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_where_covariances_do_not_commute():
    roots = np.random.default_rng(3).normal(size=(2, 4, 4))
    a, b = (gaussian(np.full(4, float(i)), root, seed=i) for i, root in enumerate(roots))
    cov_a, cov_b = (root @ root.T for root in roots)
    expected = 4 + np.trace(cov_a) + np.trace(cov_b) - 2 * np.real(np.trace(sqrtm(cov_a @ cov_b)))
    assert frechet_distance(a, b) == pytest.approx(expected)
    turned = np.linalg.qr(np.random.default_rng(4).normal(size=(4, 4)))[0]
    assert frechet_distance(a @ turned, b @ turned) == pytest.approx(expected)


def test_frechet_distance_keeps_as_many_components_as_samples_carry():
    x = gaussian([0, 0], np.diag([3, 1]), count=30)
    wide = np.concatenate([x, 1e-9 * np.random.default_rng(5).normal(size=(30, 50))], 1)
    moved = wide.copy()
    moved[:, 0] += 2
    assert frechet_distance(wide, moved) == pytest.approx(4, rel=1e-6)
    assert frechet_distance(wide, moved, dimensions=1) == pytest.approx(4, rel=1e-6)
    assert frechet_distance(wide[:2], moved[:2]) >= 0  # too few for more than one, and no crash
    with pytest.raises(ValueError, match="two or more clips"):
        frechet_distance(wide[:1], moved[:1])


def test_frechet_distance_sees_what_real_clips_never_do():
    x = gaussian([0, 0], np.diag([1, 1e-6]), count=30)
    assert frechet_distance(x, x + [0, 5], dimensions=1) == pytest.approx(25, rel=0.01)


# -- uncertainty -------------------------------------------------------------------------------------------------------


def test_bootstrap_resamples_whole_groups():
    groups = np.repeat([7, 3], 100)
    estimate = bootstrap_mean((groups == 7).astype(float), groups)
    assert estimate == (0.5, 0.0, 1.0)  # two episodes, a hundred copies each: nothing between is known
    value, low, high = bootstrap_mean(np.arange(4.0), np.zeros(4))
    assert value == 1.5 and math.isnan(low) and math.isnan(high)
    with pytest.raises(ValueError, match="a group for every value"):
        bootstrap_mean(np.zeros(3), np.zeros(2))


def test_bootstrap_of_many_groups_is_the_normal_interval():
    values = np.random.default_rng(0).normal(10, 2, 400)
    value, low, high = bootstrap_mean(values, np.arange(400))
    error = values.std() / 20
    assert value == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((value - 1.96 * error, value + 1.96 * error), abs=0.2 * error)


def test_missing_values_do_not_count():
    values, groups = np.array([1.0, np.nan, 3.0, np.nan]), np.array([0, 0, 1, 2])
    assert bootstrap_mean(values, groups) == bootstrap_mean(values[[0, 2]], groups[[0, 2]])
    assert all(math.isnan(x) for x in bootstrap_mean(values[[1, 3]], groups[[1, 3]]))


def test_pairs_stay_together():
    base, groups = np.random.default_rng(0).normal(0, 100, 40), np.arange(40) // 4
    assert bootstrap_difference(base + 2, base, groups) == pytest.approx((2, 2, 2))


def test_jackknife_of_a_mean_is_students_interval():
    values, groups = np.repeat([1.0, 2, 3, 4, 5], 3), np.repeat(np.arange(5), 3)
    estimate = jackknife(lambda rows: values[rows].mean(), groups)
    half = 2.7764451 * math.sqrt(2.5 / 5)  # t(0.975, 4), variance 2.5
    assert estimate == pytest.approx((3, 3 - half, 3 + half))
    assert math.isnan(jackknife(lambda rows: 1.0, np.array([0, 0, 1])).low)  # of two groups


def test_estimates_as_text_and_json():
    assert Estimate(1.234, 1.0, 1.5).text(1) == "1.2 [1.0, 1.5]"
    assert Estimate(-0.001, -0.004, 0.5).text(2) == "0.00 [0.00, 0.50]"  # no "-0.00"
    assert Estimate(2.0, math.nan, math.nan).text() == "2.00" and Estimate(math.nan, math.nan, math.nan).text() == "-"
    found = plain({"a": [Estimate(1.0, math.nan, 2.0)], 4: (math.inf, "b", None)})
    assert found == {"a": [{"value": 1.0, "low": None, "high": 2.0}], "4": [None, "b", None]}


# -- alarms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "labels", "expected"),
    [
        ((0.9, 0.8, 0.3, 0.1), (1, 1, 0, 0), 1.0),
        ((0.9, 0.8, 0.3, 0.1), (0, 0, 1, 1), 0.0),
        ((0.9, 0.2, 0.5, 0.1), (1, 1, 0, 0), 3 / 4),
        ((0.5, 0.5, 0.5, 0.5), (1, 0, 1, 0), 1 / 2),  # ties count half
        ((2.0, 1.0, 1.0, 0.0), (1, 1, 0, 0), 3.5 / 4),
        ((3, 2, 2, 2, 1), (1, 0, 1, 1, 0), (2 + 2 * 1.5) / 6),
    ],
)
def test_auc_by_hand(scores, labels, expected):
    estimate = auc(scores, labels)
    assert estimate.value == pytest.approx(expected)
    assert 0 <= estimate.low <= expected <= estimate.high <= 1
    assert auc(np.exp(np.array(scores)), labels) == pytest.approx(estimate)  # the order alone counts
    mirrored = auc(-np.array(scores), labels)
    assert mirrored == pytest.approx((1 - estimate.value, 1 - estimate.high, 1 - estimate.low))


@pytest.mark.parametrize(("score", "successes"), [(1.0, 1), (-1.0, 0)])
def test_auc_of_one_pair_is_one_trial(score, successes):
    """With one on each side the variance is that of a single binary outcome, and the interval Wilson's."""
    assert auc([score, 0.0], [True, False])[1:] == pytest.approx(wilson_interval(successes, 1))


def test_auc_is_not_certain_of_a_perfect_separation_and_narrows_with_counts():
    few, many = (auc(np.arange(2 * n), np.arange(2 * n) >= n) for n in (4, 100))
    assert few.value == many.value == few.high == many.high == 1
    assert 0.3 < few.low < 0.8 < 0.95 < many.low < 1


def test_auc_needs_both_sides_and_finite_scores():
    assert all(math.isnan(x) for x in auc([1.0, 2.0], [True, True]))
    with pytest.raises(ValueError, match="finite"):
        auc([1.0, math.nan], [True, False])
    with pytest.raises(ValueError, match="for every label"):
        auc([1.0], [True, False])
