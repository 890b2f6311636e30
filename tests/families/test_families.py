"""Every family against plain diffusers: the same images, the same tuned weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import SIDE

from flowbench.config import resolve_config
from flowbench.errors import UsageError
from flowbench.evaluation.judges import build_reward
from flowbench.experiments.run import build_algorithm, build_policy
from flowbench.models.families import load_pipeline
from flowbench.models.families.flux import pack, unpack
from flowbench.models.flow import velocity_error
from flowbench.models.policy import Policy, Tuning
from flowbench.models.presets import ModelPreset, load_preset
from flowbench.prompts import load_split
from flowbench.training.trainer import Trainer

CPU = torch.device("cpu")
LORA = Tuning("lora", lora_rank=4, lora_alpha=8.0)
PROMPTS = ("a photo of a red bench", "a photo of two cats and a dog")  # of different lengths
families = pytest.mark.parametrize("kind", ["sd3", "flux", "lumina2", "zimage"])
tuned_families = pytest.mark.parametrize("kind", ["sd3", "sd3.5", "flux", "lumina2", "zimage"])
TALL = (96, SIDE)  # height and width
GUIDANCE = {"sd3": 4.5, "sd3.5": 4.5, "sd3.5-large": 3.5, "flux": 3.5, "lumina2": 4.0, "zimage": 4.0}

Make = Callable[..., Policy]
Plain = Callable[[str], Any]


def draw(pipeline: Any, noise: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Latents that the pipeline's own call makes of the noise, as flowbench shapes them."""
    kind = type(pipeline).__name__
    packed = kind == "FluxPipeline"
    latents = pipeline(
        list(PROMPTS),  # Z-Image's pipeline writes into it
        height=noise.shape[2] * 8,
        width=noise.shape[3] * 8,
        num_inference_steps=3,
        guidance_scale=guidance_scale - 1 if kind == "ZImagePipeline" else guidance_scale,
        max_sequence_length=64,
        latents=pack(noise) if packed else noise,
        output_type="latent",
    ).images
    return unpack(latents, noise.shape[2:]) if packed else latents


def moved(policy: Policy) -> Policy:
    """The policy with its trainable weights changed."""
    generator = torch.Generator().manual_seed(3)
    for p in policy.trainable_parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return policy


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-4)


@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
@families
def test_a_rollout_equals_the_plain_pipelines_own_call(make: Make, plain: Plain, kind: str, guided: bool) -> None:
    scale = GUIDANCE[kind] if guided else 1.0
    policy = make(kind, guidance_scale=scale)
    noise = policy.draw_noise(2)
    ours = policy.rollout(policy.encode(PROMPTS), noise).x0
    assert same(ours, draw(plain(kind), noise, scale))
    assert not same(ours, policy.rollout(policy.encode(PROMPTS), noise, guidance_scale=scale + 1).x0)


@pytest.mark.parametrize("spacing", ["pipeline", "linspace"])
@families
def test_the_arguments_that_a_family_names_make_plain_diffusers_sample_the_same(
    make: Make, plain: Plain, kind: str, spacing: str
) -> None:
    policy, scale = make(kind, guidance_scale=GUIDANCE[kind], sigma_spacing=spacing), GUIDANCE[kind]
    noise, packed = policy.draw_noise(2), kind == "flux"
    arguments = policy.family.call_arguments(3, scale)
    latents = pack(noise) if packed else noise
    theirs = plain(kind)(list(PROMPTS), latents=latents, output_type="latent", **arguments).images
    theirs = unpack(theirs, noise.shape[2:]) if packed else theirs
    assert ("sigmas" in arguments) == (spacing == "linspace")
    assert same(policy.rollout(policy.encode(PROMPTS), noise).x0, theirs)


@families
def test_evenly_spaced_sigmas_end_with_a_step_like_the_others_after_the_models_shift(make: Make, kind: str) -> None:
    sigmas = make(kind, sigma_spacing="linspace").sigmas(8)
    shift = (
        3.0
        if kind in ("sd3", "zimage")
        else 6.0
        if kind == "lumina2"
        else math.exp(0.5 + (1.15 - 0.5) * (16 - 256) / (4096 - 256))
    )
    u = torch.arange(8, -1, -1) / 8
    torch.testing.assert_close(sigmas, shift * u / (1 + (shift - 1) * u))


