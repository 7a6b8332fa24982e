"""Tokens one by one read as the text does."""

import pytest

from laplace_lora.generation.token_texts import WINDOW, token_texts
from support.texts import byte_tokenizer, stripping_tokenizer, word_tokenizer

TEXT = "the meal  was good. Zürich 東京 🙂🙂 2"


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), stripping_tokenizer()])
def test_tokens_joined_are_the_text(tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    for begin in range(len(ids)):
        texts = token_texts(ids[begin:], tokenizer)
        assert len(texts) == len(ids) - begin
        assert "".join(texts).lstrip(" ") == tokenizer.decode(ids[begin:]).lstrip(" ")


def test_every_word_has_its_space():
    tokenizer = stripping_tokenizer()
    ids = tokenizer("the meal was good.")["input_ids"]
    assert tokenizer.decode(ids[1:2]) == "meal"
    assert token_texts(ids[1:], tokenizer) == [" meal", " was", " good", "."]
    assert token_texts(word_tokenizer()("a b a")["input_ids"], word_tokenizer()) == [
        " a",
        " b",
        " a",
    ]


def test_a_character_stands_with_the_token_that_completes_it():
    tokenizer = byte_tokenizer()
    ids = tokenizer("é東🙂a")["input_ids"]
    assert token_texts(ids, tokenizer) == ["", "é", "", "", "東", "", "", "", "🙂", "a"]
    assert token_texts(ids[:4], tokenizer) == ["", "é", "", "\N{REPLACEMENT CHARACTER}"]
    assert token_texts([], tokenizer) == []


class Counting:
    """A tokenizer that knows the longest sequence that it was given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.longest = tokenizer, 0

    def decode(self, ids):
        self.longest = max(self.longest, len(ids))
        return self.tokenizer.decode(ids)


@pytest.mark.parametrize("tail", ["東", "the"])
def test_long_texts_are_read_through_a_window(tail):
    tokenizer = Counting(byte_tokenizer())
    byte = byte_tokenizer()("東")["input_ids"][1]
    ids = [byte] * 100 + byte_tokenizer()(tail)["input_ids"]  # a hundred broken characters
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids) and "".join(texts).endswith(tail)
    assert "".join(texts) == byte_tokenizer().decode(ids)
    assert tokenizer.longest <= 2 * WINDOW + 1
    silent = [ord("~") + 300] * 100  # numbers of no token
    assert token_texts(silent, tokenizer) == [""] * 100
    assert tokenizer.longest <= 2 * WINDOW + 1
