"""Simulated gains with known truth: how often intervals cover it, and how often tables claim what is not so.

`python tests/simulated_statistics.py` prints the tables of docs/statistics.md; it takes some minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from flowbench.evaluation.statistics.crossed import LIKE, THESE, Components, MeanSquares, Over, half_width, mean_squares
from flowbench.evaluation.statistics.gains import Gains
from flowbench.evaluation.statistics.means import interquartile_mean, probability_of_improvement
from flowbench.evaluation.statistics.ranking import Verdict, verdict

PROMPTS, METHODS, CHUNK = 119, 12, 50
ARRAYS = ("mean", "by_seed", "by_prompt", "residual", "seeds", "seeds_df")
SEEDS = (3, 5, 10)
UPPER = np.triu_indices(METHODS, 1)

# Measured on the 44 records of a491fb1: gains of single methods, and paired differences of two.
MEASURED = {
    "acflow, oracle_exact": Components(0.18, 0.0, 0.15),
    "awm, oracle_exact": Components(0.22, 0.009, 0.16),
    "ddpo, oracle_exact": Components(0.11, 0.018, 0.14),
    "acflow, clip": Components(0.052, 0.004, 0.037),
    "nft, clip": Components(0.048, 0.002, 0.037),
    "acflow - awm, oracle_exact": Components(0.139, 0.0105, 0.203),
    "acflow - nft, oracle_exact": Components(0.0, 0.0, 0.194),
    "adrpo - awm, oracle_exact": Components(0.172, 0.0283, 0.194),
    "acflow - adrpo, clip": Components(0.007, 0.0064, 0.051),
}

# Tables of twelve methods: what of each method's components is its own, so that pairs differ by two of them.
SAME = np.ones(METHODS)
TABLES = {
    "no spread between seeds": (0.08 * SAME, 0.0 * SAME, 0.14 * SAME),
    "seeds as measured": (
        np.array([0.12, 0.08, 0.15, 0.05, 0.06, 0.1, 0.05, 0.1, 0.12, 0.04, 0.08, 0.1]),
        np.array([0, 0.0129, 0.009, 0.0176, 0, 0, 0.0118, 0, 0.0065, 0, 0.0049, 0]),
        np.array([0.148, 0.119, 0.159, 0.136, 0.133, 0.142, 0.124, 0.142, 0.155, 0.088, 0.093, 0.171]),
    ),
    "three methods of twelve spread": (0.08 * SAME, np.array([0.025] * 3 + [0.0] * 9), 0.14 * SAME),
    "seeds as noisy as the rest": (0.05 * SAME, 0.03 * SAME, 0.14 * SAME),
}
EQUAL = np.zeros(METHODS)
SOME_WORSE = np.array([0.0] * 4 + [-0.04] * 4 + [-0.12] * 4)

TAILS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "t3": lambda rng, shape: rng.standard_t(3, shape) / np.sqrt(3),  # variance 1, no fourth moment
    "skewed": lambda rng, shape: rng.exponential(size=shape) - 1,
}


def gains(
    rng: np.random.Generator, lead: tuple[int, ...], seeds: int, part: tuple[np.ndarray, ...], tail: str
) -> tuple[np.ndarray, np.ndarray]:
    """Values (*lead, K, P) of mean 0 over prompts like these, and their means over these prompts, (*lead,)."""
    draw = TAILS[tail]
    prompt, seed, residual = (np.asarray(sd)[..., None, None] for sd in part)
    of_prompts = prompt * draw(rng, (*lead, 1, PROMPTS))
    values = of_prompts + seed * draw(rng, (*lead, seeds, 1)) + residual * draw(rng, (*lead, seeds, PROMPTS))
    return values, of_prompts.mean((-1, -2))


def coverage(seeds: int, c: Components, tail: str, over: Over, repeats: int) -> float:
    """The share of 95 % intervals of a mean that hold the truth."""
    rng, hits = np.random.default_rng(seeds), 0
    for _ in range(repeats // 500):
        part = (np.array(c.prompts), np.array(c.seeds), np.array(c.residual))
        values, of_these = gains(rng, (500,), seeds, part, tail)
        truth = of_these if over == THESE else 0.0
        ms = mean_squares(values)
        hits += int((np.abs(ms.mean - truth) <= half_width(ms, over, 0.95)).sum())
    return hits / (repeats // 500 * 500)


def coverage_of_others(seeds: int, c: Components, repeats: int) -> tuple[float, float]:
    """The same of interquartile mean and probability of improvement, of symmetric gains around 0 and 1/2."""
    rng, hits = np.random.default_rng(seeds), np.zeros(2)
    part = (np.array(c.prompts), np.array(c.seeds), np.array(c.residual))
    for _ in range(repeats):
        values, _ = gains(rng, (2,), seeds, part, "normal")
        table = Gains(("a", "b"), tuple(range(seeds)), values)
        found = (interquartile_mean(table, "a"), probability_of_improvement(table, "a", "b"))
        hits += [i.low <= truth <= i.high for i, truth in zip(found, (0.0, 0.5), strict=True)]
    return float(hits[0] / repeats), float(hits[1] / repeats)


def squares_of_pairs(values: np.ndarray) -> MeanSquares:
    """mean_squares of the differences of all pairs of tables (T, A, K, P), (T, m), from products of methods: faster."""
    k, p = values.shape[-2:]
    mean, of_seeds, of_prompts = values.mean((-1, -2)), values.mean(-1), values.mean(-2)
    residual = values - of_seeds[..., None] - of_prompts[..., None, :] + mean[..., None, None]

    def lengths(x: np.ndarray) -> np.ndarray:
        products = x @ np.swapaxes(x, -1, -2)
        own = np.diagonal(products, axis1=-2, axis2=-1)
        return own[:, UPPER[0]] + own[:, UPPER[1]] - 2 * products[:, UPPER[0], UPPER[1]]

    shape = (len(values), len(UPPER[0]))
    return MeanSquares(
        mean=mean[:, UPPER[0]] - mean[:, UPPER[1]],
        by_seed=p * lengths(of_seeds - mean[..., None]) / (k - 1),
        by_prompt=k * lengths(of_prompts - mean[..., None]) / (p - 1),
        residual=lengths(residual.reshape(*values.shape[:2], k * p)) / ((k - 1) * (p - 1)),
        seeds=np.full(shape, k),
        seeds_df=np.full(shape, k - 1.0),
        prompts=p,
    )


def verdicts(
    seeds: int, part: tuple[np.ndarray, ...], tail: str, over: Over, repeats: int, means: np.ndarray
) -> Iterator[Verdict]:
    """What simulated tables say."""
    rng = np.random.default_rng(seeds)
    for _ in range(repeats // CHUNK):
        values, of_these = gains(rng, (CHUNK, METHODS), seeds, part, tail)
        if over == THESE:
            values = values - of_these[..., None, None]  # equal on these prompts
        values = values + means[:, None, None]
        tables = squares_of_pairs(values)
        for k in range(CHUNK):
            arrays = {
                n: getattr(tables, n)[k] for n in ("mean", "by_seed", "by_prompt", "residual", "seeds", "seeds_df")
            }
            yield verdict(MeanSquares(**arrays, prompts=PROMPTS), METHODS, over)


@dataclass(frozen=True)
class FalseClaims:
    """Shares of tables: where a best method does not share the first place; where a rank excludes the true one."""

    first: float
    rank: float
    any: float


def false_claims(seeds: int, name: str, tail: str, over: Over, repeats: int, means: np.ndarray = EQUAL) -> FalseClaims:
    """How often simulated tables claim what is not so."""
    above, below = (means[None] > means[:, None]).sum(1), (means[None] < means[:, None]).sum(1)
    wrong = []
    for v in verdicts(seeds, TABLES[name], tail, over, repeats, means):
        # A rank from 2 on because a method does not share the first place is the first claim, not the second.
        best = np.where(~v.first & (v.best == 2), 1, v.best)
        wrong.append(((~v.first & (above == 0)).any(), (best > 1 + above).any() or (v.worst < METHODS - below).any()))
    table = np.array(wrong, dtype=bool)
    return FalseClaims(*table.mean(0).tolist(), float(table.any(1).mean()))


def found_pairs(seeds: int, name: str, over: Over, repeats: int, size: float) -> float:
    """The share of pairs that Holm's correction finds in a table where one method alone is better, by `size`."""
    means = np.array([size] + [0.0] * (METHODS - 1))
    found = [METHODS - v.worst[0] for v in verdicts(seeds, TABLES[name], "normal", over, repeats, means)]
    return float(np.mean(found) / (METHODS - 1))


