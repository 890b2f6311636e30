"""Statistics of results: closed forms, and what they promise, checked by simulation with known truth."""

from __future__ import annotations

import math
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from simulated_statistics import (
    ARRAYS,
    EQUAL,
    MEASURED,
    METHODS,
    PROMPTS,
    SEEDS,
    SOME_WORSE,
    TABLES,
    UPPER,
    coverage,
    coverage_of_others,
    false_claims,
    found_pairs,
    squares_of_pairs,
)

from flowbench.errors import UsageError
from flowbench.evaluation.statistics import (
    LIKE,
    THESE,
    Components,
    Gains,
    Over,
    Trajectory,
    compare,
    components,
    cost_to_target,
    difference,
    gains_from_records,
    interquartile_mean,
    mean_gain,
    performance_profile,
    probability_of_improvement,
    rank_correlation,
    reached,
    smallest_difference,
)
from flowbench.evaluation.statistics.crossed import mean_squares
from flowbench.evaluation.statistics.ranking import holm, moderated
from flowbench.record import find_records

RECORDS = Path(__file__).parent.parent / "leaderboard" / "history" / "mini-sd3" / "clip"
BOTH: tuple[Over, Over] = (THESE, LIKE)


def table(values: np.ndarray, failed: frozenset[tuple[str, int]] = frozenset()) -> Gains:
    return Gains(tuple("abcdefghijkl"[: len(values)]), tuple(range(values.shape[1])), values, failed)


def random_table(methods: int, seeds: int, prompts: int = 40, seed: int = 0) -> Gains:
    return table(np.random.default_rng(seed).normal(size=(methods, seeds, prompts)))


# Coverage, size and power; the slow ones are the tables of docs/statistics.md.


@pytest.mark.parametrize("seeds", SEEDS)
def test_intervals_of_the_mean_hold_the_truth_in_93_to_97_percent(seeds: int):
    for name, over in product(("awm, oracle_exact", "ddpo, oracle_exact", "acflow - awm, oracle_exact"), BOTH):
        assert 0.93 <= coverage(seeds, MEASURED[name], "normal", over, 1500) <= 0.97, (name, over)
    assert 0.93 <= coverage(seeds, MEASURED["ddpo, oracle_exact"], "t3", LIKE, 1500) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "over", "tail"), product(SEEDS, BOTH, ("normal", "t3")))
def test_intervals_hold_the_truth_with_every_measured_spread_and_heavy_tails(seeds: int, over: Over, tail: str):
    for name, part in MEASURED.items():
        assert 0.925 <= coverage(seeds, part, tail, over, 10000) <= 0.975, name


def test_intervals_of_interquartile_mean_and_probability_hold_the_truth_with_three_seeds():
    for share in coverage_of_others(3, MEASURED["awm, oracle_exact"], 400):
        assert 0.92 <= share <= 0.98


@pytest.mark.parametrize("seeds", SEEDS)
def test_at_most_5_percent_of_tables_of_equal_methods_claim_a_rank(seeds: int):
    noise = 0.03  # two standard deviations of a share of 5 % among 200 tables
    assert false_claims(seeds, "seeds as measured", "normal", LIKE, 200).any <= 0.05 + noise


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "name", "tail"), product(SEEDS, TABLES, ("normal", "t3")))
def test_tables_claim_falsely_at_most_as_often_as_they_say(seeds: int, name: str, tail: str):
    noise = 0.014  # two standard deviations of a share of 5 % among 1000 tables
    assert false_claims(seeds, name, tail, LIKE, 1000, EQUAL).any <= 0.05 + noise
    assert false_claims(seeds, name, tail, THESE, 1000, EQUAL).any <= 0.05 + noise
    some = false_claims(seeds, name, tail, LIKE, 1000, SOME_WORSE)
    assert some.first <= 0.05 + noise
    assert some.rank <= 0.05 + noise


def test_the_simulations_shortcut_gives_the_mean_squares_of_the_pairs():
    values = np.random.default_rng(0).normal(size=(2, METHODS, 3, 20))
    quick, plain = squares_of_pairs(values), mean_squares(values[:, UPPER[0]] - values[:, UPPER[1]])
    for name in ARRAYS:
        assert np.allclose(getattr(quick, name), getattr(plain, name)), name


def test_a_table_finds_most_of_a_large_difference_with_five_seeds():
    assert found_pairs(5, "seeds as measured", LIKE, 50, 0.1) > 0.8