@pytest.mark.parametrize("kind", ["schnell", "sd3.5", "sd3.5-large"])
def test_so_does_that_of_a_familys_variant(make: Make, plain: Plain, kind: str) -> None:
    policy, scale = make(kind, guidance_scale=GUIDANCE.get(kind, 1.0)), GUIDANCE.get(kind, 1.0)
    noise = policy.draw_noise(2)
    assert same(policy.rollout(policy.encode(PROMPTS), noise).x0, draw(plain(kind), noise, scale))


@families
def test_decoded_latents_are_the_plain_pipelines_images(make: Make, plain: Plain, kind: str) -> None:
    policy, pipeline = make(kind), plain(kind)
    x0 = policy.draw_noise(2)
    config = pipeline.vae.config
    with torch.no_grad():
        images = pipeline.vae.decode(x0 / config.scaling_factor + config.shift_factor).sample / 2 + 0.5
        assert same(policy.decode(x0), images.clamp(0, 1))
    assert images.shape == (2, 3, SIDE, SIDE)


@families
def test_a_small_step_along_the_velocity_leads_to_the_next_state_of_the_ode(make: Make, kind: str) -> None:
    """x and v have the sign and the time of flowbench's convention: sigma falls from 1, and x' = x + v (sigma' - 1)."""
    policy = make(kind)
    cond, noise = policy.encode(PROMPTS), policy.draw_noise(2)
    samples = policy.rollout(cond, noise, keep_states=True)
    with torch.no_grad():
        v = policy.velocity(noise, torch.ones(2), cond)
    assert samples.sigmas[0] == 1
    assert samples.sigmas[-1] == 0
    assert (samples.sigmas.diff() < 0).all()
    assert same(samples.states[:, 1], noise + v * (samples.sigmas[1] - 1))


@families
def test_a_rows_velocity_does_not_depend_on_the_length_of_its_neighbours_prompt(make: Make, kind: str) -> None:
    policy = make(kind)
    x, sigma = policy.draw_noise(2), torch.tensor([0.9, 0.4])
    with torch.no_grad():
        together = policy.velocity(x, sigma, policy.encode(PROMPTS))
        for k, prompt in enumerate(PROMPTS):
            alone = policy.velocity(x[k : k + 1], sigma[k : k + 1], policy.encode([prompt]))
            assert same(alone, together[k : k + 1])


@families
def test_a_text_summary_tells_prompts_apart_and_ignores_padding(make: Make, kind: str) -> None:
    policy = make(kind)
    summary = policy.text_summary(policy.encode([*PROMPTS, PROMPTS[0]]))
    assert summary.shape == (3, policy.text_width)
    assert torch.equal(summary[0], summary[2])
    assert not torch.allclose(summary[0], summary[1], atol=1e-4)
    assert torch.allclose(policy.text_summary(policy.encode(PROMPTS[:1]))[0], summary[0], atol=1e-6)


@families
def test_tokens_of_a_prompt_are_counted_against_the_limit(make: Make, kind: str) -> None:
    family = make(kind).family
    short, long = (family.count_tokens(prompt) for prompt in PROMPTS)
    assert 6 <= short < long <= family.token_limit == 64


@tuned_families
def test_the_lora_weights_that_are_saved_give_plain_diffusers_the_tuned_policys_output(
    make: Make, plain: Plain, kind: str, tmp_path: Path
) -> None:
    scale = GUIDANCE[kind]
    policy = moved(make(kind, guidance_scale=scale))
    policy.save(tmp_path)
    noise, pipeline = policy.draw_noise(2), plain(kind)
    base = draw(pipeline, noise, scale)
    pipeline.load_lora_weights(tmp_path)
    tuned = draw(pipeline, noise, scale)
    assert not same(tuned, base)
    assert same(policy.rollout(policy.encode(PROMPTS), noise).x0, tuned)
    assert same(policy.rollout(policy.encode(PROMPTS), noise, weights="reference").x0, base)


@families
def test_float32_lora_weights_train_beside_a_half_precision_base(make: Make, kind: str) -> None:
    policy = make(kind, LORA, GUIDANCE[kind], dtype=torch.bfloat16, gradient_checkpointing=True)
    cond = policy.encode(PROMPTS)
    x0 = policy.rollout(cond, policy.draw_noise(2)).x0
    v = policy.guided_velocity(x0, policy.draw_sigmas(2), cond)
    assert policy.model_dtype == torch.bfloat16
    assert v.dtype == x0.dtype == policy.decode(x0).dtype == torch.float32
    velocity_error(v, x0).mean().backward()
    gradients = [p.grad for p in policy.trainable_parameters()]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)


