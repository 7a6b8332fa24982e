"""Tiny models of many architectures, built from their configurations."""

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING

from support.models import TINY, excite

# One size under the names that configurations give it; unknown ones are ignored.
TEXT = {
    **TINY,
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "d_model": 16,
    "d_ff": 24,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "ffn_dim": 24,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 24,
    "embedding_size": 16,
    "word_embed_proj_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "rotary_dim": 4,
    "n_ctx": 64,
}
IMAGE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}
WINDOWS = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}
SPEECH = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "feat_extract_norm": "layer",
    "vocab_size": 10,
}
WHISPER = {
    **TEXT,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 20,
    "classifier_proj_size": 8,
}
SPECTROGRAM = {**IMAGE, "max_length": 16, "num_mel_bins": 8}
SEGMENTS = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
}
POOLED = {**SEGMENTS, "patch_sizes": [7, 3], "strides": [4, 2], "padding": [2, 1]}
CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "causal": "AutoModelForCausalLM",
    "choice": "AutoModelForMultipleChoice",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image": "AutoModelForImageClassification",
    "audio": "AutoModelForAudioClassification",
    "vision-language": "AutoModelForImageTextToText",
}
TASK_TYPES = {"classification": "SEQ_CLS", "causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}


def architecture(task, kind, config, dtype=torch.float64, target="all-linear"):
    """Return an adapted model away from its start, ``None`` if transformers lacks its kind."""
    if kind not in CONFIG_MAPPING or not hasattr(transformers, CLASSES[task]):
        return None
    torch.manual_seed(0)
    if task in ("classification", "image", "audio"):
        config = {**config, "num_labels": 3}
    base = getattr(transformers, CLASSES[task]).from_config(CONFIG_MAPPING[kind](**config))
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=target, task_type=TASK_TYPES.get(task))
    return excite(get_peft_model(base, lora)).to(dtype).eval()
