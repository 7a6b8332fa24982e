"""What `LaplaceLM` refuses of a model, its tokenizer and its tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from laplace_lora.models.inputs.configs import longest_text
from laplace_lora.models.tangents.forward_mode import NoForwardDerivativeError

# How tasks call the longest continuation, as the harness orders them, and what it is by default.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
LENGTH = 256

# Options of transformers' `generate` that change greedy texts, and the values that leave them as
# they are beside `None` and an empty list.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "min_length": (0, 1),  # a prompt counts, and has a token at least
    **dict.fromkeys(("num_beams", "num_return_sequences", "guidance_scale"), (1,)),
    **dict.fromkeys(("encoder_repetition_penalty",), (1,)),
    **dict.fromkeys(("min_new_tokens", "penalty_alpha"), (0,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "sequence_bias"), ()),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config"), ()),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens"), ()),
    **dict.fromkeys(("constraints", "force_words_ids", "stop_strings"), ()),
    **dict.fromkeys(("dola_layers", "max_time"), ()),
    "token_healing": (False,),
}
PENALTY = "repetition_penalty"
# Those that are followed, and those that change draws, beams, speed or what else is returned alone.
FOLLOWED = (*LENGTHS, "until", "do_sample", PENALTY)
UNUSED = (
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff"),
    *("eta_cutoff", "length_penalty", "early_stopping", "diversity_penalty", "num_beam_groups"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory"),
    *("compile_config", "disable_compile", "prefill_chunk_size"),
    *("renormalize_logits", "remove_invalid_values", "return_dict_in_generate", "output_scores"),
    *("output_logits", "output_attentions", "output_hidden_states"),
)


class Asked(NamedTuple):
    """How a task wants a text continued.

    Attributes:
        new: Longest continuation in tokens.
        until: Texts before which it ends.
        repetition_penalty: As of `generate`.
    """

    new: int
    until: tuple[str, ...]
    repetition_penalty: float


def asked_of(options: Mapping[str, Any], config: Any, max_length: int) -> Asked:
    """Return how a task wants a text continued.

    Args:
        options: The task's.
        config: The model's ``generation_config``, which holds for what the task leaves open.
        max_length: Of a text with its continuation.

    Raises:
        ValueError: If sampling is asked for, an option that greedy texts do not follow here, or so
            many tokens that none of the text is left.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if given.get("do_sample", float(given.get("temperature", 0)) > 0):  # as the harness reads them
        raise ValueError(
            "LaplaceLM continues greedily; set do_sample to false in the task, and no temperature"
        )
    own = {name: getattr(config, name, None) for name in (*NEUTRAL, PENALTY)}
    _check_followed(given, own)
    new = next((int(given[name]) for name in LENGTHS if given.get(name)), LENGTH)
    if new >= max_length:
        raise ValueError(
            f"max_gen_toks={new} leaves no context within max_length={max_length}; set a smaller "
            "max_gen_toks in the task"
        )
    until = given.get("until") or []
    until = [until] if isinstance(until, str) else until
    penalty = given.get(PENALTY, own[PENALTY])
    return Asked(new, tuple(stop for stop in until if stop), 1.0 if penalty is None else penalty)


def _check_followed(given: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse options with which the harness's own model would write other texts."""
    for name, value in {**own, **given}.items():
        known = name in (*FOLLOWED, *UNUSED)
        if known or value is None or (name in NEUTRAL and value in (*NEUTRAL[name], [])):
            continue
        if name not in NEUTRAL:
            raise ValueError(
                f"LaplaceLM does not know {name}={value!r}; take it out of the task's "
                "generation_kwargs"
            )
        place = "task's generation_kwargs" if name in given else "model's generation_config"
        raise ValueError(
            f"LaplaceLM takes the likeliest token each time and does not follow {name}={value!r}; "
            f"take it out of the {place} (texts are then others than with it)"
        )


@contextmanager
def samples_only() -> Iterator[None]:
    """Refuse a model without samples by what to do, which is not an option of `LaplaceLM`."""
    try:
        yield
    except NoForwardDerivativeError as error:
        reason = str(error).replace("use method='exact'", "`score` has method='exact' without them")
        raise NoForwardDerivativeError(
            "LaplaceLM needs samples of the linearised model, as a continuation's tokens are "
            f"correlated: {reason}"
        ) from error


def length_of(config: Any) -> int:
    """Return the longest text that a model's configuration allows.

    Args:
        config: The transformer's.

    Raises:
        ValueError: If it does not say.
    """
    length = longest_text(config)
    if length is None:  # those without positions, such as Mamba and BLOOM
        raise ValueError(
            f"{type(config).__name__} does not say how long texts may be; give LaplaceLM "
            "`max_length`, such as the length of the texts that the model was trained on"
        )
    return length
