"""The test helpers themselves."""

from peft import LoraConfig

from support.batches import rows, token_batch
from support.models import PAD, adapter_config

LENGTHS = (3, 6, 4, 6, 1)


def test_rows_take_examples():
    batch = token_batch(LENGTHS)
    assert rows(batch, slice(0, 2))["input_ids"].shape == (2, 6)
    assert adapter_config("bert").r == 2


def test_pad_is_a_token_nothing_else_uses():
    assert not (token_batch(LENGTHS)["input_ids"][1] == PAD).any()


def test_lora_config_is_peft_s():
    assert isinstance(adapter_config("bert"), LoraConfig)
