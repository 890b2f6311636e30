"""What the metrics of a training log mean, in a line each."""

from __future__ import annotations

from flowbench.errors import UsageError
from flowbench.registry import algorithms

# What the loop and the shared pieces log; an algorithm's own are in its `metrics`.
COMMON = {
    "grad_norm": "norm of the gradient before clipping",
    "fit": "mean_d (v - u)^2",
    "w2": "mean_d (v - v_ref)^2",
    "clipped": "share of rows outside the clip range",
    "log_ratio": "mean of log rho",
    "kl": "KL from the reference, as it enters the loss",
    "oracle_exact": "truth of the images trained on: share correct",
    "oracle_soft": "truth of the images trained on: share of objects and relations",
    "exact_reward": "E[r] of the policy, exact",
    "exact_kl": "KL of the policy from the base model, exact, in nats",
    "reward": "the mean of this reward over the images trained on",
}


def meaning(metric: str, algorithm: str | None = None) -> str:
    """The meaning of a logged metric: the algorithm's own word, or that of the loop; "" if nobody says.

    "explained_variance_0.33" means what "explained_variance" does.
    """
    known = {**COMMON, **_own(algorithm)}
    longest = sorted((name for name in known if metric == name or metric.startswith(f"{name}_")), key=len)
    return known[longest[-1]] if longest else ""


def _own(algorithm: str | None) -> dict[str, str]:
    if algorithm is None:
        return {}
    try:
        return dict(algorithms.get(algorithm).cls.metrics)
    except UsageError:
        return {}
