"""How results show and convert themselves: against their own tensors."""

import json
import math
import re
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console

import laplace_lora
from laplace_lora.display.coloured import GROUNDS
from laplace_lora.evaluation import evaluate
from laplace_lora.generation import score
from laplace_lora.predictive.predictions import Predictions
from laplace_lora.predictive.span_predictions import SpanPredictions
from laplace_lora.predictive.token_class_predictions import TokenClassPredictions
from support.batches import loader, token_batch, validation
from support.language import language_posterior, text_batch
from support.posteriors import EVERY_CLASS, fitted, posterior
from support.texts import byte_tokenizer, word_tokenizer

BATCH = token_batch((6, 3, 5))


@pytest.fixture(scope="module")
def la():
    return fitted()


@pytest.fixture(scope="module")
def tokens():
    return score(language_posterior(dtype=torch.float32), text_batch(), 4, n_samples=4)


def test_there_is_a_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", laplace_lora.__version__)


def test_predictions(la):
    found = la.predict(validation())
    assert repr(found).startswith(f"Predictions of {len(found)} examples, 3 outputs: mean entropy")
    assert len(repr(found)) < 120
    columns = json.loads(json.dumps(found.to_dict()))
    assert columns["probs"] == found.probs.tolist()
    assert columns["prediction"] == found.probs.argmax(1).tolist()
    assert columns["covariance"] == found.covariance.tolist()
    frame = found.to_pandas()
    assert len(frame) == len(found) and frame["prob_2"].tolist() == found.probs[:, 2].tolist()
    assert frame["std_0"].tolist() == found.std[:, 0].tolist()
    assert frame["label"].tolist() == found.labels.tolist()
    unlabelled = la.predict({k: v for k, v in BATCH.items() if k != "labels"})
    assert "label" not in unlabelled.to_pandas() and "labels" not in unlabelled.to_dict()
    assert "(the first 10 of 30)" in la.predict([BATCH] * 10)._repr_html_()


def test_predictions_of_a_regression_have_no_classes():
    plain = Predictions(torch.ones(2, 1), torch.ones(2, 1, 1))
    assert repr(plain) == "Predictions of 2 examples, 1 outputs: mean standard deviation 1"
    assert set(plain.to_dict()) == {"mean", "covariance", "std"}
    assert list(plain.to_pandas()) == ["mean_0", "std_0"]


def test_reports(la):
    report = evaluate(la, validation(), name="ours", bootstrap=5)
    found = json.loads(json.dumps(report.to_dict()))
    assert found["values"] == report.values and found["errors"] == report.errors
    assert found["name"] == "ours" and found["examples"] == len(report.labels)
    frame = report.to_pandas()
    assert frame.loc["NLL", "value"] == report["NLL"]
    assert frame.loc["ECE", "standard error"] == report.errors["ECE"]
    assert f"<td>NLL</td><td>{report['NLL']:.4g}</td>" in report._repr_html_()


def test_calibrations_and_memory():
    la = fitted()
    chosen = la.calibrate(validation())
    found = json.loads(json.dumps(chosen.to_dict()))
    assert found["prior_precision"] == chosen.prior_precision.tolist()
    assert chosen.to_pandas()["nll_after"].tolist() == [chosen.nll_after]
    assert f"<td>ECE</td><td>{chosen.ece_before:.4g}</td>" in chosen._repr_html_()
    single = replace(chosen, nll_cross_fitted=math.nan)
    assert "cross-fitted" in str(chosen) and "nan" not in str(single) + single._repr_html_()
    assert single.to_pandas()["nll_cross_fitted"].isna().all()
    text = json.dumps(single.to_dict(), allow_nan=False)
    assert json.loads(text)["nll_cross_fitted"] is None
    estimate = la.estimate_memory(BATCH)
    found = json.loads(json.dumps(estimate.to_dict()))
    assert found["fit"] == estimate.fit and found["fits"] is True
    assert estimate.to_pandas()["predict"].tolist() == [estimate.predict]
    assert f"<td>curvature</td><td>{estimate.curvature / 2**20:.4g}</td>" in estimate._repr_html_()
    large = replace(estimate, curvature=3 * 2**30)
    assert "<th>GiB</th>" in large._repr_html_() and "<td>curvature</td><td>3</td>" in (
        large._repr_html_()
    )


