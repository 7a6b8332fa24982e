"""`LaplaceLM`: a posterior as a model of EleutherAI's evaluation harness (lm-eval)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from laplace_lora.data.loaders import progress
from laplace_lora.generation import generate, score
from laplace_lora.generation.next_token import language_model_of
from laplace_lora.generation.scoring import SAMPLES
from laplace_lora.integrations.harness_checks import (
    Asked,
    asked_of,
    length_of,
    samples_only,
)
from laplace_lora.integrations.stop_texts import StopTexts
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.posteriors.base import LoraLaplace
from laplace_lora.predictive.special_tokens import begins_itself, check_ends_open


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
        batch_size: Requests that run together; of those to be continued, with the same options.
        max_length: Longest text in tokens; longer ones lose their beginning. The model's own
            length when ``None``.
        seed: Of the samples.

    Raises:
        ValueError: If neither ``max_length`` nor the model's configuration says how long texts may
            be, the tokenizer writes tokens behind a text, or the posterior is of no language model.
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
        self._token_model = language_model_of(posterior.fitted, top_k=1)
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
            add_special_tokens = not begins_itself(string, self.tokenizer)
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
        batch = _padded([ids for ids, _ in rows])
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
        for labels, (ids, kept) in zip(batch["labels"], rows, strict=True):
            labels[len(ids) - kept : len(ids)] = torch.tensor(ids[-kept:])
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

        A text ends with the tokenizer's token or with those of the model's ``generation_config``,
        whose ``repetition_penalty`` holds unless the task has its own.

        Raises:
            ValueError: If sampling is asked for, an option that greedy texts do not follow here, or
                so many tokens that none of the text is left.
        """
        config = self._token_model.generation_config
        prompts: list[list[int]] = []
        alike: dict[Asked, list[int]] = {}
        for n, (context, options) in enumerate(request.args for request in requests):
            alike.setdefault(asked_of(options, config, self.max_length), []).append(n)
            prompts.append(self.tok_encode(context) or [self.prefix_token_id])
        parts = []
        for asked, group in alike.items():
            group.sort(key=lambda n: -len(prompts[n]))
            starts = range(0, len(group), self.batch_size)
            parts += [(asked, group[start : start + self.batch_size]) for start in starts]
        texts = [""] * len(requests)
        for asked, part in progress(parts, False if disable_tqdm else None, "Writing"):
            kept = [prompts[n][-(self.max_length - asked.new) :] for n in part]
            for n, text in zip(part, self._continued(kept, asked), strict=True):
                texts[n] = text
                self.cache_hook.add_partial("generate_until", requests[n].args, text)
        return texts

    def _continued(self, prompts: list[list[int]], asked: Asked) -> list[str]:
        """Return what follows each prompt, all of them together where the model allows it."""
        try:
            return self._written(prompts, asked)
        except ValueError:  # padding before a text changes what some models read
            if len({len(ids) for ids in prompts}) == 1:
                raise
        texts = []
        for _, same in groupby(prompts, len):
            texts += self._written(list(same), asked)
        return texts

    def _written(self, prompts: list[list[int]], asked: Asked) -> list[str]:
        own = self.tokenizer.eos_token_id
        known = [*([] if own is None else [own]), *self._token_model.end_tokens]
        # A tokenizer may have more tokens than the model has logits.
        ends = [token for token in known if 0 <= token < self._token_model.vocabulary_size]
        stops = StopTexts(self.tokenizer, asked.until, ends)
        with samples_only():
            found = generate(
                self.posterior,
                _padded(prompts),
                max_new_tokens=asked.new,
                n_samples=self.n_samples,
                generator=self._generator(),
                eos_token_id=ends,
                repetition_penalty=asked.repetition_penalty,
                logits_processor=stops,
                streamer=stops,
            )
        rows = zip(found.tokens, found.mask, strict=True)
        written = [self.tokenizer.decode(ids[real], skip_special_tokens=True) for ids, real in rows]
        return [stops.cut(text) for text in written]

    def _generator(self) -> torch.Generator:
        """Return the source of the samples: the same for every request."""
        return torch.Generator(self._device).manual_seed(self.seed)


def _padded(texts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return texts' tokens as a batch, padded on the right."""
    ids = [torch.tensor(text, dtype=torch.long) for text in texts]
    mask = pad_sequence([torch.ones_like(text) for text in ids], batch_first=True)
    return {"input_ids": pad_sequence(ids, batch_first=True), "attention_mask": mask}
