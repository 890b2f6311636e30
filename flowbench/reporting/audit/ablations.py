"""The claims that rest on ablations: whether its stabilisers prevent collapse, and whether a light critic suffices."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowbench.evaluation.statistics import Interval, difference, gains_from_records
from flowbench.record import Record
from flowbench.reporting.audit.claim import (
    FLAGSHIP,
    NOT_SUPPORTED,
    SUPPORTED,
    UNDECIDED,
    Claim,
    Finding,
    Verdict,
    above,
    made,
)
from flowbench.reporting.leaderboard import TRUTH, over_seeds
from flowbench.reporting.targets import DIVERSITY
from flowbench.terms import trained_metrics

DEGRADED, COLLAPSED = -0.05, 0.5  # change of truth, and share of the base model's diversity, below which a run is lost
RARE = 0.25  # collapse of fewer runs than this is none that stabilisers would have to prevent
MARGIN = 0.25  # of the light critic's gain over no critic: what a heavier one may gain more
SPLIT = "test"
# Stabilisers by the setting that switches them off.
STABILISERS: Mapping[tuple[str, Any], str] = {
    ("hyperparameters.clip", None): "clipping of advantages",
    ("hyperparameters.warmup", 0): "warm-up of the critic",
    ("hyperparameters.shaping", "none"): "reward shaping",
    ("hyperparameters.alpha", 0.0): "Wasserstein-2 regularisation",
}
CRITIC = "hyperparameters.critic"
LIGHT, WITHOUT, HEAVIER = "shaped", "none", ("sees", "preview")
ABLATIONS = f"runs of `flowbench ablate {FLAGSHIP}`, at the same seeds for all variants"


@dataclass(frozen=True)
class Study:
    """Ablations of one algorithm on one model and reward: the default, and variants that change one setting each."""

    name: str
    default: tuple[Record, ...]
    variants: Mapping[tuple[str, str], tuple[Record, ...]]  # by setting and its value as JSON


def studies(records: Iterable[Record], algorithm: str = FLAGSHIP) -> list[Study]:
    """The ablations among some records: those of no workload, by what they have in common.

    The default is the setting from which every other differs in one place; where two variants or fewer leave that open,
    and where several settings changed at once, there is no study.
    """
    found: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for r in records:
        if r.algorithm == algorithm and r.workload is None:
            images = str(r.config.get("training", {}).get("images"))
            found[r.model, r.reward, images, r.protocol_hash, r.commit or ""].append(r)
    made = (_study(f"{key[0]} / {key[1]}, {key[2]} images", runs) for key, runs in sorted(found.items()))
    return [study for study in made if study is not None]


def _study(name: str, records: Sequence[Record]) -> Study | None:
    by_settings: dict[str, list[Record]] = defaultdict(list)
    for r in records:
        by_settings[json.dumps(_flat(r.config), sort_keys=True)].append(r)
    settings = {key: json.loads(key) for key in by_settings}
    centres = [
        key
        for key in settings
        if len(settings) > 2 and all(len(_changed(settings[key], settings[o])) == 1 for o in settings if o != key)
    ]
    if len(centres) != 1:
        return None
    default = centres[0]
    variants = {}
    for key, runs in by_settings.items():
        if key != default:
            (setting,) = _changed(settings[default], settings[key])
            variants[setting, json.dumps(settings[key].get(setting))] = tuple(runs)
    return Study(name, tuple(by_settings[default]), variants)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a run, by full names."""
    sections = ((name, config.get(name)) for name in ("training", "hyperparameters"))
    return {f"{name}.{key}": value for name, s in sections if isinstance(s, dict) for key, value in s.items()}


def _changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]


def prevents_collapse(found: Sequence[Study]) -> Claim:
    """3: without its stabilisers it collapses."""
    findings, ran, lost = [], 0, 0
    for study in found:
        removed = list(_removed(study))
        for what, runs in removed:
            findings.append(_collapses(study, what, runs, len(removed)))
            ran, lost = ran + len(runs), lost + sum(map(collapsed, runs))
    verdict: Verdict = UNDECIDED
    share = _largest_share(lost, ran) if ran else 1.0
    if any(f.says == SUPPORTED for f in findings):
        verdict = SUPPORTED
    elif share < RARE:
        verdict = NOT_SUPPORTED
    return made(
        "Its stabilisers prevent collapse.",
        "Runs that collapsed (failed, scores that are not finite, diversity below half of the base model's, or truth "
        f"down by more than {-DEGRADED}) with each stabiliser switched off and with all on: supported if one of them "
        "more than the default (Fisher's exact test, 5 %, Bonferroni over the stabilisers), not supported if so few "
        f"collapse without them that a share of {RARE:.0%} is excluded (Clopper and Pearson, 95 %).",
        ABLATIONS,
        findings,
        verdict,
        f"{lost} of {ran} runs without one of them collapsed, so that at most {share:.0%} do (95 %)",
    )


