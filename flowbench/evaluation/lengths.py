"""Prompts that are longer than the model or a reward reads: said once, and counted."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from flowbench.models.loading import quiet
from flowbench.models.policy import Policy
from flowbench.record import MODEL
from flowbench.reward import Reward

logger = logging.getLogger("flowbench")


def cut_prompts(policy: Policy, rewards: Mapping[str, Reward], texts: Iterable[str]) -> dict[str, int]:
    """How many different texts "model" and each reward cut, by name; those that cut none are left out.

    A line says it of each reward; of the model it was said when it was built.
    """
    different = list(dict.fromkeys(texts))
    policy.texts.announce(different)
    counts = {MODEL: len(policy.texts.cut)}
    for name, reward in rewards.items():
        with quiet():  # tokenizers warn of what is counted here
            cut = [text for text in different if reward.cuts(text)]
        counts[name] = len(cut)
        if cut:
            logger.warning("reward '%s' reads only the beginning of %d prompts, such as %r", name, len(cut), cut[0])
    return {name: count for name, count in counts.items() if count}
