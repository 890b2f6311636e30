"""Settings that algorithms share, so that none is written twice, and none is one method's own by hand.

What a search does not vary is the value that an algorithm was published with (`Config`), or common to all methods of a
kind: `COMMON`. It was chosen once for all of them, in the way that docs/tuning.md states.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from flowbench.algorithm import Defaults

HAND_SEARCH = "docs/mini-sd3-search.md"  # by hand and uneven: one to 170 runs an algorithm
MINI_SD3_LORA: Mapping[str, Any] = {"tuning": "lora", "lora_rank": 8, "lora_alpha": 16}

OWN_NETWORKS: Mapping[str, Any] = {"auxiliary_steps": 1}  # of every algorithm that has any: a step per policy's step

_MINI_SD3_ADAPTER = {"lora_rank": 8, "lora_alpha": 16}  # where one is trained

# Each image in four noisy states per iteration, all of them in one optimizer step. Published strengths such as tau and
# beta0 are for rewards that spread by about 1. Prompts x images (8 x 4) and sigma band are the preset's own.
_MINI_SD3_MATCHING = Defaults(
    {**_MINI_SD3_ADAPTER, "minibatch": 128, "reward_scale": "standardized"},
    {"states_per_image": 4, "states_per_pair": 8},  # a pair's state is two
)

# By model and family: laid over the model's preset, before what an algorithm is searched for. Settings that an
# algorithm's `Config` does not have are not for it.
COMMON: Mapping[str, Mapping[str, Defaults]] = {
    "mini-sd3": {
        "forward-process": _MINI_SD3_MATCHING,
        "preference": _MINI_SD3_MATCHING,
        # Policy gradients are noisy: large groups, and noise in the first three steps only, where most of an image's
        # reward is decided. Two optimizer steps per iteration, as Flow-GRPO's code.
        "policy-gradient": Defaults(
            {
                **_MINI_SD3_ADAPTER,
                "prompts_per_iteration": 4,
                "images_per_prompt": 16,
                "minibatch": 96,
                "sde_window": 3,
                "sde_window_stay": 1000,
            }
        ),
        # All images of an iteration in one optimizer step.
        "reward-gradient": Defaults({**_MINI_SD3_ADAPTER, "minibatch": 32}),
    },
    # In the plane, 40 transitions per image make large minibatches cheap.
    "gaussian": {"policy-gradient": Defaults({"minibatch": 2048})},
    "mixture": {"policy-gradient": Defaults({"minibatch": 2048})},
}


def common_settings(model: str, family: str) -> dict[str, Any]:
    """What all methods of a family share on a model, by full names; empty where that is the preset's settings alone."""
    common = COMMON.get(model, {}).get(family, Defaults())
    training = {f"training.{name}": value for name, value in common.training.items()}
    return training | {f"algorithm.{name}": value for name, value in common.algorithm.items()}


def with_common(
    model: str,
    family: str,
    training: Mapping[str, Any] | None = None,
    algorithm: Mapping[str, Any] | None = None,
    log: str | None = None,
    takes: Collection[str] = (),
) -> Defaults:
    """An algorithm's defaults on a model: what its kind has in common, and over it its own.

    takes: which of the kind's hyperparameters its `Config` has.
    """
    common = COMMON[model][family]
    shared = {name: value for name, value in common.algorithm.items() if name in takes}
    return Defaults({**common.training, **(training or {})}, {**shared, **(algorithm or {})}, log)