def test_lora_adapts_both_attentions_of_a_dual_attention_block(make: Make) -> None:
    policy = make("sd3.5")
    block = policy.transformer.transformer_blocks[0]
    assert block.attn.norm_q is not None  # SD3.5's norms of queries and keys
    assert block.attn2.norm_q is not None
    adapted = {name for name, _ in policy.transformer.named_parameters() if "lora_A" in name}
    assert any(".attn2.to_q." in name for name in adapted)
    assert any(".attn.add_q_proj." in name for name in adapted)
    assert len(policy.trainable_parameters()) == 2 * len(adapted)


@pytest.mark.parametrize("algorithm", ["acflow", "flow-grpo"])
@tuned_families
def test_an_iteration_trains_a_lora_of_a_folder_that_no_preset_describes(
    folders: dict[str, Path], kind: str, algorithm: str, tmp_path: Path
) -> None:
    settings = {
        "training.images": 4,
        "training.prompts_per_iteration": 2,
        "training.images_per_prompt": 2,
        "training.minibatch": 4,
        "training.num_steps": 2,
        "training.lora_rank": 4,
        **({"algorithm.warmup": 0} if algorithm == "acflow" else {}),
    }
    config = resolve_config(algorithm, "jpeg", str(folders[kind]), overrides=settings, device="cpu")
    preset = load_preset(config.model)
    assert config.training.tuning == "lora"
    assert config.training.gradient_checkpointing
    reward = build_reward("jpeg", preset, CPU)
    prompts = load_split(preset.prompts, "train").prompts[:4]
    policy = build_policy(config, preset, CPU)
    before = [p.detach().clone() for p in policy.trainable_parameters()]
    trainer = Trainer(config, policy, build_algorithm(config, reward), reward, prompts, tmp_path)
    budget = trainer.run()
    assert budget.images == 4
    changed = [not torch.equal(p, b) for p, b in zip(policy.trainable_parameters(), before, strict=True)]
    assert sum(changed) >= len(changed) / 2  # of a factor whose partner is zero there is no gradient yet
    if kind == "sd3.5":
        second = {n: p for n, p in policy.transformer.named_parameters() if ".attn2." in n and "lora_B.default" in n}
        assert len(second) == 4
        assert all(factor.abs().max() > 0 for factor in second.values())


@families
def test_an_image_that_is_no_square_is_the_plain_pipelines(make: Make, plain: Plain, kind: str) -> None:
    scale, pipeline = GUIDANCE[kind], plain(kind)
    policy = make(kind, guidance_scale=scale, resolution=TALL)
    noise = policy.draw_noise(2)
    assert noise.shape[2:] == (12, 8)
    ours = policy.rollout(policy.encode(PROMPTS), noise).x0
    assert same(ours, draw(pipeline, noise, scale))
    assert not same(ours, policy.rollout(policy.encode(PROMPTS), noise.transpose(2, 3)).x0.transpose(2, 3))
    arguments = policy.family.call_arguments(3, scale)
    assert (arguments["height"], arguments["width"]) == TALL
    with torch.no_grad():
        images = policy.decode(ours)
        decoded = pipeline.vae.decode(ours / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor)
    assert images.shape == (2, 3, *TALL)
    assert same(images, (decoded.sample / 2 + 0.5).clamp(0, 1))


def test_fluxs_sigmas_are_shifted_by_the_number_of_tokens_of_an_image_that_is_no_square(make: Make) -> None:
    tall, wide, square = (make("flux", resolution=size).sigmas(4) for size in (TALL, TALL[::-1], SIDE))
    assert torch.equal(tall, wide)
    assert (tall[1:-1] > square[1:-1]).all()  # more tokens, more noise


@families
def test_a_resolution_that_is_no_whole_number_of_patches_is_refused_with_the_nearest(make: Make, kind: str) -> None:
    policy = make(kind, resolution=(SIDE, 72))
    with pytest.raises(
        UsageError, match=f"model '{kind}': its resolution's width of 72 is no multiple of 16; use 64 or 80"
    ):
        policy.draw_noise(1)


def test_packing_latents_is_undone_by_unpacking() -> None:
    x = torch.randn(2, 3, 6, 4)
    assert pack(x).shape == (2, 6, 12)
    assert torch.equal(pack(x)[1, 3], x[1, :, 2:4, 2:4].flatten())  # the second row's second square
    assert torch.equal(unpack(pack(x), x.shape[2:]), x)