def test_tokens_are_listed_by_text(tokens):
    assert repr(tokens).startswith("TokenPredictions of 3 texts, 7 tokens: mean entropy")
    texts = json.loads(json.dumps(tokens.to_dict()))["texts"]
    assert [len(text["tokens"]) for text in texts] == tokens.mask.sum(1).tolist()
    first = texts[1]["tokens"][0]
    assert first["token"] == int(tokens.tokens[1, 0]) and "text" not in first
    assert first["prob"] == pytest.approx(float(tokens.log_prob[1, 0].exp()))
    assert texts[2]["log_prob"] == pytest.approx(float(tokens.sequence_log_prob[2]))
    frame = tokens.to_pandas()
    assert len(frame) == 7 and frame["example"].tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert frame["entropy"].sum() == pytest.approx(float(tokens.entropy.sum()), rel=1e-5)


def test_tokens_are_coloured_by_epistemic_uncertainty(tokens):
    shades = [float(s) for s in re.findall(r"rgba\(214, 90, 49, ([\d.]+)\)", tokens.to_html())]
    information = tokens.mutual_information[tokens.mask]
    assert len(shades) == 7 and max(shades) == 0.8
    expected = 0.8 * information.clamp(min=0) / information.max()
    assert torch.tensor(shades).sub(expected).abs().max() < 0.006
    assert tokens._repr_html_() == tokens.to_html()


def printed(result, **kwargs):
    """What rich prints of a result."""
    console = Console(file=StringIO(), width=90, **kwargs)
    console.print(result)
    return console.file.getvalue()


def rows_of(text):
    """The cells of a printed table's rows, headings first."""
    lines = [re.split("[┃│]", line)[1:-1] for line in text.splitlines() if line[0] in "┃│"]
    return [[cell.strip() for cell in line] for line in lines]


def test_predictions_in_a_terminal(la):
    found = la.predict(validation())
    head, first, *_ = rows_of(printed(found))
    names = ["example", "label", "prediction", "confidence", "entropy", "mutual_information"]
    assert head == names and printed(found).startswith(repr(found))
    values = [found.probs[0].max(), found.entropy[0], found.mutual_information[0]]
    assert first[3:] == [f"{float(value):.4g}" for value in values]
    assert first[:3] == ["0", str(int(found.labels[0])), str(int(found.probs[0].argmax()))]
    assert f"<th>{'</th><th>'.join(names)}</th>" in found._repr_html_()
    assert "(the first 10 of 30)" in printed(la.predict([BATCH] * 10))
    plain = Predictions(torch.ones(2, 1), torch.ones(2, 1, 1))
    assert rows_of(printed(plain))[1] == ["0", "1", "1"]
    pair = Predictions(
        found.mean[:, :2],
        found.covariance[:, :2, :2],
        torch.tensor([[0.25, 0.75]] * len(found)),
        found.entropy,
        found.mutual_information,
    )
    assert rows_of(printed(pair))[1][1:4] == ["1", "0.25", "0.75"]


def test_independent_labels_in_a_terminal():
    probs = torch.tensor([[0.9, 0.2, 0.7], [0.1, 0.2, 0.3]])
    labels = torch.tensor([[1, -100, 0], [0, 1, 1]])
    found = Predictions(probs, torch.diag_embed(probs), probs, probs, probs / 2, labels)
    assert rows_of(printed(found)) == [
        ["example", "labels", "prediction", "entropy", "mutual_information"],
        ["0", "0", "0, 2", "1.8", "0.9"],
        ["1", "1, 2", "", "0.6", "0.3"],
    ]


def test_reports_calibrations_and_memory_in_a_terminal():
    la = fitted()
    report = evaluate(la, validation(), name="ours [bold]", bootstrap=5)
    assert printed(report).startswith(f"ours [bold], {len(report.labels)} examples")
    cells = {row[0]: row[1:] for row in rows_of(printed(report))}
    assert cells["NLL"] == [f"{report['NLL']:.4g}", f"{report.errors['NLL']:.4g}"]
    chosen = la.calibrate(validation())
    cells = {row[0]: row[1:] for row in rows_of(printed(chosen))}
    assert cells["ECE"] == [f"{chosen.ece_before:.4g}", f"{chosen.ece_after:.4g}"]
    estimate = replace(la.estimate_memory(BATCH), available=20000 * 2**20)
    cells = {row[0]: row[1:] for row in rows_of(printed(estimate))}
    assert cells["fit"] == [f"{estimate.fit / 2**20:.4g}"] and cells["available"] == ["20000"]


