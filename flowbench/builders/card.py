"""Model cards of the embedded models: how they were trained, and scores measured when they are written."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import open_clip
import torch
from diffusers import AutoencoderKL

from flowbench.builders import clip, text, transformer, vae
from flowbench.builders.fit import FitPlan
from flowbench.builders.measure import mutation_accuracy, retrieval_top1, vae_round_trip
from flowbench.config import EvaluationConfig
from flowbench.evaluation.protocol import Judges, score_split
from flowbench.files import write_atomically
from flowbench.models.families import load_pipeline
from flowbench.models.loading import load_network
from flowbench.models.policy import Policy
from flowbench.models.presets import load_preset
from flowbench.prompts import load_split

SPLITS = ("train", "test", "compositional")


def write_cards(folder: Path) -> None:
    """Measure the models below `folder` and write a README.md and a scores.json beside each."""
    _write(folder / "mini-sd3", _SD3, sd3_scores(folder / "mini-sd3"))
    _write(folder / "mini-clip", _CLIP, clip_scores(folder / "mini-clip"))


def sd3_scores(folder: Path) -> dict[str, float]:
    """VAE round trip, and the oracle's verdicts on samples for each prompt split."""
    psnr, survival = vae_round_trip(load_network(AutoencoderKL, folder / "vae", torch.float32))
    scores = {"VAE PSNR on held-out renders, dB": psnr, "verdicts that survive the VAE": survival}
    preset = load_preset("mini-sd3").model_copy(update={"source": str(folder)})
    policy = Policy(load_pipeline(preset, torch.device("cpu")), preset)
    config, judges = EvaluationConfig(prompts=120, images_per_prompt=8), Judges({}, oracle=True)
    for split in SPLITS:
        result = score_split(policy, "reference", load_split("shapes", split), judges, config, lambda n: None)
        for metric in ("oracle_exact", "oracle_soft"):
            scores[f"{metric} on {split} prompts"] = float(result.scores[metric].mean())
    return scores


def clip_scores(folder: Path) -> dict[str, float]:
    """Retrieval among 64 mutually exclusive captions, and preference for the right over a slightly wrong caption."""
    name = f"local-dir:{folder}"
    model, tokenizer = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    return {
        "retrieval top-1 among 64 captions of held-out scenes": retrieval_top1(model, tokenizer),
        "right caption above one with a wrong attribute": mutation_accuracy(model, tokenizer),
    }


def _write(folder: Path, description: str, scores: dict[str, float]) -> None:
    write_atomically(folder / "scores.json", json.dumps(scores, indent=1) + "\n")
    table = "\n".join(f"| {name} | {value:.3f} |" for name, value in scores.items())
    text = f"{description}\n## Scores\n\n| measure | value |\n| --- | --- |\n{table}\n"
    write_atomically(folder / "README.md", text)


def _plan(plan: FitPlan, batch: int) -> str:
    shown = {k: v for k, v in asdict(plan).items() if k not in ("name", "checkpoint_every")}
    return f"batch {batch}, " + ", ".join(f"{k} {v}" for k, v in shown.items())


_SD3 = f"""# mini-sd3

A `StableDiffusion3Pipeline` for 32 x 32 pictures of a world of shapes, small enough for two CPU cores. Every part is
the class that Stable Diffusion 3 uses; T5 is absent, as SD3 allows. Trained from nothing on rendered scenes; licence
Apache-2.0, like flowbench. It is a testbed for reward fine-tuning and of no other use.

```python
pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
pipeline(
    "a red circle above a blue square",
    height=32,
    width=32,
    num_inference_steps=10,
    guidance_scale=1.0,
    max_sequence_length={transformer.T5_TOKENS},
)
```

`max_sequence_length` is the number of zero tokens that stand in for T5. It was {transformer.T5_TOKENS} in training;
the pipeline's default (256) is another softmax, and slower.

## Training

- VAE: {_plan(vae.PLAN, vae.BATCH)}; L1 + 2 MSE, tiny KL, pixels of objects weigh three times.
  Then, with small crosses in half of the batch, which a blur turns into circles: {_plan(vae.CROSSES, vae.BATCH)}.
- Text towers: {_plan(text.PLAN, text.BATCH)}; contrastive against
  mini-clip's locked image tower, with one hard negative caption per image; then frozen.
- Transformer: {_plan(transformer.PLAN, transformer.BATCH)}; {transformer.POOL} latents, logit-normal
  ({transformer.SIGMA_MEAN}, {transformer.SIGMA_STD}) sigmas, caption dropout {transformer.CAPTION_DROPOUT}.
- Then its velocity with guidance {transformer.GUIDANCE} is distilled into it, so that it is sampled without guidance:
  {_plan(transformer.DISTIL, transformer.BATCH)}.
- It still mixes up attributes, counts and relations: the headroom for fine-tuning.
- Weights of the transformer are stored in float16.
- Captions of the compositional split (held-out colour-shape pairs and pairings) occur in no training stage.

Rebuild: `flowbench testbed build`.
"""

_CLIP = f"""# mini-clip

open_clip's `CLIP` at small size, in its own file format, trained from nothing on the world of shapes; the `clip` reward
of mini-sd3. Licence Apache-2.0, like flowbench. `open_clip.create_model("local-dir:FOLDER")` loads it.

## Training

{_plan(clip.PLAN, clip.BATCH)}; InfoNCE over the batch's captions plus, for each image, its caption with one attribute
changed; a third of the images slightly blurred, a third slightly noisy. No caption of the compositional split.

Rebuild: `flowbench testbed build --only clip`.
"""
