"""Progress bars: by default after two seconds, in the main process, unless switched off."""

import pytest
import torch

from laplace_lora.data import loaders
from laplace_lora.evaluation import evaluate
from laplace_lora.generation import generate, score
from support.batches import loader
from support.language import language_posterior, text_batch
from support.posteriors import posterior

TITLE = "Counting"


def shown(capsys, wanted, title=TITLE):
    assert list(loaders.progress([1, 2, 3], wanted, TITLE)) == [1, 2, 3]
    return title in capsys.readouterr().err


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(loaders, "DELAY", 0.0)


def test_what_is_quick_shows_nothing_unless_asked(capsys):
    assert loaders.DELAY == 2.0
    assert not shown(capsys, None)
    assert shown(capsys, True)


def test_what_takes_longer_shows_by_default(capsys, at_once):
    assert shown(capsys, None)
    assert not shown(capsys, False)


@pytest.mark.parametrize("value", loaders.OFF)
def test_one_variable_switches_all_off(capsys, at_once, monkeypatch, value):
    monkeypatch.setenv("LAPLACE_LORA_PROGRESS", value)
    assert not shown(capsys, None) and not shown(capsys, True)
    monkeypatch.setenv("LAPLACE_LORA_PROGRESS", "1")
    assert shown(capsys, None)


def test_other_processes_show_nothing(capsys, at_once, monkeypatch):
    monkeypatch.setattr(loaders, "is_main", lambda: False)
    assert not shown(capsys, None) and not shown(capsys, True)


def test_every_pass_has_a_bar_by_default(capsys, at_once):
    def seen():
        return capsys.readouterr().err

    la = posterior(fit=False)
    la.fit(loader())
    assert "Fitting the posterior" in seen()
    la.optimize_prior_precision()
    assert "Leaving each example out" in seen()  # of the training data
    la.recentre(1.0)
    assert "Recentring" in seen()
    la.optimize_prior_precision(method="marglik")
    assert "Checking the width" in seen()
    la.calibrate(loader())
    assert "Evaluating validation set" in seen()
    la.predict(loader())
    assert "Predicting" in seen()
    evaluate(la, loader(), bootstrap=2)
    assert "Evaluating predictive" in seen()


def test_tokens_have_a_bar_by_default(capsys, at_once):
    la = language_posterior(dtype=torch.float32)
    for method in ("sampled", "exact"):
        score(la, text_batch(), 3, method=method)
        assert "Scoring" in capsys.readouterr().err
        score(la, text_batch(), 3, method=method, progress_bar=False)
        assert not capsys.readouterr().err
    prompt, options = {"input_ids": torch.tensor([[4, 5]])}, {"max_new_tokens": 2, "top_k": 3}
    generate(la, prompt, **options)
    assert "Writing" in capsys.readouterr().err

    class Streamer:
        def put(self, value):
            pass

        def end(self):
            pass

    generate(la, prompt, **options, streamer=Streamer())  # shows tokens in its own way
    assert not capsys.readouterr().err
