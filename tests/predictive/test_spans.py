"""Answers of questions: samples against explicit Jacobians, best spans, no answer, layouts."""

import pytest
import torch

from laplace_lora import DiagLoraLaplace, KronLoraLaplace
from laplace_lora.evaluation.spans import span_metrics
from laplace_lora.models.tangents.forward_mode import NoForwardDerivativeError
from laplace_lora.predictive.linear_samples import LinearSamples
from laplace_lora.predictive.sample_set import SampleSet
from laplace_lora.predictive.spans import LONGEST, SpanPredictor, span_tangents
from support.generation import seeded
from support.opaque import Opaque
from support.references import assert_near, explicit_jacobians
from support.spans import READERS, question_batch, question_loader, reader, span_posterior
from support.texts import word_tokenizer

# torch.func, here the reference, has no batching rule for fused attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
BATCH = question_batch(pad_to=8, seed=3)
X = {k: BATCH[k] for k in ("input_ids", "attention_mask")}
REAL = X["attention_mask"].bool()


@pytest.mark.parametrize("name", READERS)
def test_tangents_are_jacobians_times_directions(name):
    la = span_posterior(name=name)
    mean, tangents = span_tangents(LinearSamples(la.fitted, 6, seeded()), X)
    directions = SampleSet(la.fitted, 6, seeded()).directions
    J = torch.cat([J.flatten(2) for J in explicit_jacobians(la.model, X)], -1)
    expected = torch.einsum("ncp,kp->knc", J, directions).unflatten(-1, (2, 8))
    assert_near(mean, la.model.eval()(X).detach().unflatten(-1, (2, 8)))
    real = REAL.unsqueeze(1).expand(-1, 2, -1)
    assert_near(tangents[:, real], expected[:, real], 1e-5)


def test_predictive_samples_are_starts_and_ends():
    la = span_posterior()
    samples = la.predictive_samples(X, pred_type="nn", n_samples=3).unflatten(-1, (2, 8))
    assert_near(samples.sum(-1), torch.ones(3, 3, 2, dtype=samples.dtype))


def test_spans_are_averaged_over_a_loop_of_linearised_models():
    la = span_posterior()
    samples = SampleSet(la.fitted, 5, seeded())
    J = torch.cat([J.flatten(2) for J in explicit_jacobians(la.model, X)], -1)
    f = la.model.eval()(X).detach()
    changes = samples.outputs(
        torch.zeros_like(f), torch.einsum("ncp,kp->knc", J, samples.directions)
    )
    predictions = la.predict(X, n_samples=5, generator=seeded())
    for n, length in enumerate(X["attention_mask"].sum(1).tolist()):
        joint, conditional = torch.zeros(length, length).double(), 0.0
        for change in changes:
            start, end = (half[:length].softmax(0) for half in (f + change)[n].unflatten(0, (2, 8)))
            joint += torch.outer(start, end) / 5
            conditional -= float((start * start.log()).sum() + (end * end.log()).sum()) / 5
        spans = {(i, j): joint[i, j] for i in range(1, length) for j in range(i, length)}
        best = max(spans, key=spans.get)
        assert (int(predictions.start[n]), int(predictions.end[n])) == best
        assert float(predictions.prob[n]) == pytest.approx(float(spans[best]), rel=1e-5)
        assert float(predictions.no_answer[n]) == pytest.approx(float(joint[0, 0]), rel=1e-5)
        total = -float((joint * joint.log()).sum())
        assert float(predictions.entropy[n]) == pytest.approx(total, rel=1e-5)
        assert float(predictions.aleatoric[n]) == pytest.approx(conditional, rel=1e-5)
    p = la(X, n_samples=5, generator=seeded())
    assert_near(p[0, 0, :5], (f + changes)[:, 0, :5].softmax(-1).mean(0), 1e-5)
    assert float(p[:, :, -1].max()) < 1e-20 and p.shape == (3, 2, 8)


