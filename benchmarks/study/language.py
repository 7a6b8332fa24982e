"""Language models: how wide a posterior may be that was fitted on texts.

SmolLM2-135M-Instruct is fine-tuned on questions about made-up people (`benchmarks.study.facts`).
Ways of tuning one K-FAC posterior over A and B are compared on questions that were held out, each
fact being asked for in another way than in training:

* NLL of the answers in nats per token, above that of the MAP;
* truth against made-up: the difference between the log probabilities of the true answer and of a
  wrong one, as a share of the MAP's;
* known against unknown: how well the largest mutual information of an answer's tokens tells people
  that were trained from people never heard of (AUROC).

The rule, set before held-out texts were read: NLL at most the MAP's + 0.01 nats per token, and at
least half of the difference kept, on every seed.

    python -m benchmarks.study.language --out OUT

Checkpoints and figures that are finished are kept in OUT, and not computed again.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, get_linear_schedule_with_warmup, set_seed

from benchmarks.harness.arguments import RESULTS, plain_parser, prepare
from benchmarks.harness.half import has_bfloat16
from benchmarks.harness.kept import read, write
from benchmarks.harness.report import write_report
from benchmarks.study.facts import TRAINED, Fact, facts
from examples import support
from laplace_lora import KronLoraLaplace
from laplace_lora.generation import score
from laplace_lora.generation.label_scores import label_log_probabilities
from laplace_lora.predictive.sample_set import SampleSet

EPOCHS, RATE, BATCH = 12, 5e-3, 30
FIT_BATCH, SCORED = 15, 30
SAMPLES = 16
HELD_OUT, UNKNOWN = 30, 16  # questions; the evidence, so wide that few suffice, has half of them
FIGURES = "figures.json"


class Texts:
    """Facts as texts of which the answer is scored.

    Args:
        tokenizer: The decoder's.
    """

    def __init__(self, tokenizer: Any) -> None:
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.tokenizer = tokenizer

    def row(self, question: str, answer: str) -> dict[str, list[int]]:
        """Return a text; only its answer is scored."""
        asked = self.tokenizer(question)["input_ids"]
        answered = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids = [*asked, *answered, self.tokenizer.eos_token_id]
        labels = [-100] * len(asked) + ids[len(asked) :]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    def loader(self, texts: Sequence[tuple[str, str]], size: int, shuffle: bool) -> DataLoader:
        """Return batches of questions and answers."""
        rows = [self.row(*text) for text in texts]
        return DataLoader(
            rows, size, shuffle=shuffle, collate_fn=DataCollatorForSeq2Seq(self.tokenizer)
        )


def trained_texts(known: Sequence[Fact]) -> list[tuple[str, str]]:
    """Return the texts that are trained."""
    return [fact.text(way) for fact in known for way in range(TRAINED)]


def checkpoint(seed: int, out: Path) -> tuple[PeftModel, Texts]:
    """Return a fine-tuned decoder; trains it if it was not yet."""
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    base, tokenizer = support.load_decoder()
    texts, folder = Texts(tokenizer), out / "checkpoints" / f"language-{seed}"
    record = folder / "training.json"
    if not record.exists():
        set_seed(seed)
        config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16)
        model = get_peft_model(base, config)
        loader = texts.loader(trained_texts(facts(seed)[0]), BATCH, shuffle=True)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE)
        steps = EPOCHS * len(loader)
        schedule = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)

        def loss_of(batch: Any) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16("cpu")):
                return model(**batch).loss

        started = time.process_time()
        loss = support.train(model, loader, EPOCHS, optimizer, schedule, loss_of, progress=None)
        model.save_pretrained(folder)
        write(record, {"final loss": loss, "seconds": time.process_time() - started})
        base, _ = support.load_decoder()
    return PeftModel.from_pretrained(base, str(folder), is_trainable=True).eval(), texts


def text_nll(la: KronLoraLaplace, loader: DataLoader, scales: Sequence[float]) -> torch.Tensor:
    """Return each text's NLL in nats, by the MAP and with scaled covariances, a row each."""
    posterior, rows = la.fitted, []
    samples = SampleSet(posterior, SAMPLES, torch.Generator().manual_seed(1))
    for batch in loader:
        x, _ = posterior.split(batch)
        by_map, predictive = label_log_probabilities(posterior, samples, x, torch.tensor(scales))
        rows.append(-torch.cat([by_map.unsqueeze(0), predictive]).double().sum(2))
    return torch.cat(rows, dim=1)


