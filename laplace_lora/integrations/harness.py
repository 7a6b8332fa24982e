"""`LaplaceLM`: a posterior as a model of EleutherAI's evaluation harness (lm-eval)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from torch import Tensor

from laplace_lora.generation import generate, score
from laplace_lora.generation.scoring import SAMPLES
from laplace_lora.integrations.harness_checks import (
    check_ends_open,
    length_of,
    samples_only,
)
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.posteriors.base import LoraLaplace

# How tasks call the longest continuation, as the harness orders them, and what it is by default.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
LENGTH = 256


class LaplaceLM(TemplateLM):
    """A language model whose ``loglikelihood`` is the posterior predictive's.

    The probability of a continuation is averaged over samples of the linearised model, the same for
    all requests, so that the tokens' correlations count: ``log mean_s Π_t p_s(token_t)``.

    ```python
    lm_eval.simple_evaluate(model=LaplaceLM(la, tokenizer), tasks=["arc_easy"])
    ```

    Args:
        posterior: A fitted posterior over a causal language model's adapter.
        tokenizer: The model's.
        n_samples: Samples of the weights.
        batch_size: Requests that run together.
        max_length: Longest text in tokens; longer ones lose their beginning. The model's own
            length when ``None``.
        seed: Of the samples.

    Raises:
        ValueError: If neither ``max_length`` nor the model's configuration says how long texts may
            be, or the tokenizer writes tokens behind a text.
    """

    def __init__(
        self,
        posterior: LoraLaplace,
        tokenizer: Any,
        n_samples: int = SAMPLES,
        batch_size: int = 8,
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.posterior, self.tokenizer = posterior, tokenizer
        self.n_samples, self.batch_size, self.seed = n_samples, batch_size, seed
        self.max_length: int = max_length or length_of(posterior.logits_model.config)
        self._device = posterior.fitted.device
        check_ends_open(tokenizer)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        token: int = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: that which begins texts, or else ends them."""
        begins: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if begins is None else begins

    @property
    def tokenizer_name(self) -> str:
        """What cached requests are told apart by."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return a text's tokens.

        Args:
            string: The text.
            add_special_tokens: ``None`` adds those that the tokenizer adds by itself, but no second
                one where a chat template has begun the text.
            **kwargs: Further arguments of the tokenizer's `encode`.
        """
        if add_special_tokens is None:
            begins = self.tokenizer.bos_token
            add_special_tokens = begins is None or not string.startswith(begins)
        ids: list[int]
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens, **kwargs)
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the tokenizer writes it.

        Args:
            chat_history: Its messages.
            add_generation_prompt: Whether an answer begins. If not, the last message goes on, as
                where a task has begun the answer (``gen_prefix``).
        """
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the tokenizer's chat template."""
        template: str | None = self.tokenizer.get_chat_template() if chat_template else ""
        return template

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return log probability of each continuation, and whether it is the greedy one."""
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda n: -sum(map(len, requests[n][1:])))
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            answers = self._answers([(requests[n][1], requests[n][2]) for n in part])
            for n, answer in zip(part, answers, strict=True):
                found[n] = answer
                if requests[n][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[n][0], answer)
        return [found[n] for n in range(len(requests))]

    def _answers(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        rows = []
        for context, continuation in pairs:
            ids = [*context, *continuation][-self.max_length :]
            kept = min(len(continuation), len(ids) - 1)  # the first token is predicted by none
            if kept < len(continuation):
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens leaves no context within "
                    f"max_length={self.max_length}"
                )
            rows.append((ids, kept))
        length = max(len(ids) for ids, _ in rows)
        batch = {
            "input_ids": torch.zeros(len(rows), length, dtype=torch.long),
            "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
            "labels": torch.full((len(rows), length), IGNORED),
        }
        for n, (ids, kept) in enumerate(rows):
            batch["input_ids"][n, : len(ids)] = torch.tensor(ids)
            batch["attention_mask"][n, : len(ids)] = 1
            batch["labels"][n, len(ids) - kept : len(ids)] = torch.tensor(ids[-kept:])
        source = self._generator()
        with samples_only():
            scored = score(self.posterior, batch, n_samples=self.n_samples, generator=source)
        samples = scored.log_probabilities
        assert samples is not None
        whole = samples.double().logsumexp(0) - math.log(len(samples))
        best = scored.candidates.gather(2, scored.probabilities.argmax(-1, keepdim=True))
        greedy = ((best.squeeze(-1) == scored.tokens) | ~scored.mask).all(1)
        return list(zip(whole.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log probability of whole texts, each after the token that begins texts.

        Texts longer than the model's length are read in pieces that do not overlap.
        """
        found = []
        for request in requests:
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            if tokens[:1] == [self.prefix_token_id]:  # stands before them as it is
                del tokens[0]
            step = self.max_length - 1
            pieces = [tokens[start : start + step] for start in range(0, len(tokens), step)]
            before = [self.prefix_token_id, *(piece[-1] for piece in pieces)]
            pairs = [(None, [first], piece) for first, piece in zip(before, pieces, strict=False)]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return greedy continuations by the posterior predictive, cut before the stop texts.

        Raises:
            ValueError: If sampling is asked for, or so many tokens that none of the text is left.
        """
        texts = []
        for request in requests:
            context, options = request.args
            if options.get("do_sample", False):
                raise ValueError("LaplaceLM continues greedily; set do_sample to false in the task")
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            new = next((int(options[name]) for name in LENGTHS if options.get(name)), LENGTH)
            if new >= self.max_length:
                raise ValueError(
                    f"max_gen_toks={new} leaves no context within max_length={self.max_length}; "
                    "set a smaller max_gen_toks in the task"
                )
            prompt = self.tok_encode(context) or [self.prefix_token_id]
            ids = torch.tensor([prompt[-(self.max_length - new) :]])
            until = [stop for stop in until if stop]
            with samples_only():
                found = generate(
                    self.posterior,
                    {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
                    max_new_tokens=new,
                    n_samples=self.n_samples,
                    generator=self._generator(),
                    eos_token_id=self.eot_token_id,
                    logits_processor=self._ending(ids.shape[1], until) if until else None,
                )
            text = self.tokenizer.decode(found.tokens[0][found.mask[0]], skip_special_tokens=True)
            for stop in until:
                text = text.split(stop)[0]
            texts.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _ending(self, start: int, until: Sequence[str]) -> Callable[[Tensor, Tensor], Tensor]:
        """Return what ends a text after a stop, so that no more of it is written in vain."""

        def end(ids: Tensor, scores: Tensor) -> Tensor:
            text = self.tokenizer.decode(ids[0, start:].tolist())  # a stop may be a special token
            if not any(stop in text for stop in until):
                return scores
            ended = torch.full_like(scores, -torch.inf)
            ended[:, self.eot_token_id] = 0
            return ended

        return end

    def _generator(self) -> torch.Generator:
        """Return the source of the samples: the same for every request."""
        return torch.Generator(self._device).manual_seed(self.seed)
