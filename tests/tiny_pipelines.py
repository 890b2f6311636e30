"""Randomly initialised pipelines of diffusers' real classes, with every width reduced; no network."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from flowbench.prompts import load_split

SIDE = 64  # pixels; 8 x 8 latents, 4 x 4 patches


def words() -> list[str]:
    texts = [p.text for split in ("train", "test", "compositional") for p in load_split("objects", split).prompts]
    return sorted({word for text in texts for word in text.split()})


def clip_tokenizer(pad_token: str) -> CLIPTokenizer:
    """Single characters, whole words and CLIP's special tokens; merges spell each word out from left to right."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    letters = sorted({letter for word in words() for letter in word} | {"!"})
    merges, pieces = [], [*letters, *(letter + "</w>" for letter in letters)]
    for word in words():
        *head, last = [*word[:-1], word[-1] + "</w>"]
        joined = head[0] if head else last
        for symbol in [*head[1:], last] if head else []:
            merges.append((joined, symbol))
            joined += symbol
            pieces.append(joined)
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, start, end]))}
    special = {"unk_token": end, "bos_token": start, "eos_token": end, "pad_token": pad_token}
    return CLIPTokenizer(vocab=vocabulary, merges=list(dict.fromkeys(merges)), model_max_length=77, **special)


def t5_tokenizer() -> T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((f"▁{word}", -3.0) for word in words())]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def gemma_tokenizer(texts: list[str]) -> GemmaTokenizer:
    """Single characters, the words that follow a space, and Gemma's special tokens."""
    spelled = sorted({f"▁{word}" for text in texts for word in text.split()})
    merges, pieces = [], sorted({letter for word in spelled for letter in word})
    for word in spelled:
        for k in range(1, len(word)):
            merges.append((word[:k], word[k]))
            pieces.append(word[: k + 1])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*special, *pieces]))}
    return GemmaTokenizer(vocab=vocabulary, merges=list(dict.fromkeys(merges)), add_bos_token=True)


def clip_config(tokenizer: CLIPTokenizer, width: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def text_tower(tokenizer: CLIPTokenizer, width: int, activation: str) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(clip_config(tokenizer, width, activation))


def t5_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=48,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
        )
    )


def small_vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=SIDE,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def sd3(dual_layers: tuple[int, ...] = (), qk_norm: bool = False) -> StableDiffusion3Pipeline:
    """SD3-medium's model_index.json and configurations; SD3.5-large's with `qk_norm`, with both SD3.5-medium's."""
    torch.manual_seed(0)
    first, second, third = clip_tokenizer("<|endoftext|>"), clip_tokenizer("!"), t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=SIDE // 8,
            patch_size=2,
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=48,
            caption_projection_dim=32,
            pooled_projection_dim=16 + 24,
            out_channels=16,
            pos_embed_max_size=12,
            dual_attention_layers=dual_layers,
            qk_norm="rms_norm" if qk_norm else None,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=small_vae(16),
        text_encoder=text_tower(first, 16, "quick_gelu"),
        tokenizer=first,
        text_encoder_2=text_tower(second, 24, "gelu"),
        tokenizer_2=second,
        text_encoder_3=t5_encoder(third),
        tokenizer_3=third,
    )


def flux(guidance: bool = True) -> FluxPipeline:
    """FLUX.1-dev's model_index.json and configurations; FLUX.1-schnell's without `guidance`."""
    torch.manual_seed(1)
    first, second = clip_tokenizer("<|endoftext|>"), t5_tokenizer()
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * 4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            pooled_projection_dim=16,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=small_vae(4),
        text_encoder=CLIPTextModel(clip_config(first, 16, "quick_gelu")),
        tokenizer=first,
        text_encoder_2=t5_encoder(second),
        tokenizer_2=second,
    )


def lumina2() -> Lumina2Pipeline:
    """Lumina-Image-2.0's model_index.json and configurations."""
    torch.manual_seed(2)
    system = "You are an assistant designed to generate superior images with the superior degree of image-text "
    system += "alignment based on textual prompts or user prompts. <Prompt Start>"
    tokenizer = gemma_tokenizer([system, *words()])
    encoder = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=SIDE // 8,
            in_channels=4,
            hidden_size=32,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(300, 16, 16),
            cap_feat_dim=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=small_vae(4),
        text_encoder=Gemma2Model(encoder),
        tokenizer=tokenizer,
    )


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Single bytes, with the markers of a chat."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {piece: i for i, piece in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=special[1:])
    turn = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer.chat_template = turn + "<|im_start|>assistant\n"
    return tokenizer


def zimage() -> ZImagePipeline:
    """Z-Image's model_index.json and configurations."""
    torch.manual_seed(3)
    tokenizer = qwen_tokenizer()
    encoder = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=4,
            n_kv_heads=4,
            cap_feat_dim=32,
            axes_dims=[4, 2, 2],
            axes_lens=[300, 16, 16],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=small_vae(4),
        text_encoder=Qwen3Model(encoder),
        tokenizer=tokenizer,
    )
