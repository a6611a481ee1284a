"""Tiny pipelines of diffusers, built by configuration and saved; nothing is downloaded."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

WORDS = ["a", "red", "blue", "cat", "dog", "</w>"]


def unet(**changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    settings = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16)}
    settings |= {"layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    settings |= {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DModel(**(settings | changes))


def text_unet(**changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1}
    settings |= {"norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 16}
    settings |= {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DConditionModel(**(settings | changes))


def autoencoder() -> torch.nn.Module:
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def dit() -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=1000,
        out_channels=8,
    )


def sd3(**changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    settings = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 8}
    settings |= {"num_attention_heads": 2, "caption_projection_dim": 16, "joint_attention_dim": 16}
    settings |= {"pooled_projection_dim": 12, "pos_embed_max_size": 8}
    return diffusers.SD3Transformer2DModel(**(settings | changes))


def flux() -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def sana(**changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    settings = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 8}
    settings |= {"num_attention_heads": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8}
    settings |= {"cross_attention_dim": 16, "caption_channels": 16}
    return diffusers.SanaTransformer2DModel(**(settings | changes))


def tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer of single letters and a few words."""
    letters = [chr(place) for place in range(97, 123)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer.from_pretrained(str(folder), model_max_length=12)


def text_encoder(kind: Any = transformers.CLIPTextModel, **changes: Any) -> torch.nn.Module:
    torch.manual_seed(2)
    config = transformers.CLIPTextConfig(
        vocab_size=54,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
        **changes,
    )
    return kind(config).eval()


def stable_diffusion(folder: Path, **scheduler: Any) -> Path:
    """A pipeline in the form of Stable Diffusion, without a safety checker."""
    settings: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    settings |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    pipeline = diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(folder / "letters"),
        unet=text_unet(),
        scheduler=diffusers.DDIMScheduler(**(settings | scheduler)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def stable_diffusion_xl(folder: Path, **settings: Any) -> Path:
    """A pipeline in the form of SDXL, with two text encoders."""
    network = text_unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12 + 6 * 4,
    )
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(transformers.CLIPTextModelWithProjection, projection_dim=12),
        tokenizer=tokenizer(folder / "letters"),
        tokenizer_2=tokenizer(folder / "letters"),
        unet=network,
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing"),
        **settings,
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def stable_diffusion_3(folder: Path) -> Path:
    """A pipeline in the form of Stable Diffusion 3, without its third text encoder."""
    vae = autoencoder()
    vae.register_to_config(scaling_factor=1.5, shift_factor=0.1)
    encoders = [text_encoder(transformers.CLIPTextModelWithProjection, projection_dim=6) for _ in range(2)]
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=sd3(joint_attention_dim=32),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer(folder / "letters"),
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer(folder / "letters"),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def unconditional(folder: Path) -> Path:
    pipeline = diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler(clip_sample=False))
    pipeline.save_pretrained(folder)
    return folder


def class_conditional_latents(folder: Path) -> Path:
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    diffusers.DiTPipeline(dit(), autoencoder(), scheduler).save_pretrained(folder)
    return folder


@cache
def quiet() -> None:
    """Without the progress bars of the libraries."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
