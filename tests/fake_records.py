"""Made-up records of a whole suite: two workloads, twelve algorithms, points of the budget, judges and failures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flowbench.record import Costs, Point, Record, Score, Spent

METHODS = (
    *("acflow", "adrpo", "awm", "ddpo", "dpok", "draft", "flow-grpo", "nft", "online-dpo", "orw-cfm-w2"),
    *("raft", "refl"),
)
WORKLOADS = {"shapes-clip": "clip", "shapes-imagereward": "imagereward"}
JUDGES = ("aesthetic", "clip", "hpsv2", "imagereward", "pickscore")
POINTS = 5


def fake_records(
    seeds: int = 3,
    prompts: int = 24,
    methods: Sequence[str] = METHODS,
    workloads: Sequence[str] = tuple(WORKLOADS),
    points: bool = True,
    **changed: Any,
) -> list[Record]:
    """Records whose methods differ in how far they get; the last of twelve over-optimises and fails now and then."""
    return [
        fake_record(method, seed, k, workload, prompts, points, **changed)
        for workload in workloads
        for k, method in enumerate(methods)
        for seed in range(100, 100 + seeds)
    ]


def fake_record(
    method: str,
    seed: int,
    k: int = 0,
    workload: str = "shapes-clip",
    prompts: int = 24,
    points: bool = True,
    **changed: Any,
) -> Record:
    """One run; k decides how good it is."""
    reward = WORKLOADS.get(workload, "clip")
    draw = np.random.default_rng([k, seed, len(workload)])
    shared = np.random.default_rng([seed, len(workload)])
    good, failed = 0.10 - 0.008 * k, k == 11 and seed % 7 == 2
    metrics = {reward: 0.05, **{j: 0.02 for j in JUDGES if j != reward}, "oracle_exact": 1.0, "oracle_soft": 0.6}
    scores, each = {}, {}
    for place, (metric, scale) in enumerate({**metrics, "w2": 0.0, "diversity": 0.0}.items()):
        of_prompt = np.random.default_rng([place, len(workload)])
        base = 0.6 + 0.15 * of_prompt.normal(size=prompts) + 0.02 * shared.normal(size=prompts)
        gain = scale * good * (1 + of_prompt.normal(size=prompts)) + 0.1 * scale * draw.normal(size=prompts)
        if metric == "w2":
            base, gain = 0 * base, np.abs(0.02 + 0.004 * k + 0.002 * draw.normal(size=prompts))
        if metric == "diversity":
            base, gain = 1 + 0 * base, -0.02 - 0.01 * k + 0.02 * draw.normal(size=prompts)
        each[f"{metric}/test"] = {"base": base.tolist(), "tuned": (base + gain).tolist()}
        ends = (float(gain.mean()) - 0.01, float(gain.mean()) + 0.01)
        scores[f"{metric}/test"] = Score(base=float(base.mean()), tuned=float((base + gain).mean()), diff_ci95=ends)
    dev = {reward: 0.6, "oracle_exact": 0.5, "diversity": 1.0, "w2": 0.0}
    budget = {"images": 2880, "reward_calls": 2880, "function_evaluations": 36_960, "seconds": 120.0 + 9 * k}
    budget |= {"evaluation_seconds": 40.0, "overhead": 0.01, "peak_memory_mb": 1373.0}
    values: dict[str, Any] = {
        "version": 2,
        "algorithm": method,
        "reward": reward,
        "model": "mini-sd3",
        "seed": seed,
        "budget": Spent(**budget),
        "scores": {} if failed else scores,
        "per_prompt": {} if failed else each,
        "prompts": {"test": [f"a prompt number {i}" for i in range(prompts)]},
        "config": {
            "algorithm": method,
            "reward": reward,
            "seed": seed,
            "training": {"images": 2880, "learning_rate": 0.0003, "ema": 0.98},
            "hyperparameters": {"tau": 1.0, "clip": 2.0},
        },
        "config_hash": f"{k:010d}",
        "protocol_hash": "295a55e392",
        "prompt_hashes": {"test": "0" * 64},
        "reward_provenance": {"sha256": "1" * 64},
        "judges": {judge: {} for judge in JUDGES if judge != reward},
        "command": f"flowbench run {method} --reward {reward} --seed {seed}",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "device": "cpu x 1",
        "versions": {"python": "3.11.7", "torch": "2.14.1"},
        "finished": f"2026-11-2{seed % 9}T10:00:00+00:00",
        "points": _points(reward, good, k, draw) if points and not failed else (),
        "dev_base": dev if points else {},
        "costs": Costs(images=2880, device="cpu x 1", precision="float32"),
        "status": "failed" if failed else "finished",
        "failure": "the loss is not finite at iteration 31" if failed else None,
        "workload": workload,
        "workload_hash": "abcdef0123",
    }
    return Record(**{**values, **changed})


def _points(reward: str, good: float, k: int, draw: np.random.Generator) -> tuple[Point, ...]:
    """Scores on dev during training: rising and levelling off; the truth of the last two methods turns down."""
    found = []
    for step in range(1, POINTS + 1):
        part = step / POINTS
        turn = 0.12 * max(part - 0.5, 0) * (k >= 10)
        noise = 0.004 * draw.normal(size=4)
        scores = {
            reward: 0.6 + 0.6 * good * (1 - np.exp(-2.5 * part)) + 0.03 * part * (k >= 10) + noise[0] / 4,
            "oracle_exact": 0.5 + good * (1 - np.exp(-2.5 * part)) - turn + noise[1],
            "diversity": 1 - (0.02 + 0.012 * k) * part + noise[2],
            "w2": (0.02 + 0.004 * k) * part + abs(noise[3]) / 4,
        }
        found.append(
            Point(
                images=2880 * step // POINTS,
                iteration=90 * step // POINTS,
                seconds=(120.0 + 9 * k) * part,
                function_evaluations=36_960 * step // POINTS,
                scores={name: float(value) for name, value in scores.items()},
            )
        )
    return tuple(found)
