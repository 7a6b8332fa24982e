"""Load an adapter with its base model and its tokenizer, and refuse what would be half random."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights

from laplace_lora.commands.reading.four_bits import four_bits, unquantised
from laplace_lora.commands.reading.tokenizers import check_length, longest_input, tokenizer_of
from laplace_lora.commands.reading.weights import (
    adapter_weights_found,
    base_model_found,
    check_no_random_weights,
)
from laplace_lora.models.wrapped_model import places_of

# The last layer, by its ending; one of the second kind where there is none of the first, before
# which XLNet has such a layer, too.
LAST = (".score.weight", ".classifier.weight", ".out_proj.weight", ".logits_proj.weight")
HEADS = ((*LAST, ".linear_out.weight"), (".summary.weight",))
AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
HEAD, CAUSAL, SEQ2SEQ = "head", "causal", "encoder-decoder"


@dataclass(frozen=True)
class Adapter:
    """A model that can be asked.

    Attributes:
        model: The base model with the adapter.
        tokenizer: Its tokenizer, which can pad.
        kind: ``"head"`` for a classifier, regression or reward model, ``"causal"`` or
            ``"encoder-decoder"`` for a language model.
        outputs: Outputs of a head; 0 for a language model.
        names: Names of a head's classes, if the configuration has any.
        problem_type: What the configuration says a head is trained for; ``None`` for nothing.
        max_length: Tokens that tokenizer and model take; ``None`` for no limit.
        places: Tokens that the model has learnt positions for; ``None`` if they are not learnt.
    """

    model: PeftModel
    tokenizer: Any
    kind: str
    outputs: int
    names: list[str]
    problem_type: str | None
    max_length: int | None
    places: int | None = None


def load_asked(adapter: str, options: Mapping[str, Any]) -> Adapter:
    """Load an adapter as the command line's options say, see `load_adapter`.

    Raises:
        ValueError: If the model takes no inputs as long as asked, or `load_adapter` raises it.
    """
    names = ("base", "device", "dtype", "load_in_4bit")
    loaded = load_adapter(adapter, **{name: options[name] for name in names})
    check_length(options.get("max_length"), loaded.places)
    return loaded


def load_adapter(
    adapter: str,
    base: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    load_in_4bit: bool = False,
) -> Adapter:
    """Load an adapter from a folder or the hub.

    Args:
        adapter: Folder or name of the adapter.
        base: Folder or name of the base model, if not the one that the adapter names.
        device: Where to compute; an accelerator if there is one.
        dtype: Of the base model; ``"auto"`` is that of its file.
        load_in_4bit: Quantise the base model by bitsandbytes.

    Raises:
        FileNotFoundError: If there is no adapter, or it names no base model, or one that is not
            there.
        ImportError: If bitsandbytes is needed and missing.
        ValueError: If the adapter is of another kind, a file is damaged, there is no such device,
            or base and adapter together leave weights at random values.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    where = _device(device)
    path = Path(adapter)
    if (path.exists() or adapter.count("/") != 1) and not (path / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{adapter} is no adapter: it has no adapter_config.json, which PEFT's save_pretrained "
            "writes"
        )
    try:
        config = PeftConfig.from_pretrained(adapter)
    except json.JSONDecodeError as error:
        raise ValueError(f"adapter_config.json of {adapter} is damaged: {error}") from None
    except ValueError as error:  # PEFT's, for whatever kept it from the file
        raise FileNotFoundError(
            f"there is no folder {adapter}, and no adapter of that name was found on the hub"
        ) from error
    source = base or config.base_model_name_or_path
    if not source:
        raise FileNotFoundError(f"{adapter} does not name its base model; give it by --base")
    with adapter_weights_found(adapter):
        saved = load_peft_weights(adapter, device="cpu")
    kind, loader = _loader_of(config, adapter)
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if kind == HEAD and (outputs := _head_outputs(saved)):
        options["num_labels"] = outputs
        options["ignore_mismatched_sizes"] = True  # a head of the base that the adapter replaces
    with base_model_found(source, adapter if base is None else "--base"):
        if load_in_4bit:
            whole = getattr(config, "modules_to_save", None)
            options |= four_bits(where, unquantised(whole, loader, source))
        model, report = loader.from_pretrained(source, **options)
    tokenizer = tokenizer_of(adapter, source, model, saved, kind == HEAD)
    check_no_random_weights(report, saved, adapter, source)
    if not load_in_4bit:
        model = model.to(where)
    peft = _with_adapter(model, adapter)
    names = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    plain = kind != HEAD or names == [f"LABEL_{i}" for i in range(len(names))]
    return Adapter(
        peft,
        tokenizer,
        kind,
        model.config.num_labels if kind == HEAD else 0,
        [] if plain else names,
        getattr(model.config, "problem_type", None),
        longest_input(tokenizer, model),
        places_of(model),
    )


def _device(asked: str | None) -> str:
    """Return where to compute, which is there."""
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=asked)
    except (RuntimeError, AssertionError, NotImplementedError):  # as the backend likes
        raise ValueError(
            f"--device {asked}: torch finds no such device here; cpu is always there, "
            f"and {torch.cuda.device_count()} cuda devices are"
        ) from None
    return asked


def _loader_of(config: Any, adapter: str) -> tuple[str, Any]:
    """Return what an adapter's base model is, and the class that loads it."""
    task = config.task_type and str(getattr(config.task_type, "value", config.task_type))
    if task in AUTO:
        kind = {"SEQ_CLS": HEAD, "CAUSAL_LM": CAUSAL}.get(task, SEQ2SEQ)
        return kind, getattr(transformers, AUTO[task])
    mapping = config.auto_mapping or {}
    name, library = mapping.get("base_model_class", ""), mapping.get("parent_library", "")
    kinds = {"ForSequenceClassification": HEAD, "ForConditionalGeneration": SEQ2SEQ}
    kinds |= {"ForCausalLM": CAUSAL, "LMHeadModel": CAUSAL}
    for ending, kind in kinds.items():
        # Nothing but transformers is imported because a file says so.
        if task is None and name.endswith(ending) and library.startswith("transformers.models."):
            return kind, getattr(importlib.import_module(library), name)
    raise ValueError(
        f"{adapter} is an adapter for {task or name or 'an unnamed task'}; the command line takes "
        f"{', '.join(AUTO)}. From Python any model is taken, see LogitsModel"
    )


def _head_outputs(saved: dict[str, torch.Tensor]) -> int | None:
    """Return how many outputs the head has that is saved with an adapter."""
    for endings in HEADS:
        heads = [t for name, t in saved.items() if name.endswith(endings) and "lora_" not in name]
        if heads:
            return len(heads[-1])
    return None


def _with_adapter(model: Any, adapter: str) -> PeftModel:
    """Return the base model with the adapter, all of whose weights were found."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, adapter).eval()
        except (UserWarning, RuntimeError) as error:
            raise ValueError(
                f"{adapter} does not fit the base model {model.config._name_or_path}: {error}"
            ) from None