def main() -> None:
    """Print the tables of docs/statistics.md."""
    percent = lambda x: f"{100 * x:.1f}"  # noqa: E731
    for over in (LIKE, THESE):
        print(f"\ncoverage, {over}")
        for name, c in MEASURED.items():
            row = [coverage(k, c, tail, over, 10000) for k, tail in product(SEEDS, ("normal", "t3"))]
            print(f"| {name} |", " | ".join(map(percent, row)), "|", flush=True)
    print("\ncoverage, interquartile mean and probability of improvement")
    for name in ("awm, oracle_exact", "ddpo, oracle_exact"):
        print(f"| {name} |", *(percent(x) for k in SEEDS for x in coverage_of_others(k, MEASURED[name], 2000)))
    for over, means in ((LIKE, EQUAL), (LIKE, SOME_WORSE), (THESE, EQUAL)):
        print(f"\nfalse claims (first / rank / any), {over}, {'equal' if means is EQUAL else 'some worse'}")
        for name in TABLES:
            cells = [false_claims(k, name, t, over, 1000, means) for k, t in product(SEEDS, ("normal", "t3"))]
            texts = [" / ".join(map(percent, (c.first, c.rank, c.any))) for c in cells]
            print(f"| {name} |", " | ".join(texts), "|", flush=True)
    print("\npairs found")
    for name, over in product(TABLES, (LIKE, THESE)):
        print(f"| {name}, {over} |", *(percent(found_pairs(k, name, over, 200, 0.07)) for k in SEEDS), flush=True)


if __name__ == "__main__":
    main()
