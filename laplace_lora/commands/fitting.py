"""What ``laplace-lora fit`` does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from laplace_lora import DiagLoraLaplace, FullLoraLaplace, KronLoraLaplace
from laplace_lora.commands.base import note, point_out
from laplace_lora.commands.beside import loader_beside
from laplace_lora.commands.output import check_folder
from laplace_lora.commands.reading.adapter import Adapter, load_asked
from laplace_lora.commands.reading.answers import answer_tokens
from laplace_lora.commands.reading.inputs import Inputs
from laplace_lora.commands.reading.plan import PLAN, Plan, plan_text
from laplace_lora.commands.reading.planning import plan_fit
from laplace_lora.commands.reading.repository import file_of
from laplace_lora.commands.reading.rows import Row, read_named
from laplace_lora.commands.reading.said import reading_said
from laplace_lora.commands.training_warnings import warn_if_trained_otherwise
from laplace_lora.likelihoods.registry import likelihood_of
from laplace_lora.posteriors.base import LoraLaplace
from laplace_lora.storage.adapter_start import FILE as START
from laplace_lora.storage.adapter_start import AdapterStart
from laplace_lora.storage.files import TENSORS, read_files
from laplace_lora.storage.whole_files import write_whole

CLASSES: dict[str, Any] = {
    "kron": KronLoraLaplace,
    "full": FullLoraLaplace,
    "diag": DiagLoraLaplace,
}


def run(
    adapter: str,
    data: str,
    val: str | None,
    out: str | None,
    overwrite: bool,
    seed: int,
    **options: Any,
) -> None:
    """Fit, tune, calibrate and save, as the Python calls do."""
    folder = _destination(adapter, out, overwrite)
    rows, named = read_named(data, options["split"])
    val_rows, val_named = (None, {}) if val is None else read_named(val)
    loaded = load_asked(adapter, options)
    plan = plan_fit(loaded, rows, options, named)
    if val_rows is not None and not likelihood_of(plan.likelihood).can_be_calibrated:
        raise ValueError(f"--val: a {plan.likelihood} posterior cannot be calibrated")
    inputs = Inputs(loaded, plan)
    train_loader = inputs.loader(rows, options["batch_size"])
    note(reading_said(inputs, rows, train_loader.dataset))
    val_loader = None
    if val_rows is not None:
        val_loader = loader_beside(inputs, val_rows, val_named, options, f"--val {val}")
    warn_if_trained_otherwise(loaded, plan, rows, options)
    torch.manual_seed(seed)
    la = new_posterior(loaded, plan, options["structure"], options["uncovered"], rows)
    start_at(la, adapter)
    la.fit(train_loader)
    warn_if_useless(la, plan)
    # The noise before is 1, whatever the scale of the labels.
    la.optimize_prior_precision(tune_sigma_noise=plan.likelihood == "regression")
    note(f"Tuned by {la.tuning}")
    if val_loader is not None:
        note(f"Calibrated: {la.calibrate(val_loader)}")
    la.save_pretrained(folder)
    _, config = read_files(folder)
    write_whole(folder / PLAN, plan_text(plan, config["content"]).encode())
    click.echo(str(la))
    click.echo(f"Saved in {folder}")


def start_at(la: LoraLaplace, adapter: str) -> None:
    """Put the prior's mean at the weights before training, where they lie beside the adapter."""
    path = file_of(adapter, START)
    if path is None:
        return
    start = AdapterStart.from_pretrained(path.parent)
    try:
        la.prior_mean = start.vector(la.logits_model.get_submodule("model"), la.params)
    except ValueError as error:
        point_out(f"{START} is left out: {error}")


def new_posterior(
    adapter: Adapter, plan: Plan, structure: str, uncovered: str, rows: Sequence[Row] | None
) -> LoraLaplace:
    """Return a posterior that is not fitted yet; answers are read behind the rows' prompts."""
    ids = answer_tokens(adapter, plan, rows) if plan.targets else None
    la: LoraLaplace = CLASSES[structure](
        adapter.model, plan.likelihood, target_ids=ids, uncovered=uncovered
    )
    return la


def warn_if_useless(la: LoraLaplace, plan: Plan) -> None:
    """Warn if the adapter predicts its own training data no better than chance."""
    if plan.likelihood != "classification":
        return
    loss, chance = la.state.loss / la.state.n_data, math.log(len(plan.names))
    if loss > chance:
        point_out(
            f"the adapter's mean loss on these data is {loss:.3f} nats, guessing has "
            f"{chance:.3f}. Are texts, chat template, answers and the order of the labels those of "
            "its training?"
        )


def _destination(adapter: str, out: str | None, overwrite: bool) -> Path:
    """Return where the posterior goes, before any work."""
    if out is None and not Path(adapter).is_dir():
        if adapter.count("/") != 1:  # no name on the hub either
            raise ValueError(f"there is no folder {adapter}")
        raise ValueError(
            f"there is no folder {adapter}; if it is an adapter on the hub, say where the "
            "posterior goes by --out"
        )
    folder = Path(out or adapter)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; give a folder")
    if (folder / TENSORS).exists() and not overwrite:
        raise ValueError(f"{folder} holds a posterior already; replace it by --overwrite")
    check_folder(folder, "the posterior")
    return folder
