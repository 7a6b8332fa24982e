"""Tiny vision-language models whose images are patches in one tensor, and questions about them."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from support.architectures import TEXT
from support.models import excite

IMAGE = 55


def vision_model(kind, config, **vision):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {**TEXT, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 4, **vision}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
    base = kind(
        config(
            text_config=text,
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=56,
            vision_start_token_id=57,
            vision_end_token_id=58,
        )
    )
    lora = LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj)")
    return excite(get_peft_model(base, lora)).double().eval()


VISION = {
    "qwen2_vl": (Qwen2VLForConditionalGeneration, Qwen2VLConfig, {"embed_dim": 16}),
    "qwen2_5_vl": (
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig,
        {
            "out_hidden_size": 16,
            "intermediate_size": 24,
            "window_size": 16,
            "fullatt_block_indexes": [0],
        },
    ),
    "qwen3_vl": (
        Qwen3VLForConditionalGeneration,
        Qwen3VLConfig,
        {
            "depth": 2,
            "out_hidden_size": 16,
            "intermediate_size": 24,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    ),
}


def question(answer):
    """A question about an image of 8 × 8 patches, which makes 16 tokens."""
    ids = torch.tensor([[5, 57, *[IMAGE] * 16, 58, 6, 7 + answer, 9]])
    generator = torch.Generator().manual_seed(answer)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(64, 96, generator=generator, dtype=torch.float64),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
    }
