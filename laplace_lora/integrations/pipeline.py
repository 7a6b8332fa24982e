"""`LaplacePipeline`: transformers' text-classification pipeline, with uncertainty."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase, TextClassificationPipeline
from transformers.utils import ModelOutput

from laplace_lora.posteriors.base import LoraLaplace
from laplace_lora.predictive.special_tokens import begins_itself, check_ends_open

REPORTED = ("entropy", "mutual_information")


def _answers(tokens: Sequence[int], tokenizer: Any) -> list[str]:
    """Return a name for each answer, no two of them the same.

    As short as that allows: without spaces around it, with them, or as the vocabulary has it.
    """
    read = [str(tokenizer.decode([token])) for token in tokens]
    stored = [str(name) for name in tokenizer.convert_ids_to_tokens(list(tokens))]
    names = [text.strip() for text in read]
    for longer in (read, stored):
        names = [
            name if names.count(name) == 1 else other
            for name, other in zip(names, longer, strict=True)
        ]
    return names if len(set(names)) == len(names) else stored


class LaplacePipeline(TextClassificationPipeline):
    """A text-classification pipeline whose scores are the posterior predictive's.

    Every dictionary has, beside ``label`` and ``score``, the predictive's ``entropy`` and its
    epistemic part ``mutual_information``, in nats. With answer tokens the labels are the answers.

    ```python
    classify = pipeline(
        "text-classification", model=peft_model, tokenizer=tokenizer,
        pipeline_class=LaplacePipeline, posterior=la,
    )
    classify = LaplacePipeline(la, tokenizer)  # the same
    ```

    Args:
        posterior: A fitted posterior over a classifier's adapter.
        tokenizer: The model's.
        model: The posterior's own model, as `pipeline` passes it; it need not be given.
        **kwargs: Arguments of `transformers.Pipeline`, such as ``batch_size``.

    Raises:
        TypeError: If the posterior is none, such as a model.
        ValueError: If ``model`` is another than the posterior's, the posterior predicts no
            classes, or the tokenizer writes behind texts that a decoder's answers follow.
    """

    def __init__(
        self, posterior: LoraLaplace, tokenizer: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if not isinstance(posterior, LoraLaplace):
            raise TypeError(
                "a LaplacePipeline is made of a fitted posterior, such as KronLoraLaplace, got "
                f"{type(posterior).__name__}; the model is the posterior's"
            )
        own = posterior.logits_model.model
        if model is not None and model is not own:
            raise ValueError(
                "the pipeline runs the model that the posterior is of, and was given another; "
                "leave `model` out or give the posterior's own"
            )
        if posterior.objective.name != "classification":
            raise ValueError(
                "a text-classification pipeline needs a posterior with "
                f"likelihood='classification', not {posterior.objective.name!r}"
            )
        self.posterior = posterior
        if posterior.logits_model.answers_behind_texts:
            check_ends_open(tokenizer)
        kwargs.setdefault("device", posterior.fitted.device)
        super().__init__(model=own, tokenizer=tokenizer, **kwargs)
        self.labels = self._label_names()

    def check_model_type(self, supported_models: Any) -> None:
        """Take any model that the posterior takes; transformers does not list PEFT's."""

    def _label_names(self) -> list[str]:
        targets = self.posterior.logits_model.target_ids
        if targets is not None:
            return _answers(targets.tolist(), self.tokenizer)
        names = self.model.config.id2label
        if len(names) == 1:  # one logit: whether or not
            return [f"not {names[0]}", names[0]]
        return [names[i] for i in range(len(names))]

    def _sanitize_parameters(
        self, function_to_apply: Any = None, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if function_to_apply is not None:
            raise ValueError(
                "function_to_apply makes probabilities of logits, and the posterior predictive's "
                "are probabilities already; leave it out"
            )
        found: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
        found = super()._sanitize_parameters(**kwargs)
        # What is left is the tokenizer's, which takes any name and leaves unknown ones unused.
        others = {*inspect.signature(self.posterior.predict).parameters}
        others |= {*GenerationConfig().to_dict()}
        calls = (self.tokenizer.__call__, PreTrainedTokenizerBase.__call__)  # or around the latter
        taken = {name for call in calls for name in inspect.signature(call).parameters}
        unused = others & {*found[0]} - taken
        if unused:
            raise ValueError(
                f"{', '.join(sorted(unused))} would have no effect: the pipeline writes no text, "
                "and predicts as `la.predict(texts, tokenizer)` does; options of predictions "
                "belong there"
            )
        return found

    def preprocess(self, inputs: Any, **tokenizer_kwargs: Any) -> Any:
        """Return a text's tokens, with one that begins it as `la.predict` reads it.

        Raises:
            ValueError: If truncation would cut the end of a text that a decoder's answer follows.
        """
        if isinstance(inputs, str) and begins_itself(inputs, self.tokenizer):
            tokenizer_kwargs.setdefault("add_special_tokens", False)
        row = super().preprocess(inputs, **tokenizer_kwargs)
        cuts_ends = tokenizer_kwargs.get("truncation") and self.tokenizer.truncation_side == "right"
        if cuts_ends and self.posterior.logits_model.answers_behind_texts:
            options = {**tokenizer_kwargs, "truncation": False, "padding": False}
            options.pop("max_length", None)
            whole = super().preprocess(inputs, **options)
            if whole["input_ids"].shape[1] > row["input_ids"].shape[1]:
                raise ValueError(
                    f"truncation would cut the end of a text with {whole['input_ids'].shape[1]} "
                    "tokens, after which the answer stands, and so change the question; shorten "
                    "the text, or set tokenizer.truncation_side = 'left'"
                )
        return row

    def _forward(self, model_inputs: Any) -> ModelOutput:
        found = self.posterior.predict(dict(model_inputs), progress_bar=False)
        columns = {name: getattr(found, name) for name in ("probs", *REPORTED)}
        return ModelOutput(**columns)

    def postprocess(
        self, model_outputs: Any, top_k: int | None = 1, _legacy: bool = True
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Return label, score and uncertainty of the best class, or of the ``top_k`` best."""
        doubt = {name: float(model_outputs[name][0]) for name in REPORTED}
        scores = model_outputs["probs"][0].float().tolist()
        found = [
            {"label": label, "score": score, **doubt}
            for label, score in zip(self.labels, scores, strict=True)
        ]
        if top_k == 1 and _legacy:
            return max(found, key=lambda each: each["score"])
        if not _legacy:
            found.sort(key=lambda each: -each["score"])
        return found if top_k is None else found[:top_k]
