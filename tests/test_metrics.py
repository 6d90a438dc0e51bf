import math

import numpy as np
import pytest

from selfflow_robot.metrics import mean_maximum_rank_violation, paired_comparison, pearson, psnr, wilson_interval


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
