"""CLIP as a zero-shot classifier: images are examples, and the prompts are always the same."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPConfig, CLIPModel

from laplace_lora import KronLoraLaplace, LoraGGN
from support.batches import images
from support.models import excite
from support.references import assert_near, looped_jacobians
from support.rows_apart import loader_of

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "projection_dim": 8,
}
EOS = 2


class ZeroShot(nn.Module):
    """Logits of images, ``(images, prompts)``: similarities with the texts of the classes."""

    def __init__(self, clip, prompts):
        super().__init__()
        self.clip = clip
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 20, (prompts, 4), generator=generator)
        ids[:, -1] = EOS
        self.register_buffer("prompts", ids)

    def forward(self, batch):
        out = self.clip(input_ids=self.prompts, pixel_values=batch["pixel_values"])
        return out.logits_per_image


def zero_shot(prompts=3, towers=("vision_model", "text_model")):
    torch.manual_seed(0)
    vision = {**TOWER, "image_size": 16, "patch_size": 8}
    text = {**TOWER, "vocab_size": 20, "eos_token_id": EOS, "max_position_embeddings": 8}
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
    targets = rf".*({'|'.join(towers)}).*(q_proj|v_proj)"
    adapted = excite(get_peft_model(CLIPModel(config), LoraConfig(r=2, target_modules=targets)))
    return ZeroShot(adapted.double(), prompts).eval()


@pytest.mark.parametrize("prompts", [3, 4])
def test_the_vision_tower_has_kronecker_factors_whatever_the_number_of_prompts(prompts):
    model, batch = zero_shot(prompts, ("vision_model",)), images(4, 16)
    backend = LoraGGN(model, "classification")
    jacobians, f = backend.jacobians(batch)
    assert f.shape == (4, prompts)
    assert_near(f, model(batch).detach())
    assert_near(jacobians, looped_jacobians(model, batch))
    assert not any(linear.is_diagonal for linear in backend.maps)
    la = KronLoraLaplace(model, "classification")
    found = []
    for batch_size in (4, 1, 3):
        la.fit(loader_of(batch, batch_size))
        found.append([f.matrix for factors in la.curvature.kfacs for f in factors])
    assert_near(found[1], found[0])
    assert_near(found[2], found[0])
    assert_near(la(batch).sum(1), torch.ones(4).double())


@pytest.mark.parametrize("prompts", [3, 4, 8])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_the_text_tower_is_refused_by_name_or_gets_the_diagonal(prompts, size):
    model = zero_shot(prompts)
    batch = {name: value[:size] for name, value in images(4, 16).items()}
    with pytest.raises(RuntimeError, match=r"text_model.*uncovered='diag'"):
        LoraGGN(model, "classification").jacobians(batch)
    backend = LoraGGN(model, "classification", uncovered="diag")
    assert_near(backend.jacobians(batch)[0], looped_jacobians(model, batch))
    diagonal = {linear.name for linear in backend.maps if linear.is_diagonal}
    assert diagonal and all("text_model" in name for name in diagonal)
    assert len(diagonal) == 4
