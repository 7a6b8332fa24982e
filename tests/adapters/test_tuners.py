"""Every tuner of PEFT is right or refused by name: a sweep, see `support.sweep`."""

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch.utils.data import DataLoader

from laplace_lora import DiagLoraLaplace
from support.batches import loader, split_rows, token_batch
from support.models import TARGETS, base_model, excite
from support.references import assert_near
from support.sweep import alone, answers, logits, outcome, texts, unpadded

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
RIGHT, DIAGONAL = "right", "diagonal"
MODULES = {"target_modules": ["q_proj", "v_proj"]}
PROMPT = {"num_virtual_tokens": 3}
SINGLE = {"dtype": torch.float32}  # made for single precision only


def on_modules(**config):
    return {**MODULES, **config}


# PEFT's type -> (outcome, arguments of its configuration, options of `outcome`)
TUNERS = {
    "ADALORA": (RIGHT, on_modules(init_r=3, target_r=2, total_step=9, tfinal=1), {}),
    "ADAMSS": (DIAGONAL, MODULES, SINGLE),
    "ADAPTION_PROMPT": (DIAGONAL, {"adapter_len": 3, "adapter_layers": 1}, {}),
    "BEFT": (DIAGONAL, {"target_modules": ["v_proj"]}, {}),
    "BOFT": (DIAGONAL, on_modules(boft_block_size=4), {}),
    "C3A": (DIAGONAL, on_modules(block_size=4), {}),
    "CARTRIDGE": (DIAGONAL, {"num_virtual_tokens": 4, "num_frozen_tokens": 1}, {}),
    "CPT": (
        DIAGONAL,
        {"cpt_token_ids": [3, 4, 5], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 2]},
        {},
    ),
    "DEFT": (DIAGONAL, MODULES, {}),
    "DELORA": (DIAGONAL, on_modules(r=2), {}),
    "FOURIERFT": (DIAGONAL, on_modules(n_frequency=20), {}),
    "FROD": (DIAGONAL, MODULES, {}),
    "GLORA": (DIAGONAL, MODULES, {}),
    "GRALORA": (DIAGONAL, on_modules(r=4, gralora_k=2), {}),
    "HIRA": (DIAGONAL, on_modules(r=2), {}),
    "HRA": (DIAGONAL, on_modules(r=2), {}),
    "IA3": (
        DIAGONAL,
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {},
    ),
    "LILY": ("the model mixes the examples of a batch", on_modules(r=2), {}),
    "LN_TUNING": (DIAGONAL, {"target_modules": ["input_layernorm"]}, {}),
    "LOHA": (DIAGONAL, on_modules(r=2), {}),
    "LOKR": (DIAGONAL, on_modules(r=2), {}),
    "LORA": (RIGHT, on_modules(r=2), {}),
    "MISS": (DIAGONAL, on_modules(r=4), {}),
    "MULTITASK_PROMPT_TUNING": (DIAGONAL, {**PROMPT, "num_tasks": 2}, {}),
    "OFT": (DIAGONAL, on_modules(oft_block_size=4, r=0), {}),
    "OSF": (DIAGONAL, MODULES, {}),
    "PEANUT": (DIAGONAL, MODULES, {}),
    "POLY": (DIAGONAL, on_modules(r=2, n_tasks=2, n_skills=2, n_splits=1), {}),
    "PREFIX_TUNING": (DIAGONAL, PROMPT, {}),
    "PROMPT_TUNING": (DIAGONAL, PROMPT, {}),
    "PSOFT": (DIAGONAL, on_modules(r=4), {}),
    "PVERA": (DIAGONAL, on_modules(r=2), {}),
    "P_TUNING": (DIAGONAL, {**PROMPT, "encoder_hidden_size": 8}, {}),
    "RANDLORA": (DIAGONAL, on_modules(r=4), {}),
    "ROAD": (DIAGONAL, on_modules(group_size=4), {}),
    "SHADOW": (DIAGONAL, {}, {}),
    "SHIRA": (DIAGONAL, on_modules(r=2), {}),
    "SUPERTUNING": (DIAGONAL, MODULES, {}),
    "TINYLORA": (DIAGONAL, MODULES, {}),
    "TRAINABLE_TOKENS": (
        DIAGONAL,
        {"target_modules": ["embed_tokens"], "token_indices": list(range(5, 50))},
        {},
    ),
    "UNILORA": (DIAGONAL, MODULES, {}),
    "VBLORA": (DIAGONAL, on_modules(num_vectors=8, vector_length=4, r=2, topk=2), {}),
    "VERA": (DIAGONAL, on_modules(r=2), {}),
    "WAVEFT": (DIAGONAL, on_modules(n_frequency=20), {}),
    "XLORA": ("are active together", {"hidden_size": 16, "xlora_depth": 1}, {}),
}
NEEDS_TASKS = ("MULTITASK_PROMPT_TUNING", "POLY")


