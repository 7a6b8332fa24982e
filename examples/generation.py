"""Which words is a language model unsure of, and why? Fine-tune, fit a posterior, generate.

By default a tiny Llama is trained from scratch on small talk about people and cities, and then
fine-tuned with LoRA to say where people live. About some it reads often; of these, some live in two
cities in turn, which nobody could predict. About others it reads once, about some never::

    python examples/generation.py

The posterior separates the two reasons for uncertainty: entropy that is left if the weights were
known (aleatoric: the data disagree) and mutual information (epistemic: more data would help).

Your own model and texts, one JSON object per line with "prompt" and "answer"::

    python examples/generation.py --model Qwen/Qwen2.5-0.5B --data answers.jsonl
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import small_talk
import support
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, set_seed

from laplace_lora import KronLoraLaplace
from laplace_lora.generation import TokenPredictions, generate, score

BATCH_SIZE = 16
MAX_NEW_TOKENS = 12
PRIOR_PRECISION = 10.0  # of the fine-tuning; a posterior is around the mode under a prior
HELD_OUT = 40  # rows of your own data to show results on


def read_rows(path: Path, generator: random.Random) -> tuple[list[dict], list[dict]]:
    """Read rows from a ``.jsonl`` file, and hold some out.

    Raises:
        ValueError: If a line is not such a row, or there are too few.
    """
    rows = []
    for place, given in support.json_lines(path):
        row = {key: given.get(key) for key in ("prompt", "answer")}
        if not all(isinstance(value, str) and value.strip() for value in row.values()):
            raise ValueError(
                f"{place}: expected non-empty strings as prompt and answer, got {str(given)[:80]}"
            )
        rows.append({**row, "group": "held out"})
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


def loader(data: list[dict], tokenizer, size: int, shuffle: bool = True) -> DataLoader:
    """Return batches, padded with their labels."""
    collate = DataCollatorForSeq2Seq(tokenizer)
    return DataLoader(data, size, shuffle=shuffle, collate_fn=collate)


def train(
    model: torch.nn.Module, batches: DataLoader, epochs: int, rate: float, precision: float
) -> None:
    """Train what is trainable on next tokens, to the mode under a Gaussian prior.

    Args:
        model: The model.
        batches: Batches with labels.
        epochs: Passes over them.
        rate: Learning rate at the start; it falls to zero.
        precision: Of the prior; 0 for none.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    scored = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    optimizer = torch.optim.Adam(weights, lr=rate)
    steps = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        loss = model(**batch.to(model.device)).loss  # a mean over scored tokens
        return loss + 0.5 * precision * sum(p.square().sum() for p in weights) / scored

    support.train(model, batches, epochs, optimizer, schedule, loss_of, "Training")


def ask(la: KronLoraLaplace, batches: DataLoader, top_k: int) -> list[TokenPredictions]:
    """Score the answers of all batches."""
    generator = torch.Generator(la.mean.device)
    return [
        score(la, batch, top_k, generator=generator.manual_seed(0))
        for batch in tqdm(batches, desc="Scoring answers")
    ]


def print_groups(rows: list[dict], scored: list[TokenPredictions]) -> None:
    """Print means by group, in nats, over the first token of each answer."""
    columns = {
        "p MAP": [batch.map_probabilities[:, 0].amax(-1) for batch in scored],
        "p Laplace": [batch.probabilities[:, 0].amax(-1) for batch in scored],
        "aleatoric": [batch.expected_entropy[:, 0] for batch in scored],
        "epistemic": [batch.mutual_information[:, 0] for batch in scored],
    }
    joined = {name: torch.cat(values).cpu() for name, values in columns.items()}
    print("\nFirst token of the answer: probability of the likeliest, and uncertainty in nats")
    means = []
    for group in dict.fromkeys(row["group"] for row in rows):
        chosen = torch.tensor([row["group"] == group for row in rows])
        values = {name: f"{column[chosen].mean():.3f}" for name, column in joined.items()}
        means.append({"group": group, "rows": int(chosen.sum()), **values})
    print(support.table(means))


def print_generated(
    la: KronLoraLaplace, rows: list[dict], tokenizer, top_k: int, unsure: float
) -> None:
    """Continue prompts; mark uncertain words, and list the two likeliest first words."""
    tokenizer.padding_side = "left"
    prompts = tokenizer([row["prompt"] for row in rows], padding=True, return_tensors="pt")
    source = torch.Generator(la.mean.device).manual_seed(0)
    written = generate(la, prompts, MAX_NEW_TOKENS, top_k, generator=source)
    print(f"\nGenerated; [word?] has an epistemic uncertainty of {unsure} nats or more")
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
    parser = support.argument_parser(__doc__, "seed", "device")
    parser.add_argument("--model", help="folder or name of a causal language model of yours")
    parser.add_argument("--data", type=Path, help="a .jsonl file of yours")
    parser.add_argument("--epochs", type=support.count, default=20, help="passes over the rows")
    rate = "of the fine-tuning; a pretrained model needs less"
    parser.add_argument("--learning-rate", type=float, default=5e-3, help=rate)
    unsure = "nats of mutual information from which a token is marked"
    parser.add_argument("--unsure", type=float, default=0.1, help=unsure)
    parser.add_argument(
        "--top-k", type=support.count, default=8, help="tokens considered at each position"
    )
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.data is None):
        parser.error("give --model and --data together; the built-in model knows only its words")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    generator = random.Random(arguments.seed)
    set_seed(arguments.seed)
    if arguments.data is None:
        rows, asked = small_talk.homes(generator)
        base, tokenizer = small_talk.untrained_model()
        sentences = small_talk.sentences(generator, 64 * 300)
        texts = [tokenizer(text)["input_ids"] for text in sentences]
        data = [{"input_ids": text, "labels": text} for text in texts]
        train(base, loader(data, tokenizer, 64), 1, 3e-3, 0.0)
    else:
        try:
            rows, asked = read_rows(arguments.data, generator)
        except (OSError, ValueError) as error:
            raise SystemExit(f"--data: {error}") from None
        base, tokenizer = support.load_base(arguments.model, kind=AutoModelForCausalLM)

    # 1. Fine-tune as usual.
    # PEFT picks the architecture's usual modules (for Llama q_proj and v_proj).
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, lora_alpha=8)
    model: PeftModel = get_peft_model(base, config).to(arguments.device)
    data = loader(encode(rows, tokenizer), tokenizer, BATCH_SIZE)
    train(model, data, arguments.epochs, arguments.learning_rate, PRIOR_PRECISION)

    # 2. Fit a posterior on next-token prediction and tune its prior, all on the training data.
    la = KronLoraLaplace(model, "language_modeling", backend_kwargs={"num_samples": 4})
    la.fit(data, progress_bar=True)
    la.optimize_prior_precision()
    print(la.tuning)

    # 3. How uncertain is it, and why?
    questions = loader(encode(asked, tokenizer), tokenizer, BATCH_SIZE, shuffle=False)
    print_groups(asked, ask(la, questions, arguments.top_k))
    shown = [row for i, row in enumerate(asked) if arguments.data or i % 6 < 2][:8]
    print_generated(la, shown, tokenizer, arguments.top_k, arguments.unsure)


if __name__ == "__main__":
    main()
