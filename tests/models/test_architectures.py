"""Every architecture is right or refused by name: a sweep, see `support.sweep`.

What is expected of each stands in the table, so that neither a wrong number nor a new refusal
passes. All linear layers are adapted, unlike in common use, to meet as many of them as there are.
"""

import pytest
import torch

from laplace_lora import LogitsModel, LoraGGN
from support.architectures import (
    IMAGE,
    POOLED,
    SEGMENTS,
    SPECTROGRAM,
    SPEECH,
    STAGES,
    TEXT,
    WHISPER,
    WINDOWS,
    architecture,
)
from support.models import TARGETS
from support.references import assert_near
from support.sweep import alone, answers, logits, outcome, texts, unpadded

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
RIGHT, DIAGONAL = "right", "diagonal"
PADDED_LEFT = "padding before a text changes"
SINGLE = {"dtype": torch.float32}  # experts and some masks are not made for double precision
DECODER = {"is_decoder": True}
FULL_ATTENTION = {"attention_type": "original_full"}  # for good, not from the first short batch on

# kind -> (outcome, configuration beyond the common one, options)
CLASSIFIERS = {
    "albert": (RIGHT, {}, {}),
    "bart": (RIGHT, {}, {}),
    "bert": (RIGHT, {}, {}),
    "big_bird": (RIGHT, FULL_ATTENTION, {}),
    "bloom": (RIGHT, {}, {}),
    "camembert": (RIGHT, {}, {}),
    "convbert": (RIGHT, {}, {}),
    "ctrl": (RIGHT, {}, {}),
    "data2vec-text": (RIGHT, {}, {}),
    "deberta": (RIGHT, {}, {}),
    "deberta-v2": (RIGHT, {}, {}),
    "electra": (RIGHT, {}, {}),
    "ernie": (RIGHT, {}, {}),
    "esm": (DIAGONAL, {}, {}),
    "flaubert": (RIGHT, {}, {}),
    "fnet": (RIGHT, {}, {}),
    "gemma2": (RIGHT, {}, {}),
    "gpt2": (RIGHT, {}, {}),
    "gpt_neox": (RIGHT, {}, {}),
    "layoutlm": (RIGHT, {}, {}),
    "llama": (RIGHT, {}, {}),
    "longformer": (DIAGONAL, {"attention_window": [4, 4]}, {}),
    "mbart": (RIGHT, {}, {}),
    "megatron-bert": (RIGHT, {}, {}),
    "mixtral": (DIAGONAL, {}, SINGLE),
    "modernbert": (RIGHT, {}, {}),
    "mpnet": (RIGHT, {}, {}),
    "mpt": (RIGHT, {}, {}),
    "nystromformer": (RIGHT, {}, {}),
    "openai-gpt": (RIGHT, {}, {}),
    "opt": (RIGHT, {}, {}),
    "phi": (RIGHT, {}, {}),
    "qwen3": (RIGHT, {}, {}),
    "rembert": (RIGHT, {}, {}),
    "roberta": (RIGHT, {}, {}),
    "roformer": (RIGHT, {}, {}),
    "squeezebert": (RIGHT, {}, {}),
    "t5": (RIGHT, {}, {}),
    "tapas": (RIGHT, {}, {}),
    "xlm": (RIGHT, {}, {}),
    "xlm-roberta-xl": (RIGHT, {}, {}),
    "yoso": (RIGHT, {}, {}),
}
CAUSAL = {
    "apertus": (RIGHT, {}, {}),
    "bart": (DIAGONAL, DECODER, {"left": PADDED_LEFT}),
    "bert": (RIGHT, DECODER, {}),
    "biogpt": (RIGHT, {}, {}),
    "blenderbot": (DIAGONAL, DECODER, {"left": PADDED_LEFT}),
    "bloom": (RIGHT, {}, SINGLE),
    "codegen": (RIGHT, {}, {}),
    "cohere2": (RIGHT, {}, {}),
    "ernie4_5": (RIGHT, {}, {}),
    "exaone4": (RIGHT, {}, {}),
    "gemma2": (RIGHT, {}, SINGLE),
    "gemma3_text": (RIGHT, {}, {}),
    "glm4": (RIGHT, {}, {}),
    "gpt2": (RIGHT, {}, {}),
    "gpt_bigcode": (RIGHT, {}, {}),
    "gpt_neox": (RIGHT, {}, {}),
    "gptj": (RIGHT, {}, {}),
    "granite": (RIGHT, {}, {}),
    "helium": (RIGHT, {}, {}),
    "lfm2": (RIGHT, {}, {}),
    "llama": (RIGHT, {}, {}),
    "mistral": (RIGHT, {}, {}),
    "mixtral": (DIAGONAL, {}, SINGLE),
    "mpt": (RIGHT, {}, SINGLE),
    "nemotron": (RIGHT, {}, {}),
    "olmo2": (RIGHT, {}, {}),
    "opt": (RIGHT, {}, {}),
    "persimmon": (RIGHT, {}, {}),
    "phi3": (RIGHT, {}, {}),
    "qwen2": (RIGHT, {}, {}),
    "qwen2_moe": (RIGHT, {}, SINGLE),
    "qwen3": (RIGHT, {}, {}),
    "qwen3_moe": (DIAGONAL, {}, SINGLE),
    "roberta": (RIGHT, DECODER, {}),
    "smollm3": (RIGHT, {}, {}),
    "stablelm": (RIGHT, {}, {}),
    "starcoder2": (RIGHT, {}, {}),
    "xglm": (RIGHT, {}, SINGLE),
    "xlm": (RIGHT, {}, {}),
}
SEQ2SEQ = {
    "bart": (RIGHT, {}, {}),
    "bigbird_pegasus": (RIGHT, FULL_ATTENTION, {}),
    "blenderbot": (RIGHT, {}, {}),
    "led": ("is not finite", {"attention_window": [4, 4]}, {}),
    "longt5": (RIGHT, {}, {}),
    "m2m_100": (RIGHT, {}, {}),
    "marian": (RIGHT, {}, {}),
    "mbart": (RIGHT, {}, {}),
    "mt5": (RIGHT, {}, {}),
    "pegasus": (RIGHT, {}, {}),
    "pegasus_x": (DIAGONAL, {}, {}),
    "plbart": (RIGHT, {}, {}),
    "t5": (RIGHT, {}, {}),
    "umt5": (RIGHT, {}, {}),
}
XLNET = {"vocab_size": 60, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}
CHOICES = {
    "albert": (RIGHT, TEXT),
    "big_bird": (RIGHT, {**TEXT, **FULL_ATTENTION}),
    "bert": (RIGHT, TEXT),
    "camembert": (RIGHT, TEXT),
    "data2vec-text": (RIGHT, TEXT),
    "deberta-v2": (RIGHT, TEXT),
    "distilbert": (RIGHT, TEXT),
    "electra": (RIGHT, TEXT),
    "ernie": (RIGHT, TEXT),
    "megatron-bert": (RIGHT, TEXT),
    "modernbert": (RIGHT, TEXT),
    "mpnet": (RIGHT, TEXT),
    "nystromformer": (RIGHT, TEXT),
    "rembert": (RIGHT, TEXT),
    "roberta": (RIGHT, TEXT),
    "roformer": (RIGHT, TEXT),
    "xlm-roberta": (RIGHT, TEXT),
    "xlnet": (DIAGONAL, XLNET),  # whose tokens stand before the batch
}
IMAGES = {
    "beit": (RIGHT, {**IMAGE, "out_indices": [0, 1]}),
    "clip": (RIGHT, {"vision_config": IMAGE, "projection_dim": 8}),
    "convnext": (RIGHT, STAGES),
    "convnextv2": (RIGHT, STAGES),
    "dinov2": (RIGHT, IMAGE),
    "ijepa": (RIGHT, IMAGE),
    "poolformer": (RIGHT, POOLED),
    "segformer": (RIGHT, SEGMENTS),
    "siglip": (DIAGONAL, {"vision_config": IMAGE}),
    "swin": (RIGHT, WINDOWS),
    "swinv2": (DIAGONAL, WINDOWS),
    "vit": (RIGHT, IMAGE),
}
WAVES = {
    "data2vec-audio": (RIGHT, {**SPEECH, "conv_pos_kernel_size": 5}),
    "hubert": (RIGHT, SPEECH),
    "sew": (RIGHT, {**SPEECH, "squeeze_factor": 2}),
    "unispeech": (RIGHT, SPEECH),
    "wav2vec2": (RIGHT, SPEECH),
    "wav2vec2-conformer": (DIAGONAL, SPEECH),
    "wavlm": (DIAGONAL, SPEECH),
}
SPECTROGRAMS = {
    "audio-spectrogram-transformer": (RIGHT, SPECTROGRAM, "input_values", (16, 8)),
    "whisper": (RIGHT, WHISPER, "input_features", (8, 40)),
}