def _removed(study: Study) -> Iterator[tuple[str, tuple[Record, ...]]]:
    for (setting, value), what in STABILISERS.items():
        for (name, spelled), runs in study.variants.items():
            if name == setting and json.loads(spelled) == value and not isinstance(json.loads(spelled), bool):
                yield what, runs


def _collapses(study: Study, what: str, runs: Sequence[Record], tests: int) -> Finding:
    from scipy import stats

    without, usual = sum(map(collapsed, runs)), sum(map(collapsed, study.default))
    table = [[without, len(runs) - without], [usual, len(study.default) - usual]]
    p = float(stats.fisher_exact(table, alternative="greater").pvalue) * tests
    note = f"{without} of {len(runs)} runs collapsed without, {usual} of {len(study.default)} with it"
    return Finding(f"{study.name}: {what}", None, SUPPORTED if p <= 0.05 else UNDECIDED, "text", note)


def _largest_share(count: int, n: int, level: float = 0.95) -> float:
    """The upper end of the one-sided exact interval of a share (Clopper and Pearson 1934, Biometrika 26, 404-413)."""
    from scipy import special

    return 1.0 if count >= n else float(special.betaincinv(count + 1, n - count, level))


def collapsed(record: Record) -> bool:
    """Whether a run ended with nothing that anybody would use."""
    if record.status == "failed":
        return True
    ends = {key.split("/")[0]: score for key, score in record.scores.items() if key.split("/")[1:] == [SPLIT]}
    if not all(math.isfinite(score.tuned) for score in ends.values()):
        return True
    diversity, truth = ends.get(DIVERSITY), ends.get(TRUTH)
    flat = diversity is not None and diversity.base > 0 and diversity.tuned / diversity.base < COLLAPSED
    return flat or (truth is not None and truth.change < DEGRADED)


def light_critic_suffices(found: Sequence[Study]) -> Claim:
    """5: a light critic is enough."""
    findings: list[Finding] = []
    for study in found:
        critics = _critics(study)
        if LIGHT not in critics or WITHOUT not in critics:
            continue
        use = _compared(critics, LIGHT, WITHOUT)
        mine = [Finding(f"{study.name}: light critic minus none", use, above(use))]
        gain = use.value if use is not None else math.nan
        for name in HEAVIER:
            if name in critics:
                more = _compared(critics, name, LIGHT)
                mine.append(Finding(f"{study.name}: critic '{name}' minus light", more, _enough(more, gain)))
        if len(mine) == 1:  # that it helps does not say that more would not help more
            mine.append(Finding(f"{study.name}: a heavier critic", None, UNDECIDED, "text", "no runs"))
        findings += mine
    return made(
        "A light critic suffices.",
        "Gain (truth where it is known, else the reward trained on) with the light critic minus without one, and with "
        "each heavier critic minus the light one, paired by seed and prompt: supported if the light one is above none "
        f"and no heavier one gains more than {MARGIN:.0%} of that beyond it, not supported if none is better than it, "
        "or a heavier one gains more.",
        ABLATIONS,
        findings,
    )


def _critics(study: Study) -> dict[str, tuple[Record, ...]]:
    """Finished runs by their critic, all other settings being the same."""
    usual = str(study.default[0].config["hyperparameters"].get("critic"))
    found = {usual: study.default}
    found |= {json.loads(value): runs for (name, value), runs in study.variants.items() if name == CRITIC}
    done = {name: tuple(r for r in runs if r.status == "finished") for name, runs in found.items()}
    return {name: runs for name, runs in done.items() if runs}


def _compared(critics: Mapping[str, Sequence[Record]], one: str, other: str) -> Interval | None:
    records = [*critics[one], *critics[other]]
    names = {id(r): name for name in (one, other) for r in critics[name]}
    metrics = (TRUTH, *sorted(trained_metrics(records[0].reward)), "reward")
    for metric in metrics:
        key = f"{metric}/{SPLIT}"
        if all(key in r.per_prompt for r in records):
            gains = gains_from_records(records, metric, SPLIT, label=lambda record: names[id(record)])
            return difference(gains, one, other) if gains.paired(one, other).shape[1] else None
        if all(key in r.scores for r in records):
            mine, theirs = ({r.seed: r.scores[key].change for r in critics[name]} for name in (one, other))
            both = sorted(mine.keys() & theirs.keys())
            return over_seeds([mine[seed] - theirs[seed] for seed in both]) if both else None
    return None


def _enough(more: Interval | None, gain: float) -> Verdict:
    """Whether what a heavier critic adds is little beside what the light one adds."""
    if more is None or more.low is None or more.high is None:
        return UNDECIDED
    if more.low > 0:
        return NOT_SUPPORTED
    return SUPPORTED if more.high <= MARGIN * gain else UNDECIDED
