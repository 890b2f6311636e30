"""Over-optimisation, what judges are worth, and the flagship's claims: verdicts of records made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from flowbench.record import Point, Record, Score, Spent
from flowbench.reporting.audit.ablations import collapsed, studies
from flowbench.reporting.audit.claim import Claim, above
from flowbench.reporting.audit.claims import claims, claims_page
from flowbench.reporting.audit.documents import draw, over_optimisation
from flowbench.reporting.audit.judges import MEAN, judges
from flowbench.reporting.audit.optimisation import Path as Way
from flowbench.reporting.audit.optimisation import paths
from flowbench.reporting.leaderboard import Board, Table, board

PROMPTS = 12
HELD = ("hpsv2", "pickscore")
Curve = Sequence[float]


def run(
    algorithm: str = "acflow",
    seed: int = 0,
    gains: Mapping[str, float] | None = None,
    curves: Mapping[str, Curve] | None = None,
    seconds: float = 10.0,
    config: Mapping[str, Any] | None = None,
    **changed: Any,
) -> Record:
    """A run with these gains on test, and these gains at the points of its budget."""
    noise = np.random.default_rng([seed, *algorithm.encode()]).normal(size=PROMPTS)
    given = {"clip": 0.02, "oracle_exact": 0.1, **dict.fromkeys(HELD, 0.05), "diversity": 0.0, **(gains or {})}
    per_prompt, scores = {}, {}
    for place, (metric, gain) in enumerate(given.items()):
        base = 1.0 + 0.1 * np.random.default_rng(place).normal(size=PROMPTS)
        tuned = base + gain + 0.004 * noise
        per_prompt[f"{metric}/test"] = {"base": base.tolist(), "tuned": tuned.tolist()}
        scores[f"{metric}/test"] = Score(base=base.mean(), tuned=tuned.mean(), diff_ci95=(0, 0))
    length = len(next(iter(curves.values()))) if curves else 0
    points = tuple(
        Point(
            images=100 * (t + 1),
            iteration=t + 1,
            seconds=float(t + 1),
            function_evaluations=t + 1,
            scores={metric: 0.5 + curve[t] for metric, curve in (curves or {}).items()},
        )
        for t in range(length)
    )
    spent = {"images": 500, "reward_calls": 500, "function_evaluations": 500, "seconds": seconds}
    values: dict[str, Any] = {
        "version": 2,
        "algorithm": algorithm,
        "reward": "clip",
        "model": "mini-sd3",
        "seed": seed,
        "budget": Spent(**spent, evaluation_seconds=1, overhead=0, peak_memory_mb=1),
        "scores": scores,
        "per_prompt": per_prompt,
        "prompts": {"test": [f"p{k}" for k in range(PROMPTS)]},
        "config": {"training": {"images": 500}, "hyperparameters": dict(config or {})},
        "config_hash": f"{algorithm}-{sorted((config or {}).items())}",
        "protocol_hash": "protocol",
        "prompt_hashes": {},
        "reward_provenance": {},
        "judges": {name: {} for name in HELD},
        "command": "flowbench run",
        "commit": "a" * 40,
        "device": "cpu",
        "versions": {},
        "finished": "2026-01-01T00:00:00+00:00",
        "points": points,
        "dev_base": dict.fromkeys(curves or {}, 0.5),
        "ruleset": "defaults",
        "workload": "shapes-clip",
    }
    return Record(**{**values, **changed})


def failed(record: Record) -> Record:
    return record.model_copy(
        update={"status": "failed", "failure": "nan", "scores": {}, "per_prompt": {}, "points": ()}
    )


def seeds(n: int = 5, **run_of: Any) -> list[Record]:
    return [run(seed=seed, **run_of) for seed in range(n)]


def one_table(records: Sequence[Record]) -> Table:
    (table,) = board(records).tables
    return table


# --- over-optimisation ------------------------------------------------------------------------------------------------

RISING, TURNING = (0.02, 0.04, 0.06, 0.08, 0.10), (0.05, 0.10, 0.06, 0.02, -0.02)


def walked(truth: Curve, judge: Curve = RISING, n: int = 4, **run_of: Any) -> Way:
    """The only method of runs with this truth, jittered from seed to seed."""
    records = []
    for seed in range(n):
        moved = [value + 0.001 * ((seed * (t + 1)) % 3) for t, value in enumerate(truth)]
        curves = {"clip": RISING, "oracle_exact": moved, "hpsv2": judge, "pickscore": judge, "diversity": (0.5,) * 5}
        records.append(run(seed=seed, curves={**curves, "w2": RISING}, **run_of))
    (path,) = paths(one_table(records))
    return path


def test_a_method_whose_truth_turns_down_is_over_optimised_and_where_it_peaked_is_said():
    path = walked(TURNING)
    assert path.over_optimised
    assert path.peak is not None
    assert path.lost is not None
    assert path.peak.value == 200
    assert path.lost.value == pytest.approx(0.12, abs=0.003)
    assert [step.images for step in path.steps] == [0, 100, 200, 300, 400, 500]
    assert path.end.proxy is not None
    assert path.end.proxy.value == pytest.approx(0.1)
    assert path.end.diversity is not None
    assert path.end.diversity.value == pytest.approx(2.0)  # a share of the base model's


def test_a_method_whose_truth_rises_to_the_end_is_not_over_optimised():
    path = walked(RISING)
    assert not path.over_optimised
    assert path.peak is not None
    assert (path.peak.value, path.peak.high) == (500, 500)


def test_what_was_lost_is_judged_at_a_point_that_other_seeds_chose():
    draw = np.random.default_rng(0)
    lost = []
    for _ in range(200):
        noise = 0.02 * draw.normal(size=(4, 5))
        records = [run(seed=k, curves={"clip": RISING, "oracle_exact": row.tolist()}) for k, row in enumerate(noise)]
        (path,) = paths(one_table(records))
        assert path.lost is not None
        lost.append(path.lost.value)
    assert abs(np.mean(lost)) < 3 * np.std(lost) / np.sqrt(len(lost))  # the best of five noisy points would be +0.02


def test_stopping_by_held_out_judges_keeps_the_truth_that_they_see():
    saw = walked(TURNING, judge=TURNING).kept
    blind = walked(TURNING, judge=RISING).kept
    assert saw is not None
    assert blind is not None
    assert saw.value == pytest.approx(0.12, abs=0.003)
    assert blind.value == 0


def test_without_points_truth_or_a_second_seed_nothing_is_claimed():
    assert paths(one_table(seeds())) == ()
    assert paths(one_table([run(reward="oracle", curves={"oracle_exact": TURNING})])) == ()
    single = walked(TURNING, n=1)
    assert single.lost is None
    assert not single.over_optimised
    one, other = run(curves={"oracle_exact": RISING}), run(seed=1, curves={"oracle_exact": RISING[:3]})
    assert paths(one_table([one, other])) == ()  # not the same points
    assert "nothing to say yet" in over_optimisation(Board(()))


def test_judges_are_ranked_by_how_they_order_checkpoints_as_the_truth_does():
    records = []
    for k, algorithm in enumerate(("acflow", "nft", "awm", "raft")):
        truth = [(0.01 + 0.02 * k) * (t + 1) for t in range(5)]
        records.append(
            run(
                algorithm,
                curves={"clip": RISING, "oracle_exact": truth, "hpsv2": truth, "pickscore": [-v for v in truth]},
            )
        )
    found = {judge.name: judge for judge in judges(one_table(records))}
    assert found["hpsv2"].correlation.value == pytest.approx(1)
    assert found["pickscore"].correlation.value == pytest.approx(-1)
    assert found["clip"].trained
    assert MEAN not in found  # it is the same for all: one judge's ranks are the other's turned round
    everything = [score for r in records for p in r.points for score in [p.scores["oracle_exact"]]]
    proxy = [p.scores["clip"] for r in records for p in r.points]
    assert found["clip"].correlation.value == pytest.approx(stats.kendalltau(proxy, everything).statistic)
    assert found["clip"].correlation.checkpoints == 20


def test_the_page_on_over_optimisation_shows_foreign_names_as_text_and_has_its_picture(tmp_path: Path):
    curves = {"clip": RISING, "oracle_exact": TURNING, "hpsv2": RISING, "w2": RISING}
    records = [run(name, seed, curves=curves) for name in ("a|b<script>", "acflow") for seed in range(3)]
    page = over_optimisation(board(records))
    assert r"a\|b\<script\>" in page
    assert "<script>" not in page
    assert "Over-optimised beyond the noise of seeds" in page
    written = draw(board(records), tmp_path)
    assert {path.suffix for path in written} == {".png", ".svg"}
    assert f"({tmp_path.name}/{written[1].name})" in over_optimisation(board(records), tmp_path.name)


# --- claims -----------------------------------------------------------------------------------------------------------


def verdicts(records: Sequence[Record]) -> list[str]:
    return [claim.verdict for claim in audited(records)]


def audited(records: Sequence[Record]) -> tuple[Claim, ...]:
    in_tables = [r for r in records if r.ruleset]
    return claims(board(in_tables).tables if in_tables else (), records)


def test_without_runs_every_claim_is_undecided_and_says_so():
    found = audited([])
    assert [(claim.verdict, claim.reason) for claim in found] == [("undecided", "no runs")] * 7
    assert claims_page(found).count("**Undecided**: no runs.") == 7


@pytest.mark.parametrize(
    ("truth", "verdict"),
    [((0.3, 0.1), "supported"), ((0.1, 0.3), "not supported"), ((0.2, 0.2), "undecided")],
)
def test_best_alignment_takes_the_first_place_alone(truth: tuple[float, float], verdict: str):
    names = ("acflow", "nft")
    records = [r for a, t in zip(names, truth, strict=True) for r in seeds(algorithm=a, gains={"oracle_exact": t})]
    assert audited(records)[0].verdict == verdict
    single = [run(a, gains={"oracle_exact": t}) for a, t in zip(names, truth, strict=True)]
    assert audited(single)[0].verdict == "undecided"
    assert audited(seeds())[0].reason == "no runs"  # nothing beside it


def test_one_workload_where_it_is_beaten_refutes_the_best_alignment():
    won = [r for a, t in (("acflow", 0.3), ("nft", 0.1)) for r in seeds(algorithm=a, gains={"oracle_exact": t})]
    beaten = [
        r
        for a, t in (("acflow", 0.1), ("nft", 0.3))
        for r in seeds(algorithm=a, gains={"oracle_exact": t}, workload="other")
    ]
    assert audited([*won, *beaten])[0].verdict == "not supported"
    assert audited(won)[0].verdict == "supported"


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        (dict.fromkeys(HELD, 0.05), "supported"),
        ({"hpsv2": 0.3, "pickscore": -0.05}, "not supported"),
        (dict.fromkeys(HELD, -0.05), "not supported"),
        (dict.fromkeys(HELD, 0.0), "undecided"),
    ],
)
def test_generalising_is_a_gain_of_the_judges_that_no_single_one_contradicts(gains: dict[str, float], verdict: str):
    assert audited(seeds(gains=gains))[1].verdict == verdict


@pytest.mark.parametrize(("change", "verdict"), [(-0.02, "supported"), (-0.2, "not supported"), (-0.1, "undecided")])
def test_diversity_is_kept_above_the_floor_of_the_rules(change: float, verdict: str):
    assert audited(seeds(gains={"diversity": change}))[3].verdict == verdict


@pytest.mark.parametrize(
    ("seconds", "verdict"),
    [((10, 10), "supported"), ((10, 40), "not supported"), ((10, 20), "undecided")],
)
def test_costing_more_is_a_ratio_to_every_baseline_without_a_critic(seconds: tuple[int, int], verdict: str):
    records = [run(seed=s, seconds=20 + s % 2) for s in range(5)]
    for name, cost in zip(("nft", "raft"), seconds, strict=True):
        records += [run(name, s, seconds=cost + (s + 1) % 2) for s in range(5)]
    records += [run("ddpo", s, seconds=1000) for s in range(5)]  # no baseline of its kind
    claim = audited(records)[5]
    assert claim.verdict == verdict
    assert len(claim.findings) == 2
    assert claim.findings[0].interval is not None
    assert claim.findings[0].interval.value == pytest.approx(20 / 10, abs=0.15)


def test_dependence_needs_both_a_varied_reward_and_a_varied_reference():
    clip = seeds(gains={"oracle_exact": 0.1})
    other = seeds(gains={"oracle_exact": 0.3}, reward="imagereward", workload="shapes-imagereward")
    same = seeds(gains={"oracle_exact": 0.1}, reward="imagereward", workload="shapes-imagereward")
    second = seeds(gains={"oracle_exact": 0.3}, model="mini-sd3-narrow", workload="narrow")
    assert audited(clip)[6].reason == "no runs"
    only_reward = audited([*clip, *other])[6]
    assert only_reward.verdict == "undecided"
    assert only_reward.reason.endswith("references: no runs")
    assert audited([*clip, *other, *second])[6].verdict == "supported"
    assert audited([*clip, *same, *second])[6].verdict == "not supported"


DEFAULT = {"critic": "shaped", "clip": 2.0, "warmup": 3, "shaping": "normalize", "alpha": 1.0}
ALONE = {"workload": None, "ruleset": None}


def ablated(
    n: int = 5, gains: Mapping[str, Mapping[str, float]] | None = None, lost: Sequence[str] = ()
) -> list[Record]:
    """The default and its variants, "setting=value"; gains by variant; `lost` are those whose runs all failed."""
    variants: dict[str, dict[str, Any]] = {"default": {}, "clip": {"clip": None}, "warmup": {"warmup": 0}}
    variants |= {"shaping": {"shaping": "none"}, "alpha": {"alpha": 0.0}}
    variants |= {f"critic {name}": {"critic": name} for name in ("none", "sees", "preview")}
    records = []
    for name, changed in variants.items():
        made = [run(seed=s, config={**DEFAULT, **changed}, gains=(gains or {}).get(name), **ALONE) for s in range(n)]
        records += map(failed, made) if name in lost else made
    return records


def test_an_ablation_is_a_default_from_which_every_variant_differs_in_one_setting():
    (study,) = studies(ablated())
    assert {r.config["hyperparameters"]["alpha"] for r in study.default} == {1.0}
    assert len(study.variants) == 7
    assert studies(seeds(config=DEFAULT)) == []  # of a workload: no ablation
    assert studies(ablated()[:10]) == []  # two settings: either may be the default
    two = run(config={**DEFAULT, "alpha": 0.0, "clip": None}, **ALONE)
    assert studies([*ablated(), two]) == []  # nobody knows which of both changed a result


def test_stabilisers_are_needed_where_runs_without_them_collapse_and_runs_with_them_do_not():
    found = audited(ablated(lost=("alpha",)))[2]
    assert found.verdict == "supported"
    assert "5 of 5 runs collapsed without, 0 of 5 with it" in {f.note for f in found.findings}
    assert audited(ablated())[2].verdict == "not supported"  # 0 of 20 runs
    assert audited(ablated(n=2))[2].verdict == "undecided"  # 0 of 8 exclude no share of a quarter
    assert audited(ablated(n=3, lost=("alpha",)))[2].verdict == "undecided"  # 3 of 3 against 0 of 3 is p = 0.2
    assert audited(ablated(lost=("alpha", "default")))[2].verdict == "undecided"


def test_a_run_has_collapsed_that_failed_or_lost_its_diversity_its_truth_or_its_numbers():
    assert not collapsed(run())
    assert collapsed(failed(run()))
    assert collapsed(run(gains={"diversity": -0.6}))
    assert collapsed(run(gains={"oracle_exact": -0.1}))
    assert collapsed(run(gains={"hpsv2": float("nan")}))


@pytest.mark.parametrize(
    ("none", "heavier", "verdict"),
    [
        (0.02, 0.1, "supported"),
        (0.02, 0.2, "not supported"),  # more would help
        (0.2, 0.1, "not supported"),  # none would be better
        (0.1, 0.1, "undecided"),  # it may do nothing at all
    ],
)
def test_a_light_critic_suffices_if_it_beats_none_and_heavier_ones_add_little(
    none: float, heavier: float, verdict: str
):
    gains = {"critic none": none, "critic sees": heavier, "critic preview": heavier}
    records = ablated(gains={name: {"oracle_exact": gain} for name, gain in gains.items()})
    claim = audited(records)[4]
    assert claim.verdict == verdict
    assert len(claim.findings) == 3


def test_a_light_critic_beside_no_heavier_one_decides_nothing_for_it():
    gains = {"critic none": {"oracle_exact": 0.0}}
    records = [r for r in ablated(gains=gains) if r.config["hyperparameters"]["critic"] in ("shaped", "none")]
    claim = audited(records)[4]
    assert claim.verdict == "undecided"
    assert claim.findings[1].note == "no runs"


def test_the_page_of_claims_has_tests_runs_and_intervals():
    records = [*seeds(gains={"oracle_exact": 0.3}), *seeds(algorithm="n|ft"), *ablated()]
    page = claims_page(audited(records))
    assert page.count("\nTest: ") == page.count("\nRuns: ") == 7
    assert r"acflow minus n\|ft" in page
    assert "| 1 | It reaches the best alignment. | **supported** |" in page
    assert above(None) == "undecided"
