"""What a model card says of a posterior."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laplace_lora.adapters.peft_files import folder_of_its_own
from laplace_lora.posteriors.summary import summary_lines
from laplace_lora.storage.model_card import Report, draw, section
from laplace_lora.structures.posterior import Posterior
from laplace_lora.tuning.outcome import Tuning
from laplace_lora.version import __version__

AUTO = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
}
WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS")


def card_section(
    posterior: Posterior,
    evidence: float,
    tuning: Tuning | None,
    repo_id: str,
    reports: Sequence[Report],
    folder: Path,
) -> str:
    """Return the section of a model card that describes a fitted posterior.

    Args:
        posterior: The posterior.
        evidence: Its log evidence in nats without the gradient term.
        tuning: What the latest tuning of the prior did, if that is known.
        repo_id: Where it will be loaded from.
        reports: Scores on held-out data, the posterior's own last.
        folder: Where a picture of the last report goes.
    """
    title, lines = summary_lines(posterior, evidence, tuning)
    facts = {"posterior": title.replace(":", ",", 1), **lines}
    if tuning is not None:
        facts["tuned by"] = str(tuning)
    base = getattr(_config(posterior), "base_model_name_or_path", None) or ""
    if base.count("/") == 1 and not Path(base).exists():  # a name, not somebody's folder
        facts["base model"] = base
    picture = draw(reports[-1], folder) if reports else None
    return section(facts, loading_code(posterior, repo_id), __version__, reports, picture)


def loading_code(posterior: Posterior, repo_id: str) -> str:
    """Return the lines that load a posterior and ask it."""
    task = getattr(_config(posterior), "task_type", None)
    task = str(getattr(task, "value", task))
    kind = posterior.kind
    lines = [f"from laplace_lora import {kind}"]
    folder = folder_of_its_own(posterior.source.model)
    if task in AUTO and folder is None:
        lines.insert(0, f"from peft import {AUTO[task]}")
        labels = f", num_labels={posterior.state.n_outputs}" if task in WITH_HEAD else ""
        lines += ["", f'model = {AUTO[task]}.from_pretrained("{repo_id}"{labels})']
    else:
        lines.insert(0, "from peft import PeftModel")
        inside = "" if folder is None else f', subfolder="{folder}"'
        lines += ["", f'model = PeftModel.from_pretrained(base_model, "{repo_id}"{inside})']
    lines.append(f'la = {kind}.from_pretrained(model, "{repo_id}")')
    if posterior.objective.predicts_tokens:
        lines.insert(2, "from laplace_lora.generation import generate")
        lines.append('written = generate(la, tokenizer(["..."], return_tensors="pt"))')
    else:
        lines.append('found = la.predict(["..."], tokenizer)')
    return "\n".join(lines)


def _config(posterior: Posterior) -> Any:
    """Return the active adapter's configuration, ``None`` for a model that has none."""
    model: Any = posterior.source.model
    return getattr(model, "active_peft_config", None)
