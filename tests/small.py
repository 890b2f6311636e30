"""The configuration of a run that takes a second, and the steps of a minibatch as the core takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowbench.training.rows import Cut, compared, drawn

if TYPE_CHECKING:
    from flowbench.algorithm import Algorithm, Batch, Loss

SMALL: dict[str, Any] = {
    "training.images": 32,
    "training.prompts_per_iteration": 4,
    "training.images_per_prompt": 4,
    "training.minibatch": 8,
    "training.learning_rate": 1e-3,
    "evaluation.prompts": 4,
    "evaluation.images_per_prompt": 2,
    "evaluation.splits": ["test"],
    "evaluation.points": 0,
}


def minibatch_loss(algorithm: Algorithm, policy: Any, batch: Batch, shared_noise: bool | None = None) -> Loss:
    """The loss of rows that are a whole minibatch in one part; each is handed noise first, if it has none."""
    if batch.noise is None:
        batch = drawn(algorithm, policy, batch, shared_noise)
    return algorithm.loss(policy, compared(algorithm, policy, batch, Cut(len(batch)))[0])