@pytest.mark.parametrize("cls", [KronLoraLaplace, DiagLoraLaplace])
def test_batches_and_padding_change_nothing(cls):
    la = span_posterior(cls)
    together = la.predict(BATCH)
    names = (
        "start",
        "prob",
        "no_answer",
        "entropy",
        "mutual_information",
        "label_prob",
        "map_prob",
    )
    for width in (7, 9):
        alone = la.predict(question_loader(1, question_batch(pad_to=width, seed=3)))
        for name in names:
            assert_near(getattr(alone, name).double(), getattr(together, name).double(), 1e-5)
    left = la.predict(question_batch(pad_to=9, side="left", seed=3)).none
    assert left.tolist() == [4, 2, 5] and together.none.tolist() == [0, 0, 0]


def test_answers_stay_in_their_context():
    la = span_posterior()
    context = torch.zeros_like(REAL)
    context[:, 2:4] = True
    for batch in ({**X, "context_mask": context}, {**X, "token_type_ids": context.long()}):
        found = la.predict(batch)
        assert ((found.start >= 2) & (found.end <= 3) & (found.start <= found.end)).all()
    with pytest.raises(ValueError, match="row 2 has no context"):
        la.predict({**X, "context_mask": context & (torch.arange(3) < 2).unsqueeze(1)})
    with pytest.raises(ValueError, match="must say of each token"):
        la.predict({**X, "context_mask": context[:, :-1]})
    assert LONGEST == 30


def test_more_samples_and_other_options():
    la = span_posterior(prior_precision=1e8)
    networks = la(X, pred_type="nn", link_approx="mc", n_samples=3)
    f = la.model.eval()(X).detach().unflatten(-1, (2, 8)).softmax(-1)
    assert_near(networks, f, 0.02)
    assert_near(la(X), f, 0.02)
    assert_near(la.predict(X).prob, la.predict(X).map_prob, 0.02)
    la.prior_precision = 1.0
    assert not torch.equal(la(X), la(X, generator=seeded(1)))
    for options in ({"method": "exact"}, {"link_approx": "probit"}, {"pred_type": "map"}):
        with pytest.raises(ValueError, match="spans are predicted from samples"):
            la(X, **options)
    with pytest.raises(ValueError, match="spans are predicted from samples"):
        la.predict(X, method="exact")
    with pytest.raises(ValueError, match="mean nothing to question answering"):
        la(X, joint=True)
    with pytest.raises(TypeError, match="'start_positions'"):
        la(X["input_ids"])
    with pytest.raises(ValueError, match="n_samples must be a whole number"):
        SpanPredictor(la.fitted, 0)


def test_pairs_of_texts_rows_and_loaders_keep_their_order():
    la = span_posterior()
    tokenizer = word_tokenizer()
    pairs = [("a b", "c d e"), ("e", "f"), ("a c", "e g h b")]
    by_text = la.predict(pairs, tokenizer, batch_size=2)
    encoded = [tokenizer(*pair) for pair in pairs]
    contexts = [[part == 1 for part in row.sequence_ids(0)] for row in encoded]
    rows = [{**row, "context_mask": c} for row, c in zip(encoded, contexts, strict=True)]
    by_row = la.predict(rows, tokenizer, batch_size=2)
    assert torch.equal(by_text.start, by_row.start) and by_text.labels is None
    single = la.predict([rows[1]], tokenizer)
    assert_near(single.prob, by_text.prob[1:2], 1e-5)
    given = la.predict([(X, torch.stack([BATCH["start_positions"], BATCH["end_positions"]], -1))])
    assert_near(given.label_prob, la.predict(BATCH).label_prob, 1e-6)
    with pytest.raises(ValueError, match="nothing to predict"):
        la.predict([])


