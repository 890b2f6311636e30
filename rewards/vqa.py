"""A vision-language model's answer to whether an image shows its prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from flowbench.errors import RunError, UsageError
from flowbench.reward import register_reward
from flowbench.scoring.checkpoints import Weights, load_pretrained
from flowbench.scoring.networks import NetworkReward
from flowbench.scoring.preprocess import to_pil

QUESTION = 'Does this image show "{prompt}"? Answer yes or no.'
ANSWERS = (("Yes", "yes", " Yes", " yes"), ("No", "no", " No", " no"))


@register_reward(
    "vqa",
    source="2404.01291 (VQAScore); transformers",
    licence="the model's own",
    range=(0.0, 1.0),
    differentiable=True,
)
class Vqa(NetworkReward):
    """Probability that a vision-language model answers yes, of yes and no, when asked whether it sees the prompt.

    model: hub id or folder of a model that transformers' AutoModelForImageTextToText loads; question: with {prompt}.
    """

    def __init__(self, model: str = "HuggingFaceTB/SmolVLM-256M-Instruct", question: str = QUESTION) -> None:
        if "{prompt}" not in question:
            raise UsageError(f"reward 'vqa': the question {question!r} has no {{prompt}} in it")
        self.model_name, self.question = model, question

    def load(self, device: torch.device) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = load_pretrained("vqa", AutoModelForImageTextToText, self.model_name).to(device)
        self.processor = load_pretrained("vqa", AutoProcessor, self.model_name)
        self.device = device
        self.answers = [torch.tensor(sorted(set(self._single_tokens(words))), device=device) for words in ANSWERS]
        if any(not len(ids) for ids in self.answers):
            raise RunError(f"reward 'vqa': the tokenizer of '{self.model_name}' has no single token for yes or no")

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        scores = torch.zeros(len(prompts), device=self.device)
        for prompt in dict.fromkeys(prompts):  # images of one prompt need no padding, which would change the last bits
            rows = torch.tensor([i for i, p in enumerate(prompts) if p == prompt], device=images.device)
            logits = self.model(**self._inputs(images[rows], prompt)).logits[:, -1]
            yes, no = (logits[:, ids].logsumexp(1) for ids in self.answers)
            scores = scores.index_add(0, rows.to(self.device), torch.sigmoid(yes - no))
        return scores

    def _inputs(self, images: torch.Tensor, prompt: str) -> Any:
        """The model's inputs, preprocessed by its own processor: as tensors if they carry a gradient, else as PIL's."""
        content = [{"type": "image"}, {"type": "text", "text": self.question.format(prompt=prompt)}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        if torch.is_grad_enabled() and images.requires_grad:
            pictures, options = list(images), {"do_rescale": False}
        else:
            pictures, options = to_pil(images), {}
        inputs = self.processor(
            text=[text] * len(pictures), images=[[p] for p in pictures], return_tensors="pt", **options
        ).to(self.device)
        if options and not inputs["pixel_values"].requires_grad:
            raise RunError(
                f"reward 'vqa': the image processor of '{self.model_name}' passes no gradient; train without one"
            )
        return inputs

    def networks(self) -> tuple[torch.nn.Module, ...]:
        return (self.model,)

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        self.device = device
        self.answers = [ids.to(device) for ids in self.answers]

    def weights(self) -> tuple[Weights, ...]:
        return (Weights(self.model_name, ("config.json",), whole=True),)

    def provenance(self) -> dict[str, Any]:
        return {"model": self.model_name, "question": self.question, **self.identity()}

    def _single_tokens(self, words: tuple[str, ...]) -> Iterator[int]:
        for word in words:
            ids = self.processor.tokenizer(word, add_special_tokens=False).input_ids
            if len(ids) == 1:
                yield ids[0]