# Names of the query, key, value and output layers, of a norm and of the embedding
MODELS = {
    "llama-lm": ("q_proj", "k_proj", "v_proj", "down_proj", "input_layernorm", "embed_tokens"),
    "gpt2-lm": ("c_attn", "c_attn", "c_attn", "mlp.c_proj", "ln_1", "wte"),
    "bert": ("query", "key", "value", "output.dense", "LayerNorm", "word_embeddings"),
    "t5-lm": ("q", "k", "v", "wo", "layer_norm", "shared"),
}
TASKS = {
    "llama-lm": "CAUSAL_LM",
    "gpt2-lm": "CAUSAL_LM",
    "bert": "SEQ_CLS",
    "t5-lm": "SEQ_2_SEQ_LM",
}
EXCEPTIONS = {
    ("CARTRIDGE", "bert"): "refix tuning",  # BERT takes no prefixes, and says so
    ("PREFIX_TUNING", "bert"): "refix tuning",
    ("OSF", "gpt2-lm"): "no trainable parameters",  # PEFT adapts no Conv1D, silently
}
LINEAR_ONLY = (
    *("ADAMSS", "BEFT", "BOFT", "C3A", "DELORA", "GLORA", "HRA", "LILY", "LOHA", "LOKR", "MISS"),
    *("OFT", "PEANUT", "POLY", "PSOFT", "ROAD", "SHIRA", "SUPERTUNING"),
)
# What PEFT 0.21 itself cannot do
IMPOSSIBLE = {
    *((name, "gpt2-lm") for name in (*LINEAR_ONLY, "XLORA")),
    *((name, "bert") for name in ("ADAPTION_PROMPT", "CPT", "SHADOW", "XLORA")),
    *(
        (name, "t5-lm")
        for name in ("ADAPTION_PROMPT", "CPT", "MULTITASK_PROMPT_TUNING", "SHADOW", "XLORA")
    ),
}


def renamed(config, model):
    """Return a configuration with the names of a model's modules."""
    names = dict(zip(MODELS["llama-lm"], MODELS[model], strict=True))
    return {
        key: list(dict.fromkeys(names[name] for name in value)) if "modules" in key else value
        for key, value in config.items()
    }


def built(name, model, folder):
    config, options = TUNERS[name][1:]
    config = renamed(config, model)
    base = base_model(model, use_cache=False)  # X-LoRA insists on that
    if name == "XLORA":
        lora = LoraConfig(r=2, task_type=TASKS[model], **renamed(MODULES, model))
        get_peft_model(base_model(model), lora).save_pretrained(folder)
        config = {**config, "adapters": {"first": str(folder), "second": str(folder)}}
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[getattr(PeftType, name)]
    adapted = excite(get_peft_model(base, kind(task_type=TASKS[model], **config)))
    return adapted.to(options.get("dtype", torch.float64)).eval()


def test_no_tuner_is_left_out():
    assert {kind.name for kind in PeftType} <= set(TUNERS), "PEFT has a new tuner: add its outcome"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", TUNERS)
def test_tuners(name, model, tmp_path):
    expected, _, options = TUNERS[name]
    expected = EXCEPTIONS.get((name, model), expected)
    if not hasattr(PeftType, name):
        pytest.skip(f"the installed PEFT has no {name}")
    try:
        adapted, batch = built(name, model, tmp_path), texts()
        if name in NEEDS_TASKS:
            batch["task_ids"] = torch.zeros(3, dtype=torch.long)
        if model == "bert":
            result = outcome(adapted, batch, alone, logits, **options)
        else:
            inputs = started if model == "t5-lm" else unpadded
            result = outcome(adapted, batch, inputs, answers, TARGETS, **options)
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        if (name, model) in IMPOSSIBLE:
            pytest.skip(f"PEFT cannot do {name} on {model}: {error}")
        raise
    assert result == expected or expected in result


def started(batch, n):
    return {**unpadded(batch, n), "decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)}


@pytest.mark.parametrize("name", ["SHADOW", "CPT"])
def test_what_loading_leaves_of_a_posterior(name, tmp_path):
    """PEFT freezes what ties SHADOW's small model to the layers, and saves other CPT embeddings."""
    if not hasattr(PeftType, name):
        pytest.skip(f"the installed PEFT has no {name}")
    model = built(name, "llama-lm", tmp_path)
    la = DiagLoraLaplace(model, "classification", target_ids=TARGETS, uncovered="diag")
    la.fit(loader())
    model.save_pretrained(tmp_path)
    la.save_pretrained(tmp_path, precision="exact")
    loaded = PeftModel.from_pretrained(base_model("llama-lm", use_cache=False), tmp_path).double()
    if name == "CPT":
        with pytest.raises(ValueError, match="PEFT saves CPT's embeddings with their trained"):
            DiagLoraLaplace.from_pretrained(loaded, tmp_path)
        return
    again = DiagLoraLaplace.from_pretrained(loaded, tmp_path)
    assert_near(again(texts()), la(texts()))


# What PEFT does not load as it was fitted, or what has no posterior
NOT_LOADED = ("CPT", "LILY", "P_TUNING", "XLORA")


@pytest.mark.parametrize("name", [name for name in TUNERS if name not in NOT_LOADED])
def test_a_posterior_loads_around_the_saved_adapter(name, tmp_path):
    """PEFT's files keep all settings, and give back all that was drawn, by which it is known."""
    if not hasattr(PeftType, name):
        pytest.skip(f"the installed PEFT has no {name}")
    model = built(name, "llama-lm", tmp_path)
    batch = token_batch((4, 2, 5))
    if name in NEEDS_TASKS:
        batch["task_ids"] = torch.zeros(3, dtype=torch.long)
    la = DiagLoraLaplace(model, "classification", target_ids=TARGETS, uncovered="diag")
    la.fit(DataLoader(split_rows(batch), batch_size=3))
    model.save_pretrained(tmp_path)
    la.save_pretrained(tmp_path, precision="exact")
    loaded = PeftModel.from_pretrained(base_model("llama-lm", use_cache=False), tmp_path)
    again = DiagLoraLaplace.from_pretrained(loaded.to(la.mean.dtype), tmp_path)
    assert_near(again(batch), la(batch), 1e-5)