def test_the_smallest_difference_is_found_with_the_probability_that_it_names():
    part, seeds = Components(0.1, 0.01, 0.15), 5
    size = smallest_difference(part, seeds, PROMPTS, THESE)
    rng = np.random.default_rng(0)
    values = size + part.seeds * rng.normal(size=(2000, seeds, 1)) + part.residual * rng.normal(size=(2000, seeds, 60))
    size_of_60 = smallest_difference(part, seeds, 60, THESE)
    seed_means = values.mean(-1) - size + size_of_60
    assert np.mean(stats.ttest_1samp(seed_means, 0, axis=-1).pvalue < 0.05) == pytest.approx(0.8, abs=0.03)


# Intervals in closed form.


def test_over_these_prompts_the_interval_is_the_t_interval_of_the_seeds_means():
    gains = random_table(1, 4)
    found, means = mean_gain(gains, "a", THESE), gains.values[0].mean(1)
    half = stats.t.ppf(0.975, 3) * means.std(ddof=1) / 2
    assert (found.low, found.high) == pytest.approx((means.mean() - half, means.mean() + half))
    assert (found.over, found.seeds, found.prompts, found.failed) == ("these prompts", 4, 40, 0)


def test_over_prompts_like_these_equal_seeds_leave_the_t_interval_of_the_prompts():
    prompts = np.random.default_rng(0).normal(size=30)
    found = mean_gain(table(np.tile(prompts, (1, 3, 1))), "a", LIKE)
    half = stats.t.ppf(0.975, 29) * prompts.std(ddof=1) / math.sqrt(30)
    assert found.high - found.value == pytest.approx(half)


def test_mean_squares_add_up_to_the_total_sum_of_squares():
    values = np.random.default_rng(1).normal(size=(3, 7))
    ms = mean_squares(values)
    total = ms.by_seed * 2 + ms.by_prompt * 6 + ms.residual * 12
    assert total == pytest.approx(((values - values.mean()) ** 2).sum())


def test_the_components_of_simulated_gains_are_found():
    rng = np.random.default_rng(0)
    values = 0.3 * rng.normal(size=200) + 0.2 * rng.normal(size=(200, 1)) + 0.1 * rng.normal(size=(200, 200))
    found = components(values)
    assert (found.prompts, found.seeds, found.residual) == pytest.approx((0.3, 0.2, 0.1), rel=0.1)
    assert components(np.eye(2)).seeds == 0  # a negative estimate
    with pytest.raises(ValueError, match="two seeds and two prompts"):
        components(np.ones((1, 5)))


@pytest.mark.parametrize("over", BOTH)
def test_one_seed_says_nothing_of_seeds(over: Over):
    found = mean_gain(random_table(1, 1), "a", over)
    assert (found.low, found.high) == (None, None)
    assert math.isfinite(found.value)


def test_one_value_per_seed_has_an_interval_over_seeds_alone():
    gains = random_table(3, 5, prompts=1)
    assert mean_gain(gains, "a", LIKE).low is None
    assert mean_gain(gains, "a", THESE).low is not None
    assert compare(gains, THESE).pairs[0].difference.low is not None
    assert [p.p for p in compare(gains, LIKE).pairs] == [1.0] * 3


def test_a_difference_is_paired_so_that_what_both_share_cancels():
    shared = 10 * np.random.default_rng(0).normal(size=(5, 40))
    own = random_table(2, 5).values
    for over in BOTH:
        alone, beside = (difference(table(values), "a", "b", over) for values in (own, own + shared))
        assert (beside.low, beside.high) == pytest.approx((alone.low, alone.high))
        turned = difference(table(own), "b", "a", over)
        assert (turned.low, turned.high) == pytest.approx((-alone.high, -alone.low))


def test_the_interquartile_mean_is_that_of_the_middle_half_and_no_outlier_moves_it():
    values = np.random.default_rng(0).normal(size=(1, 4, 40))
    found = interquartile_mean(table(values), "a")
    assert found.value == pytest.approx(stats.trim_mean(values, 0.25, axis=None))
    values[0].flat[values.argmax()] = 1e9
    moved = interquartile_mean(table(values), "a")
    assert (moved.value, moved.high) == pytest.approx((found.value, found.high))