@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_of_pairs_are_in_the_second_text_without_token_types(side):
    la, tokenizer = span_posterior(name="llama"), word_tokenizer()
    tokenizer.padding_side = side
    pairs = [("a b c d e", "f g h"), ("b a", "e g h b"), ("a c e g h b", "d"), ("h e d a", "c b")]
    assert "token_type_ids" not in tokenizer(*pairs[0])
    free = la.predict([" ".join(pair) for pair in pairs], tokenizer)
    lengths = torch.tensor([len(question.split()) for question, _ in pairs])
    assert bool((free.start < lengths).any())
    found = la.predict(pairs, tokenizer, batch_size=3)
    assert bool((found.start >= lengths).all())
    mixed = la.predict([" ".join(pairs[0]), *pairs[1:]], tokenizer)
    assert mixed.start.tolist() == [int(free.start[0]), *found.start[1:].tolist()]

    def slow(*texts, **kwargs):
        return dict(tokenizer(*texts, **kwargs))

    slow.pad_token, slow.pad, slow.padding_side = "[PAD]", tokenizer.pad, side
    assert torch.equal(la.predict(["a b c"], slow).start, la.predict(["a b c"], tokenizer).start)
    with pytest.raises(ValueError, match="does not say which tokens are context: give rows with a"):
        la.predict(pairs, slow)


def test_contexts_that_are_cut_say_so():
    la, tokenizer = span_posterior(), word_tokenizer()
    longest = ("a b", " ".join("cdefgha" * 2))  # 16 tokens, as many as the tokenizer takes
    la.predict([longest], tokenizer)
    with pytest.warns(
        UserWarning, match=r"texts \[1\] have more tokens .* model_max_length=16, and"
    ):
        la.predict([longest, ("a b", longest[1] + " b")], tokenizer)


