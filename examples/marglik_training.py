"""Choose an adapter by its evidence: marginal-likelihood training with laplace-torch.

`laplace.marglik_training` alternates between training the adapter and tuning its prior by the log
marginal likelihood, which needs no validation data. Run for several adapter configurations on the
quickstart's data, it says which of them the training data support; the held-out negative
log-likelihood stands next to it, for comparison::

    python examples/marglik_training.py

Evidence compares models of one structure on the same data. With K-FAC it is a lower, rougher figure
than the exact one, so a difference of a few nats decides nothing: under ten there is no verdict.
"""

from __future__ import annotations

import argparse

import support
from laplace import marglik_training
from transformers import set_seed

from laplace_lora import KronLoraLaplace, LogitsModel, LoraGGN
from laplace_lora.evaluation import evaluate

CONFIGURATIONS = {
    "rank 2": {"r": 2},
    "rank 8": {"r": 8},
    "rank 32": {"r": 32},
}

CLEAR = 10  # nats between the best evidence and the next


def verdict(evidences: dict[str, float]) -> str:
    """Return which configuration the data support, as a sentence, if the evidence says so.

    Args:
        evidences: The log evidence of each configuration, two or more, in nats.
    """
    best, second, *_ = sorted(evidences, key=lambda name: -evidences[name])
    near = [name for name, value in evidences.items() if evidences[best] - value < CLEAR]
    if len(near) > 1:
        return f"The evidence decides nothing between {' and '.join(near)}: under {CLEAR} nats."
    lead = evidences[best] - evidences[second]
    return f"The training data support {best} most, by {lead:.1f} nats."


def train_and_evaluate(lora: dict, args: argparse.Namespace) -> dict[str, float]:
    """Train one configuration; return its log evidence, held-out NLL in nats, and accuracy."""
    set_seed(args.seed)
    # The adapter's scale stays the same, whatever its rank.
    lora = {"lora_alpha": 2 * lora["r"], **lora}
    model, tokenizer = support.load_model(args.model, len(args.names), args.device, **lora)
    train_loader = support.make_loader(args.train_rows, tokenizer, shuffle=True)
    trained, logits_model, _, _ = marglik_training(
        LogitsModel(model),
        train_loader,
        "classification",
        hessian_structure="kron",
        backend=LoraGGN,
        optimizer_kwargs={"lr": support.LEARNING_RATE},
        n_epochs=args.epochs,
        n_epochs_burnin=args.epochs // 3,
        marglik_frequency=max(1, args.epochs // 5),
        n_hypersteps=30,
        prior_structure="layerwise",
        progress_bar=True,
    )
    # The same posterior in this library's class, which predicts several times faster.
    la = KronLoraLaplace(
        logits_model, "classification", factor_rank=None, prior_precision=trained.prior_precision
    )
    la.fit(train_loader)
    report = evaluate(la, support.make_loader(args.test_rows, tokenizer), progress_bar=True)
    evidence = la.log_marginal_likelihood().item()
    return {"log evidence": evidence, "held-out NLL": report["NLL"], "accuracy": report["accuracy"]}


def main() -> None:
    common = ("model", "seed", "train-size", "epochs", "device")
    parser = support.argument_parser(__doc__, *common)
    arguments = parser.parse_args()
    split = support.read_split(parser, arguments)
    arguments.train_rows, arguments.test_rows, arguments.names = split
    results = {}
    for name, lora in CONFIGURATIONS.items():
        print(f"Training with {name}")
        results[name] = train_and_evaluate(lora, arguments)
    digits = {"log evidence": 1, "held-out NLL": 3, "accuracy": 3}
    rows = [
        {"adapter": name, **{key: f"{value[key]:.{d}f}" for key, d in digits.items()}}
        for name, value in results.items()
    ]
    print("\n" + support.table(rows))
    print("\n" + verdict({name: value["log evidence"] for name, value in results.items()}))


if __name__ == "__main__":
    main()