def test_the_probability_of_improvement_counts_wins_and_half_the_ties():
    one = np.array([[1.0, 2.0, 0.0, 0.0], [1.0, 2.0, 0.0, 3.0]])
    gains = table(np.stack([one, np.array([[0.0, 2.0, 1.0, 0.0]] * 2)]))
    assert probability_of_improvement(gains, "a", "b").value == pytest.approx((2 + 0.5 * 3 + 1) / 8)
    assert probability_of_improvement(gains, "b", "a").value == pytest.approx(1 - 4.5 / 8)
    found = probability_of_improvement(gains, "a", "b")
    assert found.low >= 0
    assert found.high <= 1


# Seeds that are missing or failed.


def test_missing_seeds_leave_the_others_and_failed_ones_are_counted():
    values = random_table(2, 5).values
    values[0, 1], values[1, 3] = np.nan, np.nan
    gains = table(values, frozenset({("a", 1)}))
    mean, pair = mean_gain(gains, "a"), difference(gains, "a", "b")
    assert (mean.seeds, mean.failed) == (4, 1)
    assert mean.value == pytest.approx(values[0, [0, 2, 3, 4]].mean())
    assert (pair.seeds, pair.failed) == (3, 1)
    assert pair.value == pytest.approx((values[0] - values[1])[[0, 2, 4]].mean())
    assert mean_gain(gains, "b").failed == 0


def test_a_method_without_a_finished_run_has_no_standing_and_is_named():
    values = random_table(3, 3).values
    values[1] = np.nan
    gains = table(values, frozenset(("b", k) for k in range(3)))
    ranking = compare(gains)
    assert ranking.unfinished == ("b",)
    assert {s.algorithm for s in ranking.standings} == {"a", "c"}
    with pytest.raises(UsageError, match="'b' has no finished run"):
        mean_gain(gains, "b")
    with pytest.raises(UsageError, match="no algorithm has a finished run"):
        compare(table(np.full((2, 2, 3), np.nan)))


def test_a_pair_without_common_seeds_is_not_told_apart():
    values = random_table(2, 4).values
    values[0] += 100
    values[0, :2], values[1, 2:] = np.nan, np.nan
    (pair,) = compare(table(values)).pairs
    assert (pair.p, pair.difference.low, pair.difference.seeds) == (1.0, None, 0)
    with pytest.raises(UsageError, match="no finished seed in common"):
        difference(table(values), "a", "b")


@pytest.mark.parametrize(
    ("values", "failed", "message"),
    [
        (np.zeros((2, 3)), set(), "have shape"),
        (np.array([[[0.0, np.nan]], [[0.0, 0.0]]]), set(), "some prompts only"),
        (np.zeros((2, 1, 3)), {("a", 0)}, "failed run has values"),
        (np.zeros((2, 1, 3)), {("z", 0)}, "failed run has values"),
    ],
)
def test_gains_that_do_not_fit_are_refused(values: np.ndarray, failed: set[tuple[str, int]], message: str):
    with pytest.raises(ValueError, match=message):
        Gains(("a", "b"), (0,), values, frozenset(failed))


def test_an_unknown_algorithm_is_named_with_the_nearest():
    gains = Gains(("acflow", "nft"), (0,), np.zeros((2, 1, 3)))
    with pytest.raises(UsageError, match=re.escape("unknown algorithm 'acflw'; did you mean 'acflow'?")):
        mean_gain(gains, "acflw")


def test_gains_come_from_records_and_what_cannot_be_compared_is_refused():
    records = [r for r in find_records([RECORDS]) if r.algorithm in ("nft", "ddpo") and r.seed < 3]
    gains = gains_from_records(records, "clip", "test", failed=[("nft", 9)])
    assert gains.values.shape == (2, 4, PROMPTS)
    mean = np.mean([r.scores["clip/test"].change for r in records if r.algorithm == "nft"])
    assert mean_gain(gains, "nft").value == pytest.approx(mean, abs=1e-6)
    assert mean_gain(gains, "nft").failed == 1
    with pytest.raises(UsageError, match="two records are of"):
        gains_from_records([*records, records[0]], "clip", "test")
    with pytest.raises(UsageError, match="no record has per-prompt values of 'nothing/test'"):
        gains_from_records(records, "nothing", "test")
    first = records[0]
    other = first.model_copy(update={"seed": 7, "prompts": {"test": first.prompts["test"][::-1]}})
    with pytest.raises(UsageError, match="other test prompts"):
        gains_from_records([*records, other], "clip", "test")


# Pairs, ranks and the first place.