def test_fluxs_guidance_is_an_input_and_costs_no_evaluation(make: Make) -> None:
    policy = make("flux", guidance_scale=3.5)
    x, sigma, cond = policy.draw_noise(2), torch.tensor([0.9, 0.4]), policy.encode(PROMPTS)
    with torch.no_grad():
        guided = policy.guided_velocity(x, sigma, cond)
        assert policy.function_evaluations == 2
        assert torch.equal(policy.velocity(x, sigma, cond), guided)
        assert not same(policy.guided_velocity(x, sigma, cond, guidance_scale=1.0), guided)


def test_guidance_is_refused_by_a_model_that_takes_none(make: Make) -> None:
    policy = make("schnell")
    x, sigma, cond = policy.draw_noise(2), torch.tensor([0.9, 0.4]), policy.encode(PROMPTS)
    with pytest.raises(UsageError, match="'schnell' takes no guidance; set guidance_scale to 1"):
        policy.guided_velocity(x, sigma, cond, guidance_scale=2.0)


def test_text_encoders_leave_the_device_with_the_negative_prompt_encoded(make: Make) -> None:
    policy = make("lumina2", guidance_scale=4.0)
    policy.release_text_encoders()
    policy.family.pipeline.text_encoder = None  # whatever needed it now would fail
    x, sigma = policy.draw_noise(2), torch.tensor([0.9, 0.4])
    with pytest.raises(TypeError):
        policy.encode(PROMPTS)
    assert len(policy.texts.negative(2)) == len(x) == len(sigma)


# --- without a preset -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "family", "guidance", "has_t5"),
    [("sd3", "sd3", 7.0, True), ("flux", "flux", 3.5, False), ("schnell", "flux", 1.0, False)],
)
def test_a_folder_is_described_by_its_own_files(
    folders: dict[str, Path], kind: str, family: str, guidance: float, has_t5: bool
) -> None:
    preset = load_preset(str(folders[kind]))
    assert (preset.name, preset.family, preset.guidance_scale, preset.has_t5) == (kind, family, guidance, has_t5)
    assert preset.resolution == SIDE
    assert preset.training["tuning"] == "lora"
    assert preset.prompts == "objects"


def test_a_hub_id_is_found_below_flowbench_weights_and_in_the_hubs_cache(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "maker").mkdir()
    (tmp_path / "maker" / "model-Turbo").symlink_to(folders["lumina2"])
    with pytest.raises(UsageError, match=r"unknown model 'maker/.*fetch it with 'hf download maker/model-Turbo'"):
        load_preset("maker/model-Turbo")
    monkeypatch.setenv("FLOWBENCH_WEIGHTS", str(tmp_path))
    below = load_preset("maker/model-Turbo")
    assert (below.name, below.source, below.family) == ("model-Turbo", "maker/model-Turbo", "lumina2")
    assert (below.guidance_scale, below.num_steps) == (1.0, 8)  # distilled, as its name says
    monkeypatch.delenv("FLOWBENCH_WEIGHTS")
    index = str(folders["lumina2"] / "model_index.json")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, file: index)
    assert load_preset("maker/model-Turbo") == below


def test_a_pipeline_that_no_family_serves_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "SanaPipeline"}', encoding="utf-8")
    with pytest.raises(UsageError, match="is a SanaPipeline, which no family of flowbench serves; there are: Stable"):
        load_preset(str(tmp_path))


def test_a_folder_without_an_index_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown model '.*'; that folder has no model_index\.json"):
        load_preset(str(tmp_path))


def test_an_unknown_family_names_the_nearest(tmp_path: Path) -> None:
    text = "source: x/y\nfamily: lumina\nlicence: none\nresolution: 64\nnum_steps: 2\nguidance_scale: 1.0\n"
    path = tmp_path / "mine.yaml"
    path.write_text(text + "max_sequence_length: 8\nhas_t5: false\nprompts: objects\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"mine\.yaml': unknown family 'lumina'; did you mean 'lumina2'\?"):
        load_preset(str(path))


def test_a_preset_of_the_wrong_family_names_the_right_one(described: Callable[..., ModelPreset]) -> None:
    with pytest.raises(UsageError, match="is a FluxPipeline, not of the family 'sd3'; set family: flux"):
        load_pipeline(described("flux", family="sd3"), CPU)


def test_full_tuning_is_there_for_every_family(make: Make) -> None:
    policy = make("lumina2", Tuning("full"))
    assert len(policy.trainable_parameters()) == len(list(policy.transformer.parameters()))
