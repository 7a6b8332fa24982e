"""Which of a model's logits of starts and ends are those of the text."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LayoutLMv3Config, LayoutLMv3ForQuestionAnswering

from laplace_lora import FullLoraLaplace
from support.models import bert_config, excite
from support.references import assert_near
from support.spans import question_batch, question_loader


def test_image_patches_behind_a_text_are_no_answers():
    torch.manual_seed(0)
    sizes = {"coordinate_size": 3, "shape_size": 2, "input_size": 8, "patch_size": 4}
    base = LayoutLMv3ForQuestionAnswering(bert_config(LayoutLMv3Config, **sizes))
    lora = LoraConfig(task_type="QUESTION_ANS", r=2, target_modules=["query", "value"])
    model = excite(get_peft_model(base, lora)).double().eval()
    batch = question_batch()
    texts, tokens = batch["input_ids"].shape
    batch["bbox"] = torch.zeros(texts, tokens, 4, dtype=torch.long)
    batch["pixel_values"] = torch.randn(texts, 3, 8, 8, dtype=torch.float64)
    la = FullLoraLaplace(model, "question_answering")
    la.fit(question_loader(3, batch))
    inputs = {key: value for key, value in batch.items() if not key.endswith("positions")}
    own = model(**inputs)
    assert own.start_logits.shape[1] > tokens  # and patches
    real = batch["attention_mask"].bool()
    ours = la.model(batch).chunk(2, dim=1)
    for logits, expected in zip(ours, (own.start_logits, own.end_logits), strict=True):
        assert_near(logits[real], expected[:, :tokens][real])
