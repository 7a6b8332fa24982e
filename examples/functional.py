"""The functional interface on the quickstart's model: factors, evidence, tuned prior, predictive.

For people who know bayesian_lora: the same steps with the same calls, and one import changed. Run
it without arguments after ``pip install "laplace-lora[examples]"``; nothing is downloaded, and two
cores need about two minutes::

    python examples/functional.py

The table has the fine-tuned weights (MAP), temperature scaling with further labelled rows, and the
posterior, which needs none.

The classes (see the quickstart) do the same in four lines; the functions suit those who need the
parts: curvature of other modules, an objective of their own, hooks.
"""

from __future__ import annotations

from collections.abc import Mapping

import support
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import set_seed

from laplace_lora.evaluation import MAP, TemperatureScaling, compare, evaluate
from laplace_lora.functional import (
    calculate_kronecker_factors,
    jacobian_mean,
    model_evidence,
    predict_probs,
    variance,
)

LORA_RANK = 8
N_KFAC = 32  # rank of the factors of wide sides
WIDE = 256  # sides from here on are low-rank
STEPS = 200  # of the ascent on the evidence


def forward_call(model: PeftModel, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits of a batch: not probabilities, and one row per example."""
    return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def log_likelihood(model: PeftModel, loader: DataLoader) -> Tensor:
    """Return the log likelihood of the data, summed over the examples."""
    model.eval()
    with torch.no_grad():
        parts = [
            F.cross_entropy(forward_call(model, batch), batch["labels"], reduction="sum")
            for batch in loader
        ]
    return -torch.stack(parts).sum()


def tune_prior(
    model: PeftModel, LL: Tensor, factors: dict[str, tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Maximise the evidence over the prior variance; return both."""
    log_s2 = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([log_s2], lr=0.05, maximize=True)
    for _ in tqdm(range(STEPS), desc="Tuning the prior"):
        optimizer.zero_grad()
        evidence = model_evidence(model, LL, factors, LORA_RANK, N_KFAC, log_s2.exp())
        evidence.backward()
        optimizer.step()
    return log_s2.detach().exp(), evidence.detach()


def main() -> None:
    parser = support.argument_parser(__doc__, "model", "seed", "train-size", "epochs")
    arguments = parser.parse_args()
    train_rows, held_out, names = support.read_split(parser, arguments, least_held_out=2)
    val_rows, test_rows = support.share_out(held_out)
    print(f"Rows: {len(train_rows)} to train on, {len(test_rows)} to test on")
    set_seed(arguments.seed)
    model, tokenizer = support.load_model(arguments.model, len(names), "cpu", r=LORA_RANK)
    train_loader = support.make_loader(train_rows, tokenizer, shuffle=True)
    test_loader = support.make_loader(test_rows, tokenizer, 4 * support.BATCH_SIZE)
    support.train(model, train_loader, arguments.epochs)

    # 1. Kronecker factors of the adapters, from the training data. The head stays as it is.
    factors = calculate_kronecker_factors(
        model, forward_call, train_loader, N_KFAC, WIDE, ["lora"], use_tqdm=True
    )
    low_rank = sum(inputs.shape[0] != inputs.shape[1] for inputs, _ in factors.values())
    print(f"Factors of {len(factors)} modules, {low_rank} of them with a low-rank input factor")

    # 2. The prior variance with the highest evidence.
    LL = log_likelihood(model, train_loader)
    s2, evidence = tune_prior(model, LL, factors)
    print(f"Prior variance {s2.item():.3g}, log evidence {evidence.item():.1f}")

    # 3. Gaussian logits of unseen rows, and their probabilities.
    def laplace(batch: Mapping[str, Tensor]) -> Tensor:
        jacobian, f_mu = jacobian_mean(model, batch)
        f_var = variance(batch, jacobian, factors, s2, len(names), LORA_RANK, N_KFAC, "cpu")
        return predict_probs(f_mu, f_var)

    # Temperature scaling corrects the MAP with labelled rows that the posterior does without.
    scaled = TemperatureScaling(model, support.make_loader(val_rows, tokenizer))
    print(f"Temperature {scaled.temperature:.2f}, found on {len(val_rows)} further rows")
    methods = {"MAP": MAP(model), "temperature scaling": scaled, "Laplace": laplace}
    reports = [evaluate(m, test_loader, name=n, progress_bar=True) for n, m in methods.items()]
    print("\n" + compare(reports, support.SHOWN))


if __name__ == "__main__":
    main()
