"""Tiny vision-language models, and questions about images: patches of all, or a row of each."""

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

from support.architectures import IMAGE as TOWER
from support.architectures import TEXT, architecture
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


LLAVA = {
    "text_config": {**TEXT, "model_type": "llama", "max_position_embeddings": 128},
    "vision_config": {**TOWER, "model_type": "clip_vision_model", "projection_dim": 16},
    "vision_feature_layer": -1,
    "image_seq_length": 16,
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
}
SMOLVLM = {
    "text_config": {
        **TEXT,
        "model_type": "llama",
        "pad_token_id": 0,
        "max_position_embeddings": 128,
    },
    "vision_config": {**TOWER, "model_type": "smolvlm_vision"},
    "scale_factor": 2,
    "pad_token_id": 0,
    "image_token_id": IMAGE,
}
PER_TEXT = {"llava": (LLAVA, 16), "smolvlm": (SMOLVLM, 4)}  # and tokens of an image
TEXTS_ALONE = r".*(language_model|text_model).*(q_proj|v_proj)"
WITH_TOWER = r".*(q_proj|v_proj)"


def image_text_model(kind="llava", target=TEXTS_ALONE):
    return architecture("vision-language", kind, PER_TEXT[kind][0], target=target).eval()


def image_texts(counts, kind="llava", tails=(2, 3, 1, 4), side="right", seed=0):
    """Texts about several images, one or none, in a batch and each alone.

    Args:
        counts: Of the images of each text.
        kind: Of the model; images are in one tensor of LLaVA's, and text by text of SmolVLM's.
        tails: Tokens behind the images.
        side: Where padding stands.
        seed: Of the images.
    """
    asked = [
        [5, *[IMAGE] * PER_TEXT[kind][1] * count, 6, *range(7, 7 + tail)]
        for count, tail in zip(counts, tails, strict=False)
    ]
    width = max(map(len, asked))
    ids = torch.zeros(len(asked), width, dtype=torch.long)
    for n, tokens in enumerate(asked):
        where = slice(width - len(tokens), width) if side == "left" else slice(len(tokens))
        ids[n, where] = torch.tensor(tokens)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(sum(counts), 3, 16, 16, generator=generator, dtype=torch.float64)
    own = pixels.split(list(counts))
    singles = [{"input_ids": torch.tensor([tokens])} for tokens in asked]
    for single, images in zip(singles, own, strict=True):
        single["attention_mask"] = torch.ones_like(single["input_ids"])
        if len(images):
            single["pixel_values"] = images if kind == "llava" else images.unsqueeze(0)
    if kind == "smolvlm":
        pixels = torch.nn.utils.rnn.pad_sequence(list(own), batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}, singles
