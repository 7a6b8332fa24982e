"""`generate`: texts that a language model writes, with what it is unsure of in them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.distributed import together
from laplace_lora.data.loaders import progress
from laplace_lora.generation.next_token import HasPosterior, NextTokenPredictor, check_call
from laplace_lora.generation.prompts import check_text_suffices, left_padded
from laplace_lora.generation.sampled_predictor import SampledPredictor
from laplace_lora.generation.selection import Processor, Selection
from laplace_lora.generation.token_predictions import TokenPredictions
from laplace_lora.generation.writing import (
    ExactSteps,
    SampledSteps,
    Stopping,
    Streamer,
    write,
)
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.models.changes.autocast import in_full_precision
from laplace_lora.models.inputs.rotary import check_same_angles
from laplace_lora.models.token_model import TOP_K
from laplace_lora.predictive.linear_samples import EXACT, SAMPLED

SAMPLES = 16


@in_full_precision
def generate(
    la: HasPosterior,
    inputs: Mapping[str, Any] | Tensor,
    max_new_tokens: int = 20,
    top_k: int = TOP_K,
    do_sample: bool = False,
    link_approx: str | None = None,
    n_samples: int | None = None,
    generator: torch.Generator | None = None,
    eos_token_id: int | list[int] | None = None,
    method: str = SAMPLED,
    temperature: float = 1.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    logits_processor: Processor | None = None,
    streamer: Streamer | None = None,
    stop_above: float | None = None,
    stop_on: str = "token",
    progress_bar: bool | None = None,
) -> TokenPredictions:
    """Continue texts, token by token from the posterior predictive.

    Args:
        la: A fitted posterior over a causal language model's adapters.
        inputs: Prompts: a mapping with ``input_ids`` and, if padded on either side,
            ``attention_mask``; or the token numbers alone, ``(texts, tokens)``.
        max_new_tokens: Where to stop at the latest.
        top_k: Tokens looked at in each place, the MAP's likeliest. ``"exact"`` generates no others,
            unless a processor forces them; draws of ``"sampled"`` are among as many of the
            predictive's.
        do_sample: Draw tokens from the predictive among the ``top_k``, instead of taking the
            likeliest.
        link_approx: As of `score`.
        n_samples: As of `score`, but 16 samples of the weights by default.
        generator: Source of the samples and the draws, on the posterior's device.
        eos_token_id: Tokens that end a text; by default those of the model's configuration. Its
            `repetition_penalty` and other options of writing are not read: give them here. ``[]``
            ends none.
        method: As of `score`. With ``"sampled"`` keys, values and their tangents are kept, so a
            token costs one step of the network, whatever the length.
        temperature: Divides the scores of draws, see `Selection`.
        top_p: Draws are among the likeliest tokens with this probability together.
        repetition_penalty: Makes tokens that are in the text less likely, if above 1.
        logits_processor: Changes the scores, such as transformers' ``LogitsProcessorList``. They
            are log probabilities of the predictive, shifted to the MAP's logits. Called for each
            text alone, without its padding: lengths are the text's own.
        streamer: Told of the prompts and of every new token, such as transformers'
            ``TextStreamer``.
        stop_above: Nats of epistemic uncertainty above which a text is ended; it keeps the token
            that passed it and is marked in ``stopped``.
        stop_on: What is compared: ``"token"``, one token's mutual information; ``"answer"``, its
            sum over the answer so far.
        progress_bar: Whether to show progress over the tokens, see `progress`; not by default with
            a streamer.

    Returns:
        Predictions of the new tokens, an ending one among them.

    Raises:
        AttributeError: If the posterior has not been fitted.
        TypeError: If there is no posterior, or the generator is none.
        FloatingPointError: If scores of tokens are not a number.
        ValueError: If a prompt is missing or has more than text, such as images, an option is out
            of range, a processor leaves no token, or the model is no causal language model or
            cannot carry tangents, see `score`.
    """
    check_call(la, method, link_approx)
    stopping = Stopping(stop_above, stop_on)
    if streamer is not None:
        progress_bar = bool(progress_bar)  # it has its own way of showing them
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be positive, got {max_new_tokens}")
    selection = Selection(
        do_sample, temperature, top_k, top_p, repetition_penalty, logits_processor, generator
    )
    with ExitStack() as stack:
        steps: ExactSteps | SampledSteps
        stack.enter_context(together(runs=la.fitted.source))  # all draw the same tokens
        predictor: NextTokenPredictor | SampledPredictor
        if method == EXACT:
            predictor = NextTokenPredictor(la, top_k, link_approx, n_samples, generator)
        else:
            count = SAMPLES if n_samples is None else n_samples
            predictor = SampledPredictor(la, top_k, count, generator)
        model = predictor.model
        ids, mask = left_padded(inputs, la.fitted.device, la.fitted.source.config)
        check_text_suffices(model, inputs)
        if isinstance(predictor, NextTokenPredictor):
            check_same_angles(model.config, ids.shape[1], ids.shape[1] + max_new_tokens)
            steps = ExactSteps(predictor, ids, mask)
        else:
            prompts = {"input_ids": ids, "attention_mask": mask}
            reading = stack.enter_context(predictor.opened(prompts))
            steps = SampledSteps(predictor, reading, top_k)
        ends = model.end_tokens if eos_token_id is None else eos_token_id
        stop = torch.tensor(ends, device=ids.device, dtype=torch.long).reshape(-1)
        if eos_token_id is not None:
            _check_in_vocabulary(stop, model.vocabulary_size)
        shown = progress(range(max_new_tokens), progress_bar, "Writing")
        text = write(steps, ids, mask, shown, selection, stop, stopping, streamer, model.pad_token)
    variance = None
    if isinstance(predictor, NextTokenPredictor):
        labels = text.ids.masked_fill(text.mask == 0, IGNORED)
        labels[:, : ids.shape[1]] = IGNORED
        variance = predictor.variance(
            {"input_ids": text.ids, "attention_mask": text.mask, "labels": labels}
        )
    return TokenPredictions.laid_out(
        text.predictions,
        text.tokens,
        text.where,
        len(ids),
        model.pad_token,
        variance,
        text.stopped,
    )


def _check_in_vocabulary(ends: Tensor, vocabulary: Any) -> None:
    """Refuse tokens that are never written, and so would end no text."""
    unknown = ends[(ends < 0) | (ends >= vocabulary)].tolist()
    if unknown:
        raise ValueError(
            f"eos_token_id={unknown} lies outside the vocabulary, 0..{vocabulary - 1}, and would "
            "end no text; give [] if nothing is to"
        )
