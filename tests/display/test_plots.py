"""Pictures of results hold the numbers that they show, need no arguments and open no window."""

import io
import sys
from dataclasses import replace

import pytest
import torch

from laplace_lora.display.plots import texts_figure, uncertainty_figure
from laplace_lora.evaluation import evaluate
from laplace_lora.generation import score
from laplace_lora.predictive.predictions import Predictions
from support.batches import loader, token_batch, validation
from support.language import language_posterior, text_batch
from support.multilabel import multilabel_batch, multilabel_posterior
from support.posteriors import fitted


def drawn(figure):
    """The figure's axes, once it could be drawn."""
    figure.savefig(io.BytesIO(), format="png")
    return figure.axes


def heights(axis):
    return [bar.get_height() for container in axis.containers for bar in container]


def test_predictions_of_classes():
    found = fitted().predict(validation())
    parts, spread = drawn(found.plot())
    top = parts.collections[1].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(float(found.entropy.max()), rel=1e-6)
    assert [t.get_text() for t in parts.get_legend().get_texts()] == ["aleatoric", "epistemic"]
    wrong = int((found.probs.argmax(1) != found.labels).sum())
    right = len(found) - wrong
    assert 0 < wrong < len(found)
    assert [t.get_text() for t in spread.get_legend().get_texts()] == ["right", "wrong"]
    counts = [sum(bar.get_height() for bar in container) for container in spread.containers]
    assert counts == [right, wrong]
    unlabelled = Predictions(
        found.mean, found.covariance, found.probs, found.entropy, found.mutual_information
    )
    _, spread = drawn(unlabelled.plot())
    assert spread.get_legend() is None and sum(heights(spread)) == len(found)


def test_a_single_prediction_is_drawn_from_side_to_side():
    found = fitted().predict(validation())
    parts, _ = drawn(uncertainty_figure(found.entropy[:1], found.mutual_information[:1]))
    corners = parts.collections[1].get_paths()[0].vertices
    assert {float(x) for x in corners[:, 0]} == {0.0, 1.0}


def test_predictions_of_independent_labels_count_in_all():
    found = multilabel_posterior().predict(multilabel_batch())
    parts, spread = drawn(found.plot())
    top = parts.collections[1].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(float(found.entropy.sum(1).max()), rel=1e-6)
    assert sum(heights(spread)) == len(found)


@pytest.mark.parametrize("labelled", [True, False])
def test_predictions_of_numbers(labelled):
    mean = torch.tensor([[3.0, 0.0], [1.0, 5.0], [2.0, 4.0]])
    covariance = torch.diag_embed(torch.tensor([[0.25, 1.0]] * 3))
    targets = mean + 1 if labelled else None
    axes = drawn(Predictions(mean, covariance, labels=targets).plot())
    assert len(axes) == 2
    assert axes[0].lines[0].get_ydata().tolist() == [1.0, 2.0, 3.0]
    band = axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0.0, 4.0)
    assert len(axes[1].lines) == 1 + labelled
    if labelled:
        assert axes[1].lines[1].get_ydata().tolist() == [1.0, 5.0, 6.0]


def test_tokens():
    found = score(language_posterior(), text_batch(), 4, n_samples=4)
    axis, bar = drawn(found.plot())
    shown = torch.tensor(axis.images[0].get_array().filled(float("nan")))
    assert torch.equal(shown.isnan(), ~found.mask)
    expected = found.mutual_information[found.mask].double()
    torch.testing.assert_close(shown[found.mask].double(), expected)
    assert bar.get_ylabel() == "mutual information in nats"


@pytest.mark.parametrize("texts", [1, 2, 3, 40])
def test_the_name_of_a_colour_bar_has_room(texts):
    values = torch.rand(texts, 5)
    figure = texts_figure(values, torch.ones_like(values) > 0, "mutual information in nats")
    _, bar = drawn(figure)
    box = bar.yaxis.label.get_window_extent()
    assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1


def test_calibrations():
    found = fitted().calibrate(loader())
    nll, ece = drawn(found.plot())
    assert heights(nll) == [found.nll_before, found.nll_after, found.nll_cross_fitted]
    assert heights(ece) == [found.ece_before, found.ece_after]
    nll, _ = drawn(replace(found, nll_cross_fitted=float("nan")).plot())
    assert heights(nll) == [found.nll_before, found.nll_after]


def test_memory():
    estimate = replace(fitted().estimate_memory(token_batch((6, 3))), available=0)
    (axis,) = drawn(estimate.plot())
    ends = {}
    for bars in axis.containers:
        for name, bar in zip(("fit", "predict"), bars, strict=True):
            ends[name] = bar.get_x() + bar.get_width()
    assert ends["fit"] == pytest.approx(estimate.fit / 2**20)
    assert ends["predict"] == pytest.approx(estimate.predict / 2**20)
    assert len(axis.lines) == 1 and axis.lines[0].get_xdata()[0] == 0
    far = replace(estimate, available=2**40)
    (axis,) = drawn(far.plot())
    assert not axis.lines and axis.get_title() == "free: 1.049e+06 MiB"


def test_without_matplotlib(monkeypatch):
    la = fitted()
    results = [la.predict(validation()), la.calibrate(loader()), evaluate(la, validation())]
    results.append(la.estimate_memory(token_batch((6, 3))))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for result in results:
        with pytest.raises(ImportError, match="pip install matplotlib"):
            result.plot()
