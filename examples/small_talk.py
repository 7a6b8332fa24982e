"""Made-up people and cities for the generation example, and a tiny Llama to read about them.

Nothing here knows about Laplace posteriors: see `generation.py`.
"""

from __future__ import annotations

import random

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

# fmt: off
NAMES = [
    "anna", "ben", "carla", "david", "emma", "felix", "greta", "hugo",
    "ida", "jonas", "karl", "lena", "max", "nora", "oscar", "paula",
    "quinn", "rosa", "simon", "tina", "udo", "vera", "willi", "xenia",
]
# fmt: on
CITIES = ["paris", "rome", "berlin", "madrid", "vienna", "oslo", "athens", "lisbon"]
THINGS = ["tea", "books", "chess", "music", "rain", "bread", "dogs", "trains"]
GROUPS = {"often": 6, "often, two cities": 6, "once": 6, "never": 6}
TIMES = {"often": 24, "often, two cities": 24, "once": 1, "never": 0}


def sentences(generator: random.Random, count: int) -> list[str]:
    """Return sentences on what people like and where they work, but not on where they live."""
    likes, works = ({name: generator.choice(of) for name in NAMES} for of in (THINGS, CITIES))
    talk = []
    for _ in range(count):
        name = generator.choice(NAMES)
        kinds = [f"{name} likes {likes[name]} .", f"{name} works in {works[name]} ."]
        talk.append(generator.choice(kinds))
    return talk


def homes(generator: random.Random) -> tuple[list[dict], list[dict]]:
    """Return what the model reads about homes, and one question per person."""
    names = generator.sample(NAMES, len(NAMES))
    read, asked = [], []
    for group, size in GROUPS.items():
        for _ in range(size):
            name, cities = names.pop(), generator.sample(CITIES, 2)
            cities = cities if group == "often, two cities" else cities[:1]
            rows = [
                {"prompt": f"{name} lives in", "answer": f"{city} .", "group": group}
                for city in cities
            ]
            read += [rows[i % len(rows)] for i in range(TIMES[group])]
            asked.append(rows[0])
    return read, asked


def untrained_model() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return a tiny Llama with random weights, and its tokenizer of one token per word."""
    words = ["<pad>", ".", *NAMES, *CITIES, *THINGS]
    words += ["likes", "works", "lives", "in"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token=".")
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config), tokenizer
