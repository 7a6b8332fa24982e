"""A tokenizer of one-letter words."""

from transformers import PreTrainedTokenizerFast


def word_tokenizer(pad="[PAD]"):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *"abcdefgh"])}
    tokens = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        unk_token="[UNK]",
        pad_token=pad,
        model_max_length=16,
        model_input_names=["input_ids", "attention_mask"],
    )