def test_holms_correction_of_known_p_values():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.9, 0.8])) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("over", BOTH)
def test_methods_far_apart_have_each_their_rank(over: Over):
    values = 0.1 * random_table(4, 5).values + np.array([0.0, 3.0, 1.0, 2.0])[:, None, None]
    ranking = compare(table(values), over)
    assert [s.algorithm for s in ranking.standings] == ["b", "d", "c", "a"]
    assert [s.rank for s in ranking.standings] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert ranking.first == ("b",)
    assert all(p.difference.value > 0 and p.p <= p.p_holm < 1e-3 for p in ranking.pairs)


def test_equal_methods_share_the_first_place_and_every_rank():
    ranking = compare(table(np.tile(random_table(1, 3).values, (4, 1, 1))))
    assert len(ranking.first) == 4
    assert {s.rank for s in ranking.standings} == {(1, 4)}
    assert {p.p for p in ranking.pairs} == {1.0}


def test_no_pair_contradicts_the_first_place():
    for seed in range(20):
        shifts = np.random.default_rng(seed).normal(scale=0.3, size=(METHODS, 1, 1))
        ranking = compare(table(random_table(METHODS, 3, seed=seed).values + shifts))
        beaten = {p.other if p.difference.value > 0 else p.one for p in ranking.pairs if p.p_holm <= 0.05}
        assert not beaten & set(ranking.first)
        assert ranking.standings[0].algorithm in ranking.first
        assert all((s.rank[0] == 1) == s.shares_first for s in ranking.standings if s.algorithm not in beaten)


def test_a_table_of_one_method_is_its_own_first():
    ranking = compare(random_table(1, 3))
    assert (ranking.first, ranking.pairs, ranking.standings[0].rank) == (("a",), (), (1, 1))


def test_a_pair_alone_is_tested_by_its_own_variance():
    gains = random_table(2, 3)
    (pair,) = compare(gains).pairs
    alone = difference(gains, pair.one, pair.other)
    assert (pair.difference.low, pair.difference.high) == pytest.approx((alone.low, alone.high))
    assert pair.p == pair.p_holm


def test_a_table_says_what_few_seeds_of_a_pair_cannot():
    values = random_table(METHODS, 3).values
    one, other = np.triu_indices(METHODS, 1)
    ms = mean_squares(values[one] - values[other])
    shrunk = moderated(ms, METHODS)
    assert np.ptp(shrunk.by_seed) < 0.5 * np.ptp(ms.by_seed)
    assert set(shrunk.seeds_df) == {8.0}
    assert moderated(ms, 2).by_seed == pytest.approx(ms.by_seed)


# Targets, profiles, power and judges.


def run_of(*values: float, kept: tuple[float, ...] = (1.0,) * 5, finished: bool = True) -> Trajectory:
    costs = (100.0, 200.0, 300.0, 400.0, 500.0)[: len(values)]
    return Trajectory(costs, values, kept[: len(values)], base=0.0, finished=finished)


@pytest.mark.parametrize(
    ("run", "cost"),
    [
        (run_of(0.1, 0.3, 0.6, 0.7, 0.8), 100 * (2 + 0.2 / 0.3)),
        (run_of(1.0, 1.0, 1.0, 1.0, 1.0), 50.0),
        (run_of(0.1, 0.6, 0.4, 0.6, 0.7), 350.0),  # once above is not reached
        (run_of(0.1, 0.1, 0.1, 0.1, 0.9), 450.0),  # the end counts
        (run_of(0.1, 0.1, 0.1, 0.1, 0.4), math.inf),
        (run_of(0.1, 0.9, finished=False), math.inf),  # it broke off there
        (run_of(0.1, 0.9, 0.9, finished=False), 150.0),
        (run_of(0.1, 0.9, 0.9, 0.9, 0.9, kept=(1.0, 0.8, 0.8, 0.8, 0.8)), math.inf),
        (run_of(0.9, 0.9, 0.9, 0.9, 0.9, kept=(1.0, 0.8, 0.8, 1.0, 1.0)), 350.0),  # until diversity is back
        (run_of(0.1, 0.1, 0.1, 0.1, math.nan), math.inf),
        (run_of(0.1, math.nan, 0.9, 0.9, 0.9), 300.0),
    ],
)
def test_the_cost_to_a_target_is_interpolated_between_points(run: Trajectory, cost: float):
    assert cost_to_target(run, 0.5) == pytest.approx(cost)


def test_a_base_model_that_is_at_the_target_costs_nothing():
    assert cost_to_target(Trajectory((1.0, 2.0), (0.6, 0.6), (1.0, 1.0), base=0.5), 0.5) == 0