def test_labels_less_probable_than_float32_holds_have_their_nll():
    model = reader(dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qa_outputs" in name:
                parameter.mul_(100)
    la = span_posterior(model=model, prior_precision=1e6)
    f = la.model.eval()(X).detach().double().unflatten(-1, (2, 8)).log_softmax(-1)
    places = torch.stack([BATCH["start_positions"], BATCH["end_positions"]], -1)
    exact = -f.gather(2, places.unsqueeze(2)).sum((1, 2))
    assert float(exact.max()) > 110  # 1e-48
    predictions = la.predict(BATCH)
    assert span_metrics(predictions.by_map)["NLL"] == pytest.approx(float(exact.mean()), rel=1e-4)
    assert_near(-predictions.label_prob.log(), exact, 0.05)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_rows_have_places_of_their_own_whatever_padding_they_meet(side, batch_size):
    la = span_posterior(name="llama")
    tokenizer = word_tokenizer()
    tokenizer.padding_side = side
    texts = ["a b c d e", "f g", "a c e g h b d"]
    rows = [
        {**tokenizer(text), "start_positions": 1, "end_positions": len(text.split()) - 1}
        for text in texts
    ]
    for row in rows:
        row["context_mask"] = [0] * (len(row["input_ids"]) - 2) + [1, 1]
    found = la.predict(rows, tokenizer, batch_size=batch_size)
    joined = [
        {k: v for k, v in row.items() if "_positions" not in k}
        | {"labels": [row["start_positions"], row["end_positions"]]}
        for row in rows
    ]
    again = la.predict(joined, tokenizer, batch_size=batch_size)
    by_text = la.predict(texts, tokenizer, batch_size=batch_size)
    for n, row in enumerate(rows):
        alone = la.predict({k: torch.tensor([v]) for k, v in row.items()})
        assert alone.start >= len(row["input_ids"]) - 2
        for name in ("none", "start", "end", "map_start", "map_end", "labels"):
            assert torch.equal(getattr(found, name)[n], getattr(alone, name)[0])
        for name in ("prob", "label_prob", "no_answer", "map_label_prob"):
            assert_near(getattr(found, name)[n], getattr(alone, name)[0], 1e-5)
        assert torch.equal(again.labels[n], alone.labels[0])
        assert_near(again.label_prob[n], alone.label_prob[0], 1e-5)
        free = la.predict({"input_ids": torch.tensor([row["input_ids"]])})
        assert torch.equal(by_text.answer[n], free.answer[0])


def test_contexts_of_rows_are_checked():
    la, tokenizer = span_posterior(), word_tokenizer()
    rows = [dict(tokenizer("a b c")), {**tokenizer("d e"), "context_mask": [0, 1]}]
    with pytest.raises(ValueError, match=r"row of 3 tokens has a 'context_mask' of 0; give every"):
        la.predict(rows, tokenizer)
    with pytest.raises(ValueError, match=r"row of 2 tokens has a 'context_mask' of 1"):
        la.predict([{**rows[1], "context_mask": [1]}], tokenizer)


def test_results_show_themselves_and_are_scored():
    la = span_posterior()
    predictions = la.predict(BATCH)
    assert str(predictions).startswith("SpanPredictions of 3 questions")
    assert "<table>" in predictions._repr_html_() and len(predictions.to_pandas()) == 3
    assert predictions.to_dict()["true_start"] == BATCH["start_positions"].tolist()
    some = predictions[[2, 0]]
    assert torch.equal(some.prob, predictions.prob[[2, 0]]) and len(some) == 2
    by_map = predictions.by_map
    assert torch.equal(by_map.prob, predictions.map_prob) and not by_map.mutual_information.any()
    scores = span_metrics(predictions)
    assert scores["NLL"] == pytest.approx(float(-predictions.label_prob.log().mean()))
    exact, f1 = [], []
    for n in range(3):
        answer = set(range(int(predictions.answer[n, 0]), int(predictions.answer[n, 1]) + 1))
        truth = set(range(int(BATCH["start_positions"][n]), int(BATCH["end_positions"][n]) + 1))
        exact.append(answer == truth)
        f1.append(2 * len(answer & truth) / (len(answer) + len(truth)))
    assert scores["exact match"] == pytest.approx(sum(exact) / 3)
    assert scores["F1"] == pytest.approx(sum(f1) / 3)
    assert 0 <= scores["ECE"] <= 1 and 0 <= scores["AURC"] <= 1
    with pytest.raises(ValueError, match="have no labels"):
        span_metrics(la.predict(X))


def test_answers_are_the_best_span_or_none():
    la = span_posterior()
    whole = la.predict(BATCH)
    for n in range(3):
        answered = bool(whole.prob[n] > whole.no_answer[n])
        best = [int(whole.start[n]), int(whole.end[n])] if answered else [0, 0]
        assert whole.answer[n].tolist() == best
        assert float(whole.confidence[n]) == float(max(whole.prob[n], whole.no_answer[n]))


def test_the_epistemic_part_is_never_negative():
    la = span_posterior(dtype=torch.float32, prior_precision=1e14)
    for seed in range(4):
        information = la.predict(question_batch(pad_to=8, seed=seed)).mutual_information
        assert information.dtype == torch.float32
        assert bool((information >= 0).all()) and float(information.max()) < 1e-5


def test_none_in_the_place_of_labels_are_none():
    la = span_posterior()
    whole = {k: v for k, v in question_batch().items() if not k.endswith("positions")}
    expected = la.predict(whole)
    for data in (
        {**whole, "labels": None},
        {**whole, "start_positions": None, "end_positions": None},
        [(whole, None)],
    ):
        found = la.predict(data)
        assert found.label_prob is None and torch.equal(found.prob, expected.prob)
    placed = question_batch()
    both = torch.stack([placed.pop("start_positions"), placed.pop("end_positions")], dim=1)
    labelled = {**placed, "start_positions": None, "end_positions": None, "labels": both}
    assert_near(la.predict(labelled).label_prob, la.predict(question_batch()).label_prob)


def test_models_that_carry_no_tangents_are_pointed_to_sampled_networks():
    model = reader()
    model.base_model.model.bert.encoder.layer[1].attention.output.dropout = Opaque()
    la = span_posterior(model=model)
    for predict in (la, la.predict):
        with pytest.raises(NoForwardDerivativeError, match="pred_type='nn'"):
            predict(X)
    assert la(X, pred_type="nn", link_approx="mc").shape == (3, 2, 8)