def built(task, kind, config, **options):
    model = architecture(task, kind, config, **options)
    if model is None:
        pytest.skip(f"the installed transformers has no {kind}")
    return model


def expect(result, expected):
    if expected in (RIGHT, DIAGONAL):
        assert result == expected
    else:
        assert expected in result


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classifiers(kind):
    expected, config, options = CLASSIFIERS[kind]
    model = built("classification", kind, {**TEXT, **config}, **options)
    expect(outcome(model, texts(eos=2), alone, logits, **options), expected)


@pytest.mark.parametrize("kind", CHOICES)
def test_multiple_choice(kind):
    expected, config = CHOICES[kind]
    model = built("choice", kind, config)
    lengths = (6, 3, 5, 4, 2, 6, 3, 3, 5, 4, 6, 2)
    batch = {name: rows.view(3, 4, -1) for name, rows in texts(lengths, eos=2).items()}
    expect(outcome(model, batch, alone, logits), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_language_models(kind, side):
    expected, config, options = CAUSAL[kind]
    options = dict(options)
    refusal = options.pop("left", expected)
    model = built("causal", kind, {**TEXT, **config}, **options)
    result = outcome(model, texts(side=side), unpadded, answers, TARGETS, **options)
    expect(result, refusal if side == "left" else expected)


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_encoder_decoders(kind):
    expected, config, options = SEQ2SEQ[kind]
    model = built("seq2seq", kind, {**TEXT, **config}, **options)
    start = torch.tensor([[model.config.decoder_start_token_id]])

    def inputs(batch, n):
        return {**unpadded(batch, n), "decoder_input_ids": start}

    expect(outcome(model, texts(), inputs, answers, TARGETS, **options), expected)


def noise(*shape):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("kind", IMAGES)
def test_image_classifiers(kind):
    expected, config = IMAGES[kind]
    model = built("image", kind, config)
    batch = {"pixel_values": noise(3, 16, 16)}
    expect(outcome(model, batch, alone, logits), expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", WAVES)
def test_speech_classifiers(kind, masked):
    """A mask of samples fits no layer, which sees frames; models say which frames are real."""
    expected, config = WAVES[kind]
    model = built("audio", kind, config)
    batch = {"input_values": noise(800)}
    if masked:
        batch["attention_mask"] = torch.ones(3, 800, dtype=torch.long)
        batch["attention_mask"][1, 500:] = 0
        batch["input_values"][1, 500:] = 0
    if masked and kind == "sew":
        expected = DIAGONAL  # its layers see frames that it has squeezed once more
    expect(outcome(model, batch, alone, logits), expected)


@pytest.mark.parametrize("kind", SPECTROGRAMS)
def test_spectrogram_classifiers(kind):
    expected, config, name, shape = SPECTROGRAMS[kind]
    model = built("audio", kind, config)
    expect(outcome(model, {name: noise(*shape)}, alone, logits), expected)


def vision(kind, **config):
    return {**IMAGE, "model_type": kind, **config}


def language(kind, **config):
    return {**TEXT, "model_type": kind, "max_position_embeddings": 128, **config}


SIGLIP = vision("siglip_vision_model", vision_use_head=False)
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
QWEN_TOKENS = {"video_token_id": 56, "vision_start_token_id": 57, "vision_end_token_id": 58}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "intermediate_size": 24,
    "out_hidden_size": 16,
}
# kind -> (tokens of an image, configuration); their left-padded batches are right as well
VISION_LANGUAGE = {
    "llava": (
        16,
        {
            "text_config": language("llama"),
            "vision_config": vision("clip_vision_model", projection_dim=16),
            "vision_feature_layer": -1,
            "image_seq_length": 16,
        },
    ),
    "paligemma": (
        16,
        {
            "text_config": language("gemma"),
            "vision_config": {**SIGLIP, "projection_dim": 16},
            "projection_dim": 16,
        },
    ),
    "gemma3": (
        4,
        {
            "text_config": language("gemma3_text"),
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
            "boi_token_index": 56,
            "eoi_token_index": 57,
        },
    ),
    "internvl": (
        4,
        {
            "text_config": language("qwen2"),
            "vision_config": vision("internvl_vision", image_size=[16, 16], patch_size=[4, 4]),
            "image_seq_length": 4,
            "downsample_ratio": 0.5,
            "vision_feature_layer": -1,
        },
    ),
    "aya_vision": (
        4,
        {
            "text_config": language("cohere2"),
            "vision_config": SIGLIP,
            "downsample_factor": 2,
            "vision_feature_layer": -1,
        },
    ),
    "qwen2_vl": (
        16,
        {
            **QWEN_TOKENS,
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "vision_config": {**QWEN_VISION, "embed_dim": 16},
        },
    ),
    "qwen2_5_vl": (
        16,
        {
            **QWEN_TOKENS,
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "vision_config": {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [0]},
        },
    ),
    "qwen3_vl": (
        16,
        {
            **QWEN_TOKENS,
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "vision_config": {
                **QWEN_VISION,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        },
    ),
}
IMAGE_TOKEN = 55


def questions(kind, image_tokens, side):
    """Three questions of different lengths about an image each."""
    asked = [[5, 57, *[IMAGE_TOKEN] * image_tokens, 58, 6, *range(7, 9 + n)] for n in (2, 0, 3)]
    width = max(map(len, asked))
    ids = torch.zeros(3, width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for n, tokens in enumerate(asked):
        where = slice(width - len(tokens), width) if side == "left" else slice(len(tokens))
        ids[n, where], mask[n, where] = torch.tensor(tokens), 1
    batch = {"input_ids": ids, "attention_mask": mask}
    is_image = (ids == IMAGE_TOKEN).int()
    if kind.startswith("qwen"):
        patches = noise(64, 96).flatten(0, 1)
        grid = torch.tensor([[1, 8, 8]] * 3)
        return {
            **batch,
            "mm_token_type_ids": is_image,
            "pixel_values": patches,
            "image_grid_thw": grid,
        }
    if kind in ("gemma3", "paligemma"):
        batch["token_type_ids"] = is_image.long()
    return {**batch, "pixel_values": noise(3, 16, 16)}


def test_images_that_are_not_one_of_each_text_are_not_divided():
    """Two of the first text and none of the second are as many images as texts."""
    image_tokens, config = VISION_LANGUAGE["llava"]
    config = {**config, "image_token_id": IMAGE_TOKEN, "image_token_index": IMAGE_TOKEN}
    options = {"target": r".*language_model.*q_proj"}
    model = built("vision-language", "llava", config, **options)
    asked = [[5, *[IMAGE_TOKEN] * image_tokens * n, 6] for n in (2, 0)]
    width = max(map(len, asked))
    ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in asked])
    batch = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": noise(3, 16, 16)[:2],
    }
    wrapped = LogitsModel(model, target_ids=TARGETS).eval()
    jacobians, _ = LoraGGN(wrapped, "classification").jacobians(batch)
    first = {k: v[:1] if k != "pixel_values" else v for k, v in batch.items()}
    second = {k: v[1:, :2] for k, v in batch.items() if k != "pixel_values"}
    for n, text in enumerate((first, second)):
        expected, _ = LoraGGN(wrapped, "classification").jacobians(text)
        assert_near(jacobians[n], expected[0])
    tower = built("vision-language", "llava", config, target=r".*(vision_tower.*q_proj|lm_head)")
    wrapped = LogitsModel(tower, target_ids=TARGETS).eval()
    with pytest.raises(RuntimeError, match=r"without the others .*batches of one example"):
        LoraGGN(wrapped, "classification", uncovered="diag").jacobians(batch)


def question_alone(batch, n):
    own = {k: v for k, v in batch.items() if k != "pixel_values"}
    pixels = batch["pixel_values"].unflatten(0, (3, -1))[n]
    return {**unpadded(own, n), "pixel_values": pixels}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", VISION_LANGUAGE)
def test_vision_language_models(kind, side):
    image_tokens, config = VISION_LANGUAGE[kind]
    config = {**config, "image_token_id": IMAGE_TOKEN, "image_token_index": IMAGE_TOKEN}
    target = r".*language_model.*(q_proj|v_proj|down_proj)"
    model = built("vision-language", kind, config, target=target)
    batch = questions(kind, image_tokens, side)
    fits = not kind.startswith("qwen")  # whose images are not one row each
    result = outcome(model, batch, question_alone, answers, TARGETS, fits=fits)
    expect(result, RIGHT)
