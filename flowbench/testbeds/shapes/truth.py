"""The oracle's verdicts as tensors, for whatever scores pictures of the world of shapes by their prompts."""

from __future__ import annotations

import torch

from flowbench.errors import RunError


def truth(images: torch.Tensor, texts: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The oracle's two verdicts (B,) on images (B, 3, H, W) in [0, 1] of the world of shapes.

    Raises RunError for images or prompts that it cannot read.
    """
    # Imported here because every run imports this module, and only those on the testbed need the oracle and its scipy.
    from flowbench.testbeds.shapes.oracle import judge_images
    from flowbench.testbeds.shapes.world import parse

    try:
        verdicts = judge_images(images.cpu().numpy(), [parse(t) for t in texts])
    except ValueError as error:
        raise RunError(str(error)) from error
    return {
        "oracle_exact": torch.tensor([float(v.exact) for v in verdicts]),
        "oracle_soft": torch.tensor([v.soft for v in verdicts]),
    }
