"""Choose an adapter by its evidence: marginal-likelihood training with laplace-torch.

`laplace.marglik_training` alternates between training the adapter and tuning its prior by the log
marginal likelihood, which needs no validation data. Run for several adapter configurations on the
quickstart's data, it says which of them the training data support; the held-out negative
log-likelihood stands next to it, for you to judge::

    python examples/marglik_training.py

Evidence compares models of one structure on the same data. With K-FAC it is a lower, rougher figure
than the exact one, so a difference of a few nats decides nothing.
"""

from __future__ import annotations

import argparse
import random

import quickstart
import torch
from laplace import marglik_training
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, set_seed

from laplace_lora import KronLoraLaplace, LogitsModel, LoraGGN

CONFIGURATIONS = {
    "rank 2": {"r": 2},
    "rank 8": {"r": 8},
    "rank 32": {"r": 32},
}


def train_and_judge(lora: dict, arguments: argparse.Namespace) -> tuple[float, float, float]:
    """Train one configuration.

    Returns:
        Log marginal likelihood, held-out NLL in nats per row, and held-out accuracy.
    """
    rows, names = quickstart.tumour_rows()
    random.Random(arguments.seed).shuffle(rows)
    set_seed(arguments.seed)
    # The adapter's scale stays the same, whatever its rank.
    lora = {"lora_alpha": 2 * lora["r"], **lora}
    model, tokenizer = quickstart.load_model(arguments.model, len(names), arguments.device, **lora)
    collate = DataCollatorWithPadding(tokenizer)
    encoded = quickstart.encode(rows, tokenizer)
    size = arguments.train_size
    train_loader = DataLoader(
        encoded[:size], quickstart.BATCH_SIZE, shuffle=True, collate_fn=collate
    )
    test_loader = DataLoader(encoded[size:], quickstart.BATCH_SIZE, collate_fn=collate)

    trained, logits_model, _, _ = marglik_training(
        LogitsModel(model),
        train_loader,
        "classification",
        hessian_structure="kron",
        backend=LoraGGN,
        optimizer_kwargs={"lr": quickstart.LEARNING_RATE},
        n_epochs=arguments.epochs,
        n_epochs_burnin=arguments.epochs // 3,
        marglik_frequency=max(1, arguments.epochs // 5),
        n_hypersteps=30,
        prior_structure="layerwise",
        progress_bar=True,
    )
    # The same posterior in this library's class, which predicts several times faster.
    la = KronLoraLaplace(
        logits_model, "classification", factor_rank=None, prior_precision=trained.prior_precision
    )
    la.fit(train_loader)
    nll, right = 0.0, 0
    for batch in tqdm(test_loader, desc="Predicting", leave=False):
        p = la(batch)
        labels = batch["labels"].to(p.device)
        nll += F.nll_loss(p.log(), labels, reduction="sum").item()
        right += int((p.argmax(-1) == labels).sum())
    held_out = len(rows) - size
    return la.log_marginal_likelihood().item(), nll / held_out, right / held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(quickstart.get_model_path()))
    parser.add_argument("--seed", type=int, default=0, help="of split, head and training")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--train-size", type=int, default=100, help="rows to train on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    results = {}
    for name, lora in CONFIGURATIONS.items():
        print(f"Training with {name}")
        results[name] = train_and_judge(lora, arguments)
    print(f"\n{'adapter':<26}{'log evidence':>14}{'held-out NLL':>14}{'accuracy':>10}")
    for name, (evidence, nll, accuracy) in results.items():
        print(f"{name:<26}{evidence:>14.1f}{nll:>14.3f}{accuracy:>10.3f}")
    best = max(results, key=lambda name: results[name][0])
    print(f"\nThe training data support {best!r} most.")


if __name__ == "__main__":
    main()
