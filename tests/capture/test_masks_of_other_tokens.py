"""Masks of latents, entities and patches: one of other tokens is not believed, their own is."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    BertForSequenceClassification,
    BigBirdConfig,
    BigBirdForSequenceClassification,
    LukeConfig,
    LukeForEntityClassification,
    PerceiverConfig,
    PerceiverForSequenceClassification,
    Siglip2Config,
    Siglip2ForImageClassification,
)

from laplace_lora import KronLoraLaplace, LogitsModel
from support.batches import loader, split_rows, token_batch
from support.models import bert_config, excite
from support.references import assert_near, explicit_ggn

LATENTS = 6


def adapted(base, targets):
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=targets)
    return LogitsModel(excite(get_peft_model(base, lora)).double()).eval()


def perceiver():
    torch.manual_seed(0)
    config = PerceiverConfig(
        num_latents=LATENTS,
        d_latents=16,
        d_model=16,
        num_blocks=1,
        num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
        vocab_size=50,
        max_position_embeddings=16,
        num_labels=3,
    )
    return adapted(PerceiverForSequenceClassification(config), ["query", "value"])


def byte_loader(lengths, batch_size=3):
    batch = token_batch(lengths, pad_to=LATENTS)
    batch["inputs"] = batch.pop("input_ids")
    return batch, DataLoader(split_rows(batch), batch_size=batch_size)


@pytest.mark.parametrize("lengths", [(6, 3, 5), (6, 6, 6, 4, 5, 2)])  # the second's padding is late
def test_latents_as_many_as_tokens_are_no_tokens(lengths):
    _, loader = byte_loader(lengths)
    with pytest.raises(RuntimeError, match="but not the same ones"):
        KronLoraLaplace(perceiver(), "classification").fit(loader)


def test_latents_have_a_diagonal_block_where_they_may():
    model = perceiver()
    batch, loader = byte_loader((6, 3, 5))
    la = KronLoraLaplace(model, "classification", uncovered="diag")
    la.fit(loader)
    expected = explicit_ggn(model, batch).diagonal().detach()
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    covered = [len(factors) == 2 for factors in la.curvature.kfacs]
    assert any(covered) and not all(covered)  # keys and values of the text itself have factors
    for factors, part in zip(la.curvature.kfacs, expected.split(sizes), strict=True):
        if len(factors) == 1:
            assert_near(factors[0].matrix.diagonal(), part)


def test_entities_as_many_as_tokens_are_no_tokens():
    torch.manual_seed(0)
    config = bert_config(LukeConfig, entity_vocab_size=9, entity_emb_size=8, num_labels=3)
    model = adapted(LukeForEntityClassification(config), ["entity_embedding_dense"])
    batch = token_batch((4, 2, 3))
    entities = torch.tensor([[1, 2, 0, 0], [3, 4, 5, 0], [6, 0, 0, 0]])
    places = (torch.arange(4) % 2).view(1, 4, 1).where(entities.unsqueeze(-1) > 0, -1)
    batch["entity_ids"], batch["entity_position_ids"] = entities, places
    batch["entity_attention_mask"] = (entities > 0).long()
    with pytest.raises(RuntimeError, match=r"\['entity_attention_mask'\] among them"):
        KronLoraLaplace(model, "classification").fit(DataLoader(split_rows(batch), batch_size=3))


def test_padding_that_a_model_reads_or_keeps_is_no_reason_to_refuse():
    torch.manual_seed(0)
    read = adapted(BertForSequenceClassification(bert_config(num_labels=3)), ["query", "value"])
    config = bert_config(BigBirdConfig, block_size=4, num_random_blocks=1, num_labels=3)
    kept = adapted(BigBirdForSequenceClassification(config), ["query", "value"])
    left = DataLoader(split_rows(token_batch((4, 2, 3), side="left")), batch_size=3)
    with pytest.warns(UserWarning, match="answers a padded text otherwise.*pad on the right"):
        KronLoraLaplace(read, "classification").fit(left)
    blocks = token_batch((32, 29, 30))  # whose padding to whole blocks comes back
    KronLoraLaplace(kept, "classification").fit(DataLoader(split_rows(blocks), batch_size=3))


def test_padded_patches_of_images_do_not_count():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    vision = {**sizes, "num_hidden_layers": 1, "patch_size": 2, "num_patches": 16}
    text = {**sizes, "num_hidden_layers": 1, "vocab_size": 9}
    torch.manual_seed(0)
    config = Siglip2Config(vision_config=vision, text_config=text, num_labels=3)
    model = adapted(Siglip2ForImageClassification(config), ["q_proj", "v_proj"])
    images, padded = [], []
    for n, (height, width) in enumerate([(4, 4), (3, 4), (2, 3)]):
        patches = torch.randn(height * width, 12, generator=torch.Generator().manual_seed(n))
        real = torch.ones(len(patches), dtype=torch.long)
        shape = torch.tensor([height, width])
        rest = {"spatial_shapes": shape, "labels": n}
        images.append({"pixel_values": patches.double(), "pixel_attention_mask": real, **rest})
        missing = 16 - len(patches)
        patches = F.pad(patches.double(), (0, 0, 0, missing), value=3.0)
        padded.append(
            {"pixel_values": patches, "pixel_attention_mask": F.pad(real, (0, missing)), **rest}
        )
    found = []
    for examples, batch_size in [(images, 1), (padded, 3)]:
        la = KronLoraLaplace(model, "classification")
        la.fit(DataLoader(examples, batch_size=batch_size))
        found.append([factor.matrix for factors in la.curvature.kfacs for factor in factors])
    assert_near(found[1], found[0])


class BothWays(torch.nn.Module):
    """Reads a text forwards and backwards in time; padding changes nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(50, 8)
        self.ahead, self.back = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        real = attention_mask.unsqueeze(-1)
        x = self.embed(input_ids) * real
        ahead = (self.ahead(x) * real).cumsum(1).tanh()
        back = (self.back(x.flip(1)) * real.flip(1)).cumsum(1).tanh().flip(1)
        return self.head(((ahead + back) * real).sum(1) / real.sum(1))


def test_a_text_that_is_read_backwards_has_its_padding_elsewhere():
    model = adapted(BothWays(), ["ahead", "back"])
    with pytest.raises(RuntimeError, match="stand where the mask has padding") as error:
        KronLoraLaplace(model, "classification").fit(loader(batch_size=3))
    assert "back" in str(error.value) and "ahead" not in str(error.value)
    la = KronLoraLaplace(model, "classification", uncovered="diag", factor_rank=None)
    la.fit(loader(batch_size=3))
    whole = KronLoraLaplace(model, "classification", uncovered="diag", factor_rank=None)
    whole.fit(loader(batch_size=1))  # without padding
    assert_near(la(token_batch((4, 2))), whole(token_batch((4, 2))))