def test_runs_that_fail_or_never_arrive_stay_as_infinity():
    good, bad = run_of(0.0, 1.0, 1.0, 1.0, 1.0), run_of(0.0, 0.0, 0.0, 0.0, 0.0)
    found = reached([good, bad], 0.5, failed=1)
    assert found.costs == (150.0, math.inf, math.inf)
    assert found.median == math.inf
    assert found.share == pytest.approx(1 / 3)
    assert reached([good, good, bad], 0.5).median == 150.0
    with pytest.raises(ValueError, match="at least one run"):
        reached([], 0.5)


@pytest.mark.parametrize("cost", [(2.0, 1.0), (0.0, 1.0), (1.0,)])
def test_points_of_a_run_that_are_not_in_order_are_refused(cost: tuple[float, ...]):
    with pytest.raises(ValueError, match=r"increase|lengths"):
        Trajectory(cost, (0.0, 1.0), (1.0, 1.0), base=0.0)


def test_a_performance_profile_of_known_costs():
    costs = {"fast": [1.0, 4.0, math.inf], "slow": [2.0, 2.0, math.inf], "lost": [math.inf] * 3}
    found = performance_profile(costs, [1, 2, 4])
    assert found.shares.tolist() == [
        pytest.approx([1 / 3, 2 / 3, 2 / 3]),
        pytest.approx([1 / 3, 2 / 3, 2 / 3]),
        [0, 0, 0],
    ]
    assert found.area == pytest.approx([7 / 12, 7 / 12, 0])
    assert performance_profile({"only": [3.0, 5.0]}, [1, 4]).area == pytest.approx([1.0])
    with pytest.raises(ValueError, match="on each workload"):
        performance_profile({"a": [1.0], "b": [1.0, 2.0]}, [1, 2])
    with pytest.raises(ValueError, match="begin with 1"):
        performance_profile(costs, [2, 1])


def test_the_smallest_difference_falls_with_seeds_and_grows_with_the_table():
    part = MEASURED["acflow - awm, oracle_exact"]
    for over in BOTH:
        sizes = [smallest_difference(part, k, PROMPTS, over) for k in (2, 3, 5, 10, 100)]
        assert sizes == sorted(sizes, reverse=True)
        assert smallest_difference(part, 5, PROMPTS, over, methods=12) > sizes[2]
    assert smallest_difference(part, 1, PROMPTS) == math.inf
    assert smallest_difference(part, 3, 1, LIKE) == math.inf
    # With many seeds over these prompts it is that of a normal test.
    error = math.sqrt((part.seeds**2 + part.residual**2 / PROMPTS) / 4000)
    normal = (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * error
    assert smallest_difference(part, 4000, PROMPTS, THESE) == pytest.approx(normal, rel=2e-3)


def test_rank_correlations_are_scipys_and_their_interval_is_over_runs():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=60)
    judge, runs = truth + rng.normal(size=60), np.repeat(np.arange(12), 5)
    kendall, spearman = (rank_correlation(judge, truth, runs, kind) for kind in ("kendall", "spearman"))
    assert kendall.value == pytest.approx(stats.kendalltau(judge, truth).statistic)
    assert spearman.value == pytest.approx(stats.spearmanr(judge, truth).statistic)
    for found in (kendall, spearman):
        assert -1 <= found.low < found.value < found.high <= 1
        assert (found.checkpoints, found.runs) == (60, 12)
    assert rank_correlation(judge, truth, runs % 2).low is None  # two runs
    assert rank_correlation(truth, truth, runs).low == pytest.approx(1.0)
    assert math.isnan(rank_correlation(np.ones(60), truth, runs).value)
    with pytest.raises(ValueError, match="not finite"):
        rank_correlation(np.full(60, np.nan), truth, runs)


def test_the_interval_of_a_rank_correlation_holds_the_truth_though_checkpoints_of_a_run_resemble_each_other():
    """Of bivariate normal values tau is 2/pi arcsin of their correlation, here 0.8 between runs and within."""
    rng, hits, truth = np.random.default_rng(0), 0, 2 / math.pi * math.asin(0.8)
    runs = np.repeat(np.arange(12), 5)
    for _ in range(100):
        parts = rng.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], size=(12, 1))
        pairs = (parts + 0.5 * rng.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], size=(12, 5))).reshape(60, 2)
        found = rank_correlation(pairs[:, 0], pairs[:, 1], runs)
        hits += found.low <= truth <= found.high
    assert 0.89 <= hits / 100 <= 0.99
