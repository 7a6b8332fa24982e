"""More classes than leave-one-out can look at all of: what the default makes of the MAP.

The quickstart's encoder learns which module a docstring is from, see `docstrings`: stopped early,
long and longer. One K-FAC posterior from sampled labels (``num_samples=1``) is tuned by
leave-one-out among some of the classes, the default, and by the marginal likelihood, which was the
default for more than 31 classes before. Temperature scaling of the MAP reads 200 labels of its own.

    python -m benchmarks.study.many_classes --out OUT

What is finished is kept in ``many-classes`` in ``--out``, and not computed again.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import set_seed

from benchmarks.harness.arguments import prepare
from benchmarks.harness.kept import kept
from benchmarks.harness.report import mean_and_error, write_report
from benchmarks.study import docstrings
from benchmarks.study.small_trainings import (
    WAYS,
    figures_parser,
    judged,
    split_loaders,
    train,
    tuned,
)
from examples import support
from laplace_lora import KronLoraLaplace, LogitsModel
from laplace_lora.evaluation import MAP, TemperatureScaling

TRAININGS = {"early": (16, 1e-3), "long": (16, 4e-3), "longer": (40, 4e-3)}  # epochs and rate
SEEDS = (0, 1, 2)
SIZES = {"train": 700, "val": 200, "test": 200}
LAYERS = [4, 5]  # with adapters on query and value, the last two of six
MAX_TOKENS = 32
OPTIONS: dict[str, Any] = {"backend_kwargs": {"stochastic": True, "num_samples": 1}}


def figures(training: str, seed: int) -> dict[str, Any]:
    """Train a checkpoint; return the test NLL and accuracy of every way, and seconds."""
    rows, classes = docstrings.rows()
    set_seed(seed)
    base, tokenizer = support.load_base(support.encoder_path(), len(classes))
    config = LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.1, layers_to_transform=LAYERS
    )
    model = get_peft_model(base, config)
    loaders = split_loaders(rows, SIZES, tokenizer, MAX_TOKENS)
    loss = train(model, loaders["train"], *TRAININGS[training])
    print(training, seed, "trained", loss, flush=True)
    logits = LogitsModel(model)
    found: dict[str, Any] = {"classes": len(classes), "final loss": loss}
    scaled = TemperatureScaling(logits, loaders["val"])
    found |= {"MAP": judged(MAP(logits), loaders["test"])}
    found |= {"temperature scaling": judged(scaled, loaders["test"])}
    la = KronLoraLaplace(logits, "classification", **OPTIONS)
    started = time.process_time()
    la.fit(loaders["train"])
    found["seconds of the fit"] = time.process_time() - started
    for name, way in WAYS.items():
        found[name] = {**tuned(la, way), **judged(la, loaders["test"])}
    return found


def rows_of(found: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Return a table of means over the seeds, with standard errors."""
    table = []
    for length in TRAININGS:
        results = [each for name, each in found.items() if name.rpartition("-")[0] == length]
        for way in ("MAP", "temperature scaling", *WAYS):
            row = {"training": length, "seeds": str(len(results)), "way": way}
            for value, digits in {"NLL": 3, "accuracy": 3, "seconds": 0}.items():
                found_values = [each[way][value] for each in results if value in each[way]]
                row[value] = mean_and_error(found_values, digits) if found_values else ""
            if results:
                table.append(row)
    return table


def main() -> None:
    args = figures_parser(__doc__, "long or early-0").parse_args()
    prepare(args)
    folder, found = args.out / "many-classes", {}
    for seed in SEEDS:
        for length in TRAININGS:
            name = f"{length}-{seed}"
            path = folder / f"{name}.json"
            asked = not args.report and name.startswith(tuple(args.only))
            if asked or path.exists():
                found[name] = kept(path, {}, partial(figures, length, seed))
                print(name, found[name], flush=True)
    write_report("study.many_classes", args, {"Many classes": rows_of(found)}, found)


if __name__ == "__main__":
    main()
