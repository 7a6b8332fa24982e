"""Which words is a language model unsure of, and why? Fine-tune, fit a posterior, generate.

By default a tiny Llama is trained from scratch on small talk about people and cities, and then
fine-tuned with LoRA to say where people live. About some it reads often; of these, some live in two
cities in turn, which nobody could predict. About others it reads once, about some never::

    python examples/generation.py

The posterior tells the two reasons for doubt apart: entropy that is left if the weights were known
(aleatoric: the data disagree) and mutual information (epistemic: more data would help).

Your own model and texts, one JSON object a line with "prompt" and "answer"::

    python examples/generation.py --model Qwen/Qwen2.5-0.5B --data answers.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from laplace_lora import KronLoraLaplace
from laplace_lora.generation.decoding import TokenPredictions, generate, score

BATCH_SIZE = 16
MAX_NEW_TOKENS = 12
PRIOR_PRECISION = 10.0  # of the fine-tuning; a posterior is around the mode under a prior
HELD_OUT = 40  # rows of your own data to show results on
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


# --- Data: rows with "prompt", "answer" and "group" ----------------------------------------------


def small_talk(generator: random.Random, count: int) -> list[str]:
    """Return sentences on what people like and where they work, but not on where they live."""
    likes, works = ({name: generator.choice(of) for name in NAMES} for of in (THINGS, CITIES))
    sentences = []
    for _ in range(count):
        name = generator.choice(NAMES)
        kinds = [f"{name} likes {likes[name]} .", f"{name} works in {works[name]} ."]
        sentences.append(generator.choice(kinds))
    return sentences


def town_rows(generator: random.Random) -> tuple[list[dict], list[dict]]:
    """Return what the model reads about homes, and one question a person."""
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


def read_rows(path: Path, generator: random.Random) -> tuple[list[dict], list[dict]]:
    """Read rows from a ``.jsonl`` file, and hold some out.

    Raises:
        ValueError: If a line is not such a row, or there are too few.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append({**{key: row[key] for key in ("prompt", "answer")}, "group": "held out"})
            good = all(isinstance(value, str) and value.strip() for value in rows[-1].values())
        except (json.JSONDecodeError, KeyError, TypeError):
            good = False
        if not good:
            raise ValueError(
                f"{path}, line {number}: expected an object with non-empty strings as prompt and "
                f"answer, got {line.strip()[:80]}"
            )
    if len(rows) < 10:
        raise ValueError(f"{path}: ten rows or more are needed, got {len(rows)}")
    generator.shuffle(rows)
    held = min(HELD_OUT, len(rows) // 5)
    return rows[held:], rows[:held]


def encode(rows: list[dict], tokenizer) -> list[dict]:
    """Tokenize rows; only the answers are scored."""
    encoded = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(f"{row['prompt']} {row['answer']}")["input_ids"]
        if tokenizer.eos_token_id is not None and whole[-1] != tokenizer.eos_token_id:
            whole.append(tokenizer.eos_token_id)
        labels = [-100] * len(prompt) + whole[len(prompt) :]
        mask = [1] * len(whole)
        encoded.append({"input_ids": whole, "attention_mask": mask, "labels": labels})
    return encoded


# --- Model and training: nothing here knows about Laplace ----------------------------------------


def tiny_base(generator: random.Random, steps: int) -> tuple[PreTrainedModel, object]:
    """Train a tiny Llama on small talk; return it with its tokenizer, a token a word."""
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
    base = LlamaForCausalLM(config)
    texts = [tokenizer(text)["input_ids"] for text in small_talk(generator, 64 * steps)]
    data = [{"input_ids": text, "labels": text} for text in texts]
    train(base, loader(data, tokenizer, 64), 1, 3e-3, 0.0, "Learning to talk")
    return base, tokenizer


def load_base(name: str) -> tuple[PreTrainedModel, object]:
    """Load a pretrained causal language model and its tokenizer."""
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        base = AutoModelForCausalLM.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model: transformers cannot load {name!r}: {error}") from None
    if tokenizer.pad_token is None:  # many decoders have none
        tokenizer.pad_token = tokenizer.eos_token
    return base, tokenizer


def loader(data: list[dict], tokenizer, size: int, shuffle: bool = True) -> DataLoader:
    """Return batches, padded with their labels."""
    collate = DataCollatorForSeq2Seq(tokenizer)
    return DataLoader(data, size, shuffle=shuffle, collate_fn=collate)


def train(
    model, batches: DataLoader, epochs: int, rate: float, precision: float, name: str
) -> None:
    """Train what is trainable on next tokens, to the mode under a Gaussian prior.

    Args:
        model: The model.
        batches: Batches with labels.
        epochs: Passes over them.
        rate: Learning rate at the start; it falls to zero.
        precision: Of the prior.
        name: Of the progress bar.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    scored = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    steps = epochs * len(batches)
    optimizer = torch.optim.Adam(weights, lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    with tqdm(total=steps, desc=name) as bar:
        for _ in range(epochs):
            for batch in batches:
                loss = model(**batch.to(model.device)).loss  # a mean over scored tokens
                penalty = 0.5 * precision * sum(p.square().sum() for p in weights) / scored
                (loss + penalty).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


# --- What the posterior says ---------------------------------------------------------------------


def ask(la: KronLoraLaplace, batches: DataLoader, top_k: int) -> list[TokenPredictions]:
    """Score the answers of all batches."""
    generator = torch.Generator(la._device)
    return [
        score(la, batch, top_k, generator=generator.manual_seed(0))
        for batch in tqdm(batches, desc="Asking the posterior")
    ]


def print_groups(rows: list[dict], scored: list[TokenPredictions]) -> None:
    """Print means by group, in nats, over the first token of each answer."""
    columns = {
        "p MAP": [one.map_probabilities[:, 0].amax(-1) for one in scored],
        "p Laplace": [one.probabilities[:, 0].amax(-1) for one in scored],
        "aleatoric": [one.expected_entropy[:, 0] for one in scored],
        "epistemic": [one.mutual_information[:, 0] for one in scored],
    }
    joined = {name: torch.cat(values) for name, values in columns.items()}
    print("\nFirst token of the answer: probability of the likeliest, and doubt in nats")
    print(f"{'':<20}{'rows':>7}" + "".join(f"{name:>11}" for name in joined))
    for group in dict.fromkeys(row["group"] for row in rows):
        chosen = torch.tensor([row["group"] == group for row in rows])
        means = "".join(f"{values.cpu()[chosen].mean():>11.3f}" for values in joined.values())
        print(f"{group:<20}{int(chosen.sum()):>7}{means}")


def print_generated(
    la: KronLoraLaplace, rows: list[dict], tokenizer, top_k: int, unsure: float
) -> None:
    """Continue prompts; mark what the weights are unsure of, and say what they hesitate between."""
    tokenizer.padding_side = "left"
    prompts = tokenizer([row["prompt"] for row in rows], padding=True, return_tensors="pt")
    source = torch.Generator(la._device).manual_seed(0)
    written = generate(la, prompts, MAX_NEW_TOKENS, top_k, generator=source)
    print(f"\nGenerated; [word?] has an epistemic doubt of {unsure} nats or more")
    for n, row in enumerate(rows):
        words = []
        for t in range(int(written.mask[n].sum())):
            word = tokenizer.decode(written.tokens[n, t]).strip()
            doubtful = written.mutual_information[n, t] >= unsure
            words.append(f"[{word}?]" if doubtful else word)
        best = written.probabilities[n, 0].topk(min(2, top_k))
        guesses = ", ".join(
            f"{tokenizer.decode(written.candidates[n, 0, i]).strip()} {p:.2f}"
            for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        )
        print(f"  {row['prompt']} {' '.join(words)}  ({row['group']})")
        print(
            f"      {guesses}; aleatoric {written.expected_entropy[n, 0]:.2f}, epistemic "
            f"{written.mutual_information[n, 0]:.2f}; log probability of the text "
            f"{written.sequence_log_prob[n]:.2f}, by MAP {written.sequence_map_log_prob[n]:.2f}"
        )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", help="folder or name of a causal language model of yours")
    parser.add_argument("--data", type=Path, help="a .jsonl file of yours")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and training")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training rows")
    rate = "of the fine-tuning; a pretrained model needs less"
    parser.add_argument("--learning-rate", type=float, default=5e-3, help=rate)
    unsure = "nats of mutual information from which a token is marked"
    parser.add_argument("--unsure", type=float, default=0.5, help=unsure)
    parser.add_argument("--top-k", type=int, default=8, help="tokens looked at in each place")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="where to compute")
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.data is None):
        parser.error("give --model and --data together; the built-in model knows only its words")
    if arguments.epochs < 1 or arguments.top_k < 1:
        parser.error("--epochs and --top-k must be above 0")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    generator = random.Random(arguments.seed)
    set_seed(arguments.seed)
    if arguments.data is None:
        rows, asked = town_rows(generator)
        base, tokenizer = tiny_base(generator, steps=300)
    else:
        try:
            rows, asked = read_rows(arguments.data, generator)
        except (OSError, ValueError) as error:
            raise SystemExit(f"--data: {error}") from None
        base, tokenizer = load_base(arguments.model)

    # 1. Fine-tune as usual.
    # PEFT picks the architecture's usual modules (for Llama q_proj and v_proj).
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, lora_alpha=8)
    model: PeftModel = get_peft_model(base, config).to(arguments.device)
    data = loader(encode(rows, tokenizer), tokenizer, BATCH_SIZE)
    rate = arguments.learning_rate
    train(model, data, arguments.epochs, rate, PRIOR_PRECISION, "Fine-tuning")

    # 2. Fit a posterior on next-token prediction and tune its prior, all on the training data.
    la = KronLoraLaplace(model, "language_modeling", backend_kwargs={"num_samples": 4})
    la.fit(data, progress_bar=True)
    la.optimize_prior_precision()
    print(f"Prior precision {la.prior_precision.item():.3g}, chosen by the marginal likelihood")

    # 3. Ask it.
    questions = loader(encode(asked, tokenizer), tokenizer, BATCH_SIZE, shuffle=False)
    print_groups(asked, ask(la, questions, arguments.top_k))
    shown = [row for i, row in enumerate(asked) if arguments.data or i % 6 < 2][:8]
    print_generated(la, shown, tokenizer, arguments.top_k, arguments.unsure)


if __name__ == "__main__":
    main()