def figures(seed: int, out: Path) -> dict[str, Any]:
    """Return the figures of one seed."""
    model, texts = checkpoint(seed, out)
    known, unknown = facts(seed)
    la = KronLoraLaplace(model, "language_modeling")
    torch.manual_seed(seed)
    clock = time.process_time
    started = clock()
    la.fit(texts.loader(trained_texts(known), FIT_BATCH, shuffle=False))
    fitted = clock()
    la.optimize_prior_precision()
    tuned = clock()
    report = la.tuning.widest
    found: dict[str, Any] = {"scale": report.covariance_scale, "tuning": str(report)}
    found |= {"fit seconds": fitted - started, "tuning seconds": tuned - fitted}

    def loader(chosen: Sequence[Fact], false: bool = False) -> DataLoader:
        of = [fact.text(TRAINED, fact.other if false else None) for fact in chosen]
        return texts.loader(of, SCORED, shuffle=False)

    rows = known[:HELD_OUT]
    tokens = sum(int((batch["labels"] != -100).sum()) for batch in loader(rows))
    information = [
        score(la, batch, 1, n_samples=SAMPLES).mutual_information.amax(1)
        for chosen in (rows[:UNKNOWN], unknown[:UNKNOWN])
        for batch in loader(chosen)
    ]
    pairs = information[1].unsqueeze(0) > information[0].unsqueeze(1)
    found["AUROC"] = float(pairs.double().mean())

    def judge(names: Sequence[str], scales: Sequence[float], count: int) -> None:
        truth, false = (text_nll(la, loader(rows[:count], f), scales) for f in (False, True))
        for name, own, other in zip(["MAP", *names], truth, false, strict=True):
            share = float((other - own).mean() / (false[0] - truth[0]).mean())
            difference = float((own - truth[0]).sum()) / (tokens * count / len(rows))
            figure = {"truth": -float(own.mean()), "made-up": -float(other.mean())}
            found.setdefault(name, {"NLL above MAP": difference, "share": share, **figure})

    la.covariance_scale = 1.0
    judge(["default", "evidence, plain"], [report.covariance_scale, 1.0], HELD_OUT)
    found["NLL of MAP"] = -found["MAP"]["truth"] * len(rows) / tokens
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is too wide
        la.optimize_prior_precision(method="marglik")
    found["prior precision, corrected"] = float(la.prior_precision)
    judge(["evidence"], [1.0], HELD_OUT // 2)
    return found


def rows_of(results: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Return the table, a line for each way and seed."""
    table = []
    for seed, found in results.items():
        for way in ("MAP", "default", "evidence", "evidence, plain"):
            each = found[way]
            table.append(
                {
                    "seed": seed,
                    "way": way,
                    "NLL above MAP, nats per token": f"{each['NLL above MAP']:+.4f}",
                    "truth": f"{each['truth']:.2f}",
                    "made-up": f"{each['made-up']:.2f}",
                    "difference kept": f"{each['share']:.2f}",
                    "known / unknown, AUROC": f"{found['AUROC']:.3f}" if way == "default" else "",
                    "covariance scale": f"{found['scale']:.2g}" if way == "default" else "",
                }
            )
    return table


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "study", help="folder of checkpoints")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of all choices")
    parser.add_argument("--train", action="store_true", help="only train")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.set_defaults(repeats=1, seed=0, device="cpu")
    args = parser.parse_args()
    prepare(args)
    results = {}
    for seed in args.seeds:
        path = args.out / "checkpoints" / f"language-{seed}" / FIGURES
        if args.train:
            checkpoint(seed, args.out)
        else:
            if not path.exists():
                write(path, figures(seed, args.out))
            results[str(seed)] = read(path)
            print(seed, results[str(seed)], flush=True)
    if results:
        rows = rows_of(results)
        write_report("study.language", args, {"Held-out questions": rows}, results)


if __name__ == "__main__":
    main()