def test_spans_and_token_classes_in_a_terminal():
    place, p = torch.tensor([0, 0]), torch.tensor([0.75, 0.5])
    spans = SpanPredictions(place, place + 1, place + 2, p, 1 - p, p, p / 2, *[p] * 5)
    head, first, _ = rows_of(printed(spans))
    assert head == ["question", "start", "end", "prob", "no_answer", "mutual_information"]
    assert first == ["0", "1", "2", "0.75", "0.25", "0.375"]
    labelled = replace(spans, labels=torch.tensor([[3, 4], [5, 6]]))
    assert rows_of(printed(labelled))[2][:3] == ["1", "5", "6"]
    probs = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]])
    mask = torch.tensor([[True, False]])
    classes = TokenClassPredictions(mask, probs, probs, probs[..., 0], probs[..., 0] / 2)
    assert rows_of(printed(classes)) == [
        ["text", "token", "prediction", "confidence", "entropy", "mutual_information"],
        ["0", "0", "1", "0.75", "0.25", "0.125"],
    ]


def test_tokens_in_a_terminal_are_coloured_by_epistemic_uncertainty(tokens):
    plain = printed(tokens)
    assert plain.startswith(repr(tokens)[:60])
    numbers = [str(t) for t in tokens.tokens[tokens.mask].tolist()]
    assert plain.split()[-len(numbers) :] == numbers
    shares = torch.tensor([[1.0, 0.8, 0.6], [0.3, 0.2, 0.0], [0.5, 0.0, 0.0]])
    lines = replace(tokens, mutual_information=shares).to_rich().renderables[1:]
    styles = [[span.style for span in line.spans] for line in lines]
    strong, middle, weak = (style for _, style in GROUNDS)
    assert styles == [[strong, strong, middle], [weak], [middle]]
    text = printed(tokens.to_rich(word_tokenizer()))
    assert word_tokenizer().decode(tokens.tokens[0, :1]) in text


def test_a_tokenizer_gives_texts(tokens):
    tokenizer = word_tokenizer()
    tokens = replace(tokens, tokens=2 + tokens.tokens % 8)
    text = tokens.to_dict(tokenizer)["texts"][0]
    ids = [token["token"] for token in text["tokens"]]
    assert text["text"] == tokenizer.decode(ids)
    assert "".join(token["text"] for token in text["tokens"]) == f" {text['text']}"
    assert "text" in tokens.to_pandas(tokenizer)
    assert tokenizer.decode(ids[:1]) in tokens.to_html(tokenizer)


def test_tokens_that_complete_no_character_can_be_seen(tokens):
    tokenizer = byte_tokenizer()
    ids = torch.tensor(tokenizer("東b東c")["input_ids"])[:3]  # the first character
    one = replace(tokens, tokens=ids.expand_as(tokens.tokens))
    assert [t["text"] for t in one.to_dict(tokenizer)["texts"][0]["tokens"]] == ["", "", "東"]
    assert one.to_html(tokenizer).count(">·<") == sum(n - 1 for n in one.mask.sum(1).tolist())
    assert "··東" in printed(one.to_rich(tokenizer))


@pytest.mark.parametrize(("cls", "kwargs"), EVERY_CLASS)
def test_a_posterior_is_six_lines(cls, kwargs):
    name = "bert" if "LL" in cls.__name__ else "llama-lm"
    la = posterior(cls, name, fit=False, **kwargs)
    before = str(la)
    assert before.count("\n") == 5 and "none: call fit" in before and "not fitted" in repr(la)
    la.fit(loader())
    lines = str(la).split("\n")
    assert len(lines) == 6 and lines[0].startswith(f"{cls.__name__}: classification by ")
    assert f"{la.n_params:,} weights in {len(la.block_names)} tensors" in lines[1]
    known = la.fitted.gradient_term is not None
    assert ("not measured" in lines[3]) != known
    assert f"{la.n_data} examples" in lines[4] and "nothing" in lines[5]


@pytest.mark.filterwarnings("ignore:the posterior predicts its training examples:UserWarning")
def test_the_evidence_is_the_whole_one_where_it_is_known():
    la = posterior(name="bert")
    la.optimize_prior_precision(method="marglik", correction=False)
    plain = f"{float(la.log_marginal_likelihood().detach()):.4f} nats, without the gradient term"
    assert plain in str(la)
    value = la.log_marginal_likelihood(correction=True)
    assert f"{float(value.detach()):.4f} nats\n" in str(la)
    la.state = replace(la.state, loss=-1e3)  # labels with a probability above one
    assert "not credible" in str(la)


def test_what_was_tuned_and_calibrated_is_named():
    la = fitted()
    assert f"tuned by {la.tuning.method}" in str(la)
    assert "query, value, classifier" in str(la)
    la.covariance_scale, la.likelihood_temperature = 2.0, 1.5
    assert "covariance scale 2, likelihood temperature 1.5" in str(la)
    la.prior_mean = torch.full_like(la.mean, 0.5)
    assert "around given weights" in str(la)


def test_weights_that_have_changed_are_still_described():
    la = fitted()
    with torch.no_grad():
        la.params[0].add_(1)
    assert str(la).count("\n") == 5
