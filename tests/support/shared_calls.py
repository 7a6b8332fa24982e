"""Every call that iterates over data, as processes make it together or one makes it alone."""

import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from laplace_lora import FullLoraLaplace, KronLoraLaplace
from laplace_lora.evaluation import MAP, TemperatureScaling, evaluate
from laplace_lora.functional import calculate_kronecker_factors
from laplace_lora.generation import generate, score
from laplace_lora.posteriors.last_layer_gp import FunctionalLoraLLLaplace
from support.batches import loader, validation
from support.language import EXACT, language_posterior, text_batch, text_loader
from support.models import peft_model
from support.posteriors import LOW
from support.preferences import related_pairs, reward_posterior
from support.tokens import tagged_batch, tagged_loader, tagger


def posterior(model=None):
    la = KronLoraLaplace(model or peft_model("bert"), "classification", **LOW)
    la.fit(loader())
    la.prior_precision = 3.0
    return la


def brier(p, y):
    return (p - torch.nn.functional.one_hot(y, p.shape[1])).square().sum(-1).mean()


def _fit(la, data):
    la.fit(data)
    return torch.tensor([la.n_data, la.log_marginal_likelihood().item()])


def _adopt(la, data):
    la.adopt(la.curvature, 7, data)
    return torch.tensor([la.loss])


def _predict(la, data):
    predictions = la.predict(data)
    return torch.cat([predictions.probs, predictions.labels.unsqueeze(1)], dim=1)


def _sampled(la, data):
    found = la.predict(data, method="sampled", generator=torch.Generator().manual_seed(3))
    return torch.cat([found.probs, found.mutual_information.unsqueeze(1)], dim=1)


def _tuned(method, **options):
    def call(la, data):
        la.optimize_prior_precision(method=method, val_loader=data, **options)
        return la.prior_precision.detach()

    return call


def _loo(la, data):
    la.optimize_prior_precision(method="loo", train_loader=data)
    return la.prior_precision.detach()


def _auto(la, data):
    la.fit(data)
    la.optimize_prior_precision()
    return la.prior_precision.detach()


def _pairs(la, data):
    la = reward_posterior(FullLoraLaplace, fit=False)
    la.fit(data)
    la.optimize_prior_precision()  # pairs that share a text may be another process's
    report = la.tuning.leave_one_out
    return torch.tensor([report.sharing, report.nll, report.nll_map, float(la.prior_precision)])


def _marglik(la, data):
    la.fit(data)
    la.optimize_prior_precision(method="marglik")  # and a look at the data for its width
    return la.prior_precision.detach()


def _widest(la, data):
    la = language_posterior(**EXACT)  # sampled labels would differ between processes
    la.optimize_prior_precision(method="widest", train_loader=data)
    report = la.tuning.widest
    return torch.tensor([report.nll, report.nll_map, la.covariance_scale, report.tokens])


def _texts(la, data):
    la = language_posterior(fit=False, prior_precision=20.0, **EXACT)
    la.fit(data)
    return la, torch.Generator().manual_seed(3)


def _score(la, data):
    la, generator = _texts(la, data)
    found = score(la, text_batch(), 4, n_samples=6, generator=generator)
    return torch.cat([found.log_probabilities.flatten(), found.mutual_information.flatten()])


def _generate(la, data):
    la, generator = _texts(la, data)
    prompts = text_batch()["input_ids"][:, :3]
    options = {"do_sample": True, "temperature": 0.7, "n_samples": 6, "eos_token_id": []}
    found = generate(la, prompts, 4, 4, generator=generator, **options)
    return torch.cat([found.tokens.flatten(), found.log_probabilities.flatten()])


def _calibrate(la, data):
    report = la.calibrate(data, link_approx="mc", n_samples=20)  # samples are shared, too
    return torch.tensor([report.nll_after, report.nll_before])


def _export(la, data):
    with tempfile.TemporaryDirectory() as folder:
        width = la.export_adapters(Path(folder) / "served", 2, loader=data).width
    return torch.tensor([width.width, width.value, width.reference])


def _evaluate(la, data):
    report = evaluate(la.predict, data, ood_loader=data, bootstrap=3)
    return torch.cat([torch.tensor(list(report.values.values())), report.mutual_information])


def _tags(la, data):
    report = evaluate(MAP(tagger()), data, ood_loader=data, bootstrap=3)
    return torch.cat([torch.tensor(list(report.values.values())), report.ood_uncertainty])


def _temperature(la, data):
    return torch.tensor([TemperatureScaling(la.logits_model, data).temperature])


def _factors(la, data):
    factors = calculate_kronecker_factors(
        la.logits_model.model,
        lambda model, batch: model(**batch).logits,
        data,
        target_module_keywords=["lora"],
    )
    return torch.stack([x.norm() * g.trace() for x, g in factors.values()])


def _process(la, data):
    gp = FunctionalLoraLLLaplace(peft_model("bert", dtype=torch.float32), "classification", 2)
    gp.fit(data)
    return torch.tensor([float(gp.n_data)])


CALLS = {
    "fit": _fit,
    "adopt": _adopt,
    "predict": _predict,
    "predict, sampled": _sampled,
    "grid": _tuned("gridsearch"),
    "grid, mc": _tuned("gridsearch", link_approx="mc"),
    "grid, function": _tuned("gridsearch", loss=brier),
    "grid, metric": _tuned("gridsearch", loss=MulticlassAccuracy(3)),
    "val_gd": _tuned("val_gd", n_steps=3),
    "calibrate": _calibrate,
    "loo": _loo,
    "auto": _auto,
    "pairs": _pairs,
    "marglik": _marglik,
    "widest": _widest,
    "score": _score,
    "generate": _generate,
    "export": _export,
    "evaluate": _evaluate,
    "temperature": _temperature,
    "gp": _process,
    "factors": _factors,
    "tags": _tags,
}
ON_TRAINING_DATA = ("loo", "auto", "marglik")
ON_TEXTS = ("widest", "score", "generate")


def data_of(call):
    if call == "pairs":
        return related_pairs()
    if call == "tags":
        return tagged_loader(batch=tagged_batch((4, 6, 3, 5, 6, 4, 5))).dataset
    if call in ON_TEXTS:
        return text_loader(batch=text_batch((4, 6, 3, 5, 6, 4, 5), (1, 3, 2, 1, 2, 1, 2))).dataset
    return (loader() if call in ON_TRAINING_DATA else validation()).dataset


def result_of(call, data, la=None):
    torch.manual_seed(0)
    return CALLS[call](la or posterior(), data)


class Broken(list):
    """Examples, one of which cannot be read."""

    def __init__(self, examples, broken):
        super().__init__(examples)
        self.broken = broken

    def __getitem__(self, i):
        if i == self.broken:
            raise ValueError("this example cannot be read")
        return super().__getitem__(i)


def whole(call, batch_size=2):
    return DataLoader(data_of(call), batch_size=batch_size)
