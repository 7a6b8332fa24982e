"""What `LaplaceLM` refuses of a model, its tokenizer and its tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from laplace_lora.models.inputs.configs import longest_text
from laplace_lora.models.tangents.forward_mode import NoForwardDerivativeError

# How tasks call the longest continuation, as the harness orders them, and what it is by default.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
LENGTH = 256

Asked = tuple[int, tuple[str, ...]]


def asked_of(options: Mapping[str, Any], max_length: int) -> Asked:
    """Return how many tokens a task wants at most, and its stop texts.

    Args:
        options: The task's.
        max_length: Of a text with its continuation.

    Raises:
        ValueError: If sampling is asked for, or so many tokens that none of the text is left.
    """
    if options.get("do_sample", False):
        raise ValueError("LaplaceLM continues greedily; set do_sample to false in the task")
    new = next((int(options[name]) for name in LENGTHS if options.get(name)), LENGTH)
    if new >= max_length:
        raise ValueError(
            f"max_gen_toks={new} leaves no context within max_length={max_length}; set a smaller "
            "max_gen_toks in the task"
        )
    until = options.get("until") or []
    until = [until] if isinstance(until, str) else until
    return new, tuple(stop for stop in until if stop)


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
