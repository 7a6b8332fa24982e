"""Where a text is read in one pass, its logits and their tangents come a few tokens at a time."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from laplace_lora import DiagLoraLaplace, KronLoraLaplace
from laplace_lora.generation import reading, score
from laplace_lora.generation.sampled_predictor import SampledPredictor
from laplace_lora.models.tangents.forward_mode import ForwardMode
from support.generation import FIELDS, K, seeded
from support.language import text_batch, text_loader
from support.models import TINY, base_model, excite
from support.sampled import language_model

ALL = (*FIELDS, "log_probabilities")


def joined():
    """A row of three texts, whose positions start anew."""
    lengths = (4, 5, 6)
    ids = torch.randint(2, TINY["vocab_size"], (1, sum(lengths)), generator=seeded())
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {
        "input_ids": ids,
        "position_ids": positions,
        "labels": ids.masked_fill(positions < 1, -100),
    }


def adapted(base, **kwargs):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **kwargs)
    return excite(get_peft_model(base, config)).double()


class OfLength(LlamaForCausalLM):
    """A model whose logits depend on more than what its head sees."""

    def forward(self, input_ids=None, **kwargs):
        returned = super().forward(input_ids=input_ids, **kwargs)
        returned.logits = returned.logits * input_ids.shape[1]
        return returned


def posterior(kind):
    torch.manual_seed(0)
    batch, cls = joined(), KronLoraLaplace
    if kind == "prompt":
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = excite(get_peft_model(base_model("llama-lm"), config)).double()
        batch, cls = text_batch((9, 7), (1, 3)), DiagLoraLaplace
    elif kind == "trained head":
        model = adapted(base_model("llama-lm"), modules_to_save=["lm_head"])
        cls = DiagLoraLaplace
    elif kind == "of length":
        model = adapted(OfLength(LlamaConfig(**TINY, max_position_embeddings=32)))
    else:
        model = language_model(kind)
    la = cls(model, "language_modeling", prior_precision=20.0, uncovered="diag")
    la.fit(text_loader(2, text_batch((6, 6, 6), (1, 1, 1))))
    return la, batch


@pytest.mark.parametrize("kind", ["llama-lm", "gemma2", "prompt", "trained head", "of length"])
def test_parts_are_those_of_the_whole(kind, monkeypatch):
    la, batch = posterior(kind)
    whole = score(la, batch, K, generator=seeded())
    monkeypatch.setattr(reading, "PIECE", 4)
    parts = score(la, batch, K, generator=seeded())
    for name in ALL:
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


@pytest.mark.parametrize("kind", ["llama-lm", "prompt"])
@pytest.mark.parametrize("bound", ["PIECE", "ROOM"])
def test_few_are_in_memory_at_once_and_the_network_runs_once(kind, bound, monkeypatch):
    la, batch = posterior(kind)
    width, passes = batch["input_ids"].shape[1], []
    run = ForwardMode.run

    def counted(self, arguments, *rest):
        passes.append(arguments["input_ids"].shape[1])
        return run(self, arguments, *rest)

    monkeypatch.setattr(ForwardMode, "run", counted)
    monkeypatch.setattr(reading, bound, 4 if bound == "PIECE" else 1)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with SampledPredictor(la, K, 4, seeded()).opened(inputs) as texts:
        sizes = [tangents.shape[2] for _, _, tangents in texts.logits(torch.arange(width))]
    assert sum(sizes) == width
    assert max(sizes) == (4 if bound == "PIECE" else 1)
    assert passes.count(width) == 1
