"""Tokenizers of one-letter words and of bytes."""

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


def special_tokenizer(template="h $A"):
    """As Llama's, Mistral's and Gemma's: a word begins every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = "h", "g"
    tokens = [(name, tokenizer.convert_tokens_to_ids(name)) for name in "gh"]
    processor = TemplateProcessing(single=template, special_tokens=tokens)
    tokenizer.backend_tokenizer.post_processor = processor
    return tokenizer


def byte_tokenizer(merges=()):
    """GPT-2's bytes, with few merges: a character outside ASCII has several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokens = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, list(merges)))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokens)


def stripping_tokenizer(words=("the", "meal", "was", "good", "2", ".")):
    """Llama 2's decoder, with bytes for what is no word: it drops a text's first space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *words]
    pieces += [f"▁{word}" for word in words]
    scores = [(piece, -1.0 - (i < 256)) for i, piece in enumerate(pieces)]
    tokens = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokens.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokens.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokens)
