"""What ``laplace-lora score`` and ``laplace-lora generate`` do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq

from laplace_lora.commands.output import check_writable, json_lines
from laplace_lora.commands.reading.adapter import CAUSAL
from laplace_lora.commands.reading.opened import Opened, open_posterior
from laplace_lora.commands.reading.rows import Row, read_rows
from laplace_lora.data.loaders import progress
from laplace_lora.generation import TokenPredictions
from laplace_lora.generation import generate as write_texts
from laplace_lora.generation import score as score_texts
from laplace_lora.likelihoods.language_modeling import IGNORED, token_labels
from laplace_lora.models.wrapped_model import WrappedModel

TOP_K = 20  # by default

# The result of a text without a scored token, as beside others: one token has none before it.
NOTHING: dict[str, Any] = {
    "text": "",
    **dict.fromkeys(("log_prob", "map_log_prob", "log_prob_variance", "mutual_information"), 0.0),
    "stopped": False,
    "tokens": [],
}


def run_score(
    adapter: str,
    data: str,
    out: str,
    top_k: int | None,
    n_samples: int | None,
    seed: int,
    **options: Any,
) -> None:
    """Score the tokens of rows."""
    opened, rows = _opened(adapter, data, out, options, "language_modeling")
    compared = _compared(top_k, opened)
    examples = [opened.inputs.scored(row, n) for n, row in enumerate(rows, start=1)]
    collate = DataCollatorForSeq2Seq(opened.adapter.tokenizer)

    def answer(part: Sequence[int]) -> TokenPredictions | None:
        batch = collate([examples[i] for i in part])
        if bool((token_labels(batch, batch["labels"]) == IGNORED).all()):
            return None
        source = _generator(opened, seed)  # all rows have the same samples of the weights
        return score_texts(
            opened.la, batch, compared, n_samples=n_samples, generator=source, progress_bar=False
        )

    _write(opened, len(rows), options["batch_size"], out, answer, "Scoring")


def run_generate(
    adapter: str,
    data: str,
    out: str,
    top_k: int | None,
    n_samples: int | None,
    seed: int,
    max_new_tokens: int,
    do_sample: bool,
    stop_above: float | None,
    **options: Any,
) -> None:
    """Continue the prompts of rows."""
    opened, rows = _opened(adapter, data, out, options)
    prompts = opened.inputs.texts(rows)
    tokenizer, source = opened.adapter.tokenizer, _generator(opened, seed)
    compared = _compared(top_k, opened)
    longest = max(len(prompt["input_ids"]) for prompt in prompts)
    places = opened.adapter.places
    # Texts that end before are written all the same.
    end = math.inf if places is None else places - longest + 1

    def answer(part: Sequence[int]) -> TokenPredictions:
        if not do_sample:
            source.manual_seed(seed)  # all rows have the same samples of the weights
        batch = tokenizer.pad([prompts[i] for i in part], return_tensors="pt")
        try:
            return write_texts(
                opened.la,
                batch,
                max_new_tokens,
                compared,
                do_sample,
                n_samples=n_samples,
                generator=source,
                stop_above=stop_above,
                progress_bar=False,
            )
        except ValueError as error:
            if max_new_tokens <= end or "has positions for" not in str(error):
                raise
            raise ValueError(
                f"--max-new-tokens {max_new_tokens}: the model has positions for {places} tokens, "
                f"and the longest prompt has {longest}; give {end} or less"
            ) from error

    _write(opened, len(rows), options["batch_size"], out, answer, "Writing")


def _opened(
    adapter: str, data: str, out: str, options: dict[str, Any], completes: str | None = None
) -> tuple[Opened, list[Row]]:
    check_writable(out, data=[data])
    rows = read_rows(data, options["split"])
    opened = open_posterior(adapter, rows, options, completes)
    if opened.adapter.kind != CAUSAL:
        raise ValueError(
            "tokens are scored and written by causal language models; for others there is "
            "`laplace-lora predict`"
        )
    return opened, rows


def _compared(asked: int | None, opened: Opened) -> int:
    """Return how many tokens are compared in each place.

    Raises:
        ValueError: If the user asks for more than there are.
    """
    vocabulary = WrappedModel(opened.adapter.model).vocabulary_size or TOP_K
    if asked is not None and asked > vocabulary:
        raise ValueError(f"--top-k {asked}: the vocabulary has {vocabulary} tokens; give fewer")
    return min(TOP_K, vocabulary) if asked is None else asked


def _generator(opened: Opened, seed: int) -> torch.Generator:
    """Return the source of the samples."""
    return torch.Generator(opened.la.fitted.device).manual_seed(seed)


def _write(
    opened: Opened,
    count: int,
    batch_size: int,
    out: str,
    answer: Callable[[Sequence[int]], TokenPredictions | None],
    title: str,
) -> None:
    """Write a row for each text, batch by batch; `NOTHING` where there is no answer."""
    parts = [range(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
    with json_lines(out) as write:
        for part in progress(parts, None, title):
            found = answer(part)
            texts = [NOTHING] * len(part)
            if found is not None:
                texts = found.to_dict(opened.adapter.tokenizer)["texts"]
            for text in texts:
                write(text)
