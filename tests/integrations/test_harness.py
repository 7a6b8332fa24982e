"""The evaluation harness asks the posterior predictive; skipped where lm-eval is missing."""

import copy
import json
import math
from collections import Counter

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoHaConfig, LoraConfig, get_peft_model
from transformers import MambaConfig, Phi3Config, Phi3ForCausalLM

from laplace_lora import DiagLoraLaplace, KronLoraLaplace
from laplace_lora.generation import generate, score
from laplace_lora.integrations.harness import LaplaceLM
from support.generation import seeded
from support.language import language_posterior, text_loader
from support.models import TINY, base_model, excite
from support.texts import special_tokenizer, word_tokenizer

PAIRS = [("a b c", " d e"), ("f", " a b c d"), ("h h a", " b")]


@pytest.fixture(scope="module")
def model():
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "[PAD]"
    la = language_posterior(dtype=torch.float32, prior_precision=3.0)
    return LaplaceLM(la, tokenizer, n_samples=8, batch_size=2)


def plain_tokenizer(words=10):
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "g"
    tokenizer.add_tokens([f"w{i}" for i in range(len(tokenizer), words)])
    return tokenizer


def instances(kind, arguments):
    return [Instance(kind, {}, args, n) for n, args in enumerate(arguments)]


def encoded(model, context, continuation):
    ids = [*model.tok_encode(context), *model.tok_encode(continuation)]
    row = torch.tensor([ids])
    labels = row.clone()
    labels[:, : len(model.tok_encode(context))] = -100
    return {"input_ids": row, "labels": labels}


def test_continuations_have_the_predictives_probability(model):
    found = model.loglikelihood(instances("loglikelihood", PAIRS))
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        batch = encoded(model, context, continuation)
        alone = score(model.posterior, batch, n_samples=8, generator=seeded())
        expected = alone.log_probabilities.logsumexp(0) - math.log(8)
        assert value == pytest.approx(float(expected), rel=1e-4)
        best = alone.candidates.gather(2, alone.probabilities.argmax(-1, keepdim=True))
        assert greedy == bool((best.squeeze(-1) == alone.tokens).all())


@pytest.mark.parametrize("make", [plain_tokenizer, special_tokenizer])
def test_without_uncertainty_it_is_the_harness_s_own_model(make):
    """In each of them texts begin as the tokenizer begins them, and as the model was trained."""
    la = language_posterior(dtype=torch.float32, prior_precision=1e12)
    tokenizer = make()
    own = LaplaceLM(la, tokenizer, n_samples=2, batch_size=3)
    place = {"pretrained": la.logits_model.model, "tokenizer": tokenizer, "backend": "causal"}
    place |= {"max_length": own.max_length, "batch_size": 3}
    other, bare = HFLM(**place), HFLM(add_bos_token=False, **place)
    pairs = [*PAIRS, ("", " a b"), ("", "h a b"), ("h a", " b c"), ("c ", " b")]
    asked = instances("loglikelihood", pairs)
    found, expected = own.loglikelihood(asked, True), other.loglikelihood(asked, True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [v for v, _ in found] == pytest.approx([v for v, _ in expected], rel=1e-4)
    # With special tokens it predicts the one that begins texts as well, after itself.
    asked = instances("loglikelihood_rolling", [("a b c",), ("d e f " * 20,)])
    expected = bare.loglikelihood_rolling(asked, True)
    assert own.loglikelihood_rolling(asked, True) == pytest.approx(expected, rel=1e-4)
    options = {"max_gen_toks": 4, "until": ["zz"], "do_sample": False}
    asked = instances("generate_until", [("a b", options), ("h a b", options)])
    assert own.generate_until(asked, True) == other.generate_until(asked, True)


@pytest.fixture(scope="module")
def both():
    """The posterior without uncertainty, and the harness's own model; words for all tokens."""
    tokenizer = plain_tokenizer(50)
    la = language_posterior(dtype=torch.float32, prior_precision=1e12)
    own = LaplaceLM(la, tokenizer, n_samples=2, batch_size=3)
    place = {"pretrained": la.logits_model.model, "tokenizer": tokenizer, "backend": "causal"}
    return own, HFLM(**place, max_length=own.max_length, batch_size=3)


def written(model, **options):
    options = {"max_gen_toks": 6, "until": [], **options}
    requests = [(context, options) for context in ("a b", "h a b", "c", "d e f a")]
    return model.generate_until(instances("generate_until", requests), True)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (list, {}),
        (tuple, {}),
        (torch.tensor, {}),
        ({"repetition_penalty": 3.0}, {}),
        ({}, {"repetition_penalty": 3.0}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 3.0}),
        ({"num_beams": 3}, {"num_beams": 1, "repetition_penalty": 3.0}),
        ({}, {"top_p": 0.5, "temperature": 0, "no_repeat_ngram_size": 0, "until": ["w20", "w40"]}),
    ],
)
def test_the_model_s_own_options_hold_as_in_the_harness_s_own_model(
    both, monkeypatch, config, options
):
    own, other = both
    plain = written(own)
    if callable(config):  # as the token that ends a turn, which is not the tokenizer's
        token = own.tok_encode(plain[0])[2]
        config = {"eos_token_id": config([own.eot_token_id, token])}
    for name, value in config.items():
        monkeypatch.setattr(other.model.generation_config, name, value)
    found = written(own, **options)
    assert found == written(other, **options)
    assert found != plain or "top_p" in options


def test_options_that_change_no_greedy_text_are_taken(both, monkeypatch):
    own, other = both
    plain = written(own)
    options = {"cache_implementation": "static", "max_cache_len": 32, "prefill_chunk_size": 2}
    options |= {"renormalize_logits": True, "remove_invalid_values": True, "low_memory": True}
    options |= {"output_scores": False, "return_dict_in_generate": False, "disable_compile": True}
    options |= {"min_length": 1, "num_beam_groups": 2}
    assert written(own, **options) == written(other, **options) == plain
    for name in ("min_length", "num_beam_groups"):
        monkeypatch.setattr(other.model.generation_config, name, options[name])
    assert written(own) == written(other) == plain


@pytest.mark.parametrize("ends", [None, 2, -1])
def test_a_tokenizer_may_end_no_text(both, monkeypatch, ends):
    own, other = both
    tokenizer = plain_tokenizer(50)
    tokenizer.eos_token = None
    silent = LaplaceLM(own.posterior, tokenizer, n_samples=2)
    for config in (other.model.generation_config, own.posterior.logits_model.config):
        monkeypatch.setattr(config, "eos_token_id", ends)
    ids = torch.tensor([silent.tok_encode("d e f a")])
    options = {"n_samples": 2, "generator": seeded(), "eos_token_id": [2] if ends == 2 else []}
    (tokens,) = generate(own.posterior, {"input_ids": ids}, 6, **options).tokens.tolist()
    words = [tokenizer.decode([token]) for token in tokens]
    stop = next(n for n, word in enumerate(words) if word not in words[:n] and n)
    calls = []

    def watched(*args, **kwargs):
        calls.append(generate(*args, **kwargs))
        return calls[-1]

    monkeypatch.setattr("laplace_lora.integrations.harness.generate", watched)
    for until, text in ([], words), ([words[stop]], words[:stop]):
        request = ("d e f a", {"max_gen_toks": 6, "until": until})
        (found,) = silent.generate_until(instances("generate_until", [request]), True)
        assert found.split() == text
    # Behind the stop a text is ended by the model's own token, or goes on.
    assert int(calls[1].mask.sum()) == (stop + 2 if ends == 2 else 6)


@pytest.mark.parametrize("name", ["num_beams", "min_new_tokens", "min_length", "max_time"])
def test_options_that_greedy_texts_do_not_follow_are_refused(both, monkeypatch, name):
    own, other = both
    with pytest.raises(ValueError, match=f"does not follow {name}=3; .*the task's"):
        written(own, **{name: 3})
    monkeypatch.setattr(other.model.generation_config, name, 3)
    with pytest.raises(ValueError, match=f"does not follow {name}=3; .*the model's gen"):
        written(own)


def test_options_that_the_harness_s_own_model_would_not_take_or_draw_by_are_refused(both):
    with pytest.raises(ValueError, match="does not know seed=0; take it out of the task's"):
        written(both[0], seed=0)
    with pytest.raises(ValueError, match="continues greedily"):
        written(both[0], temperature=0.7)


def test_a_config_of_peft_s_model_holds_before_the_transformer_s(both, monkeypatch):
    own, other = both
    plain = written(own)
    config = copy.deepcopy(other.model.generation_config)
    config.eos_token_id = own.tok_encode(plain[0])[:1]
    monkeypatch.setattr(own.posterior.logits_model.model, "generation_config", config, False)
    assert written(own) != plain


def test_a_text_begins_once():
    own = LaplaceLM(language_posterior(), special_tokenizer())
    assert own.tok_encode("h a") == own.tok_encode("a") == [9, 2]
    assert own.tok_encode("h a", add_special_tokens=True) == [9, 9, 2]
    asked = instances("loglikelihood_rolling", [("a b",), ("h a b",)])
    assert len(set(own.loglikelihood_rolling(asked))) == 1


def test_an_answer_that_a_task_has_begun_goes_on():
    tokenizer = special_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}h {{ m.content }} g {% endfor %}"
        "{% if add_generation_prompt %}h {% endif %}"
    )
    own = LaplaceLM(language_posterior(), tokenizer)
    begun = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    assert own.apply_chat_template(begun, add_generation_prompt=False) == "h a g h b c"
    assert own.apply_chat_template(begun[:1]) == "h a g h "


def test_a_tokenizer_that_ends_texts_is_refused():
    la = language_posterior()
    with pytest.raises(ValueError, match=r"ends every text with 'g'.*add_eos_token=False"):
        LaplaceLM(la, special_tokenizer("h $A g"))


def test_the_seed_is_of_the_samples(model):
    def values(seed):
        options = {"n_samples": 8, "batch_size": 2, "seed": seed}
        other = LaplaceLM(model.posterior, model.tokenizer, **options)
        return [value for value, _ in other.loglikelihood(instances("loglikelihood", PAIRS))]

    assert values(1) == values(1) != values(0)


def test_a_model_that_names_no_length_needs_one(model, monkeypatch):
    monkeypatch.setattr(model.posterior.logits_model, "config", MambaConfig())
    with pytest.raises(ValueError, match="give LaplaceLM `max_length`"):
        LaplaceLM(model.posterior, model.tokenizer)
    assert LaplaceLM(model.posterior, model.tokenizer, max_length=5).max_length == 5


def test_a_model_without_samples_is_refused_by_what_to_do(model):
    loha = LoHaConfig(r=2, target_modules=["q_proj"])
    own = excite(get_peft_model(base_model("llama-lm"), loha))
    la = DiagLoraLaplace(own, "language_modeling", uncovered="diag")
    la.fit(text_loader())
    without = LaplaceLM(la, model.tokenizer)
    asked = (
        lambda: without.loglikelihood(instances("loglikelihood", PAIRS)),
        lambda: without.generate_until(instances("generate_until", [("a", {"max_gen_toks": 2})])),
    )
    for ask in asked:
        with pytest.raises(ValueError, match=r"^LaplaceLM needs samples.*`score` has method="):
            ask()


def test_whole_texts_follow_the_end_of_text_token(model):
    short = LaplaceLM(model.posterior, model.tokenizer, n_samples=8, max_length=3)
    (value,) = short.loglikelihood_rolling(instances("loglikelihood_rolling", [("a b c",)]))
    ids = short.tok_encode("a b c")
    pieces = [(None, [0], ids[:2]), (None, [ids[1]], ids[2:])]
    assert value == pytest.approx(sum(v for v, _ in short._loglikelihood_tokens(pieces)))
    with pytest.raises(ValueError, match="no context"):
        short.loglikelihood(instances("loglikelihood", [("a", " b c d")]))


def test_generation_is_greedy_and_stops(model):
    request = ("a b", {"max_gen_toks": 5, "until": []})
    (text,) = model.generate_until(instances("generate_until", [request]))
    ids = torch.tensor([model.tok_encode("a b")])
    options = {"max_new_tokens": 5, "n_samples": 8, "generator": seeded(), "eos_token_id": 0}
    found = generate(model.posterior, {"input_ids": ids}, **options)
    assert text == model.tokenizer.decode(found.tokens[0][found.mask[0]], skip_special_tokens=True)
    stop = text.split()[0] if text else "a"
    request = ("a b", {"max_gen_toks": 5, "until": [stop]})
    assert model.generate_until(instances("generate_until", [request])) == [""]
    with pytest.raises(ValueError, match="greedily"):
        model.generate_until(instances("generate_until", [("a", {"do_sample": True})]))


def test_generation_stops_at_special_tokens_and_writes_no_more(model, monkeypatch):
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "[PAD]"
    tokenizer.add_tokens([f"w{i}" for i in range(len(tokenizer), 50)])
    own = LaplaceLM(model.posterior, tokenizer, n_samples=8)
    ids = torch.tensor([own.tok_encode("a b")])
    options = {"n_samples": 8, "generator": seeded(), "eos_token_id": 0}
    (tokens,) = generate(own.posterior, {"input_ids": ids}, 5, **options).tokens.tolist()
    stop = tokens.index(tokens[2])
    word = tokenizer.decode([tokens[2]])
    tokenizer.add_special_tokens({"additional_special_tokens": [word]})
    written = []

    def watched(*args, **kwargs):
        written.append(generate(*args, **kwargs))
        return written[-1]

    monkeypatch.setattr("laplace_lora.integrations.harness.generate", watched)
    request = ("a b", {"max_gen_toks": 5, "until": [word, ""]})
    (text,) = own.generate_until(instances("generate_until", [request]))
    assert text == tokenizer.decode(tokens[:stop])
    assert written[0].tokens[0].tolist() == [*tokens[: stop + 1], 0]


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens"])
def test_a_task_calls_the_longest_continuation_by_any_of_the_harness_s_names(
    model, monkeypatch, name
):
    asked = []

    def watched(posterior, batch, max_new_tokens, **kwargs):
        asked.append((batch["input_ids"].tolist(), max_new_tokens))
        return generate(posterior, batch, max_new_tokens, **kwargs)

    monkeypatch.setattr("laplace_lora.integrations.harness.generate", watched)
    requests = [("a", {name: 2, "until": []}), ("", {name: 3, "until": []})]
    model.generate_until(instances("generate_until", requests))
    # Without a context the end-of-text token stands before, as in loglikelihood.
    assert asked == [([model.tok_encode("a")], 2), ([[0]], 3)]


def each_alone(la, requests, tokenizer, monkeypatch, **kwargs):
    """Texts of requests one by one and together, and how many each call of `generate` had."""
    sizes = []

    def watched(posterior, batch, **kwargs):
        sizes.append(len(batch["input_ids"]))
        return generate(posterior, batch, **kwargs)

    monkeypatch.setattr("laplace_lora.integrations.harness.generate", watched)
    asked = instances("generate_until", requests)
    alone = LaplaceLM(la, tokenizer, batch_size=1, **kwargs).generate_until(asked)
    own, sizes = sizes, []
    return alone, LaplaceLM(la, tokenizer, **kwargs).generate_until(asked), own, sizes


def test_requests_run_together_as_each_alone(monkeypatch):
    tokenizer = plain_tokenizer(50)
    la = language_posterior(prior_precision=3.0)
    contexts = ["a b c", "f", "", "c c c c c b"]
    requests = [(context, {"max_gen_toks": 4, "until": []}) for context in contexts]
    options = {"n_samples": 4, "max_length": 8, "batch_size": 3}
    own = LaplaceLM(la, tokenizer, **options)
    words = [text.split() for text in own.generate_until(instances("generate_until", requests))]
    stops = [words[0][2], words[1][0]]  # end texts at different steps
    requests += [(context, {"max_gen_toks": 4, "until": stops}) for context in contexts]
    requests.insert(3, ("b b", {"max_gen_toks": 2, "until": None}))
    options.pop("batch_size")
    alone, together, one, sizes = each_alone(la, requests, tokenizer, monkeypatch, **options)
    assert together == alone and len(set(together)) > 5
    assert one == [1] * 9 and sorted(sizes) == [1, 4, 4]
    assert together[5].split() == words[0][:2]


@pytest.mark.parametrize(
    "contexts", [["a b c", "a b", "d e f", "a b c d e f g h"], ["a b c d e", "d"]]
)
def test_requests_that_no_padding_may_join_run_with_those_of_their_length(contexts, monkeypatch):
    """Beyond 6 tokens the model has other rotary angles for a whole batch."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4}
    rope |= {"long_factor": [3.0] * 4, "original_max_position_embeddings": 6}
    torch.manual_seed(0)
    size = {**TINY, "original_max_position_embeddings": 6}
    base = Phi3ForCausalLM(Phi3Config(**size, initializer_range=0.3, rope_parameters=rope))
    model = excite(get_peft_model(base, LoraConfig(r=2, target_modules=["qkv_proj"]))).double()
    la = KronLoraLaplace(model, "language_modeling")
    la.fit(text_loader())
    requests = [(context, {"max_gen_toks": 4}) for context in contexts]
    place = (la, requests, plain_tokenizer(50), monkeypatch)
    alone, together, _, sizes = each_alone(*place, n_samples=4, max_length=32)
    assert together == alone and len(set(alone)) > 1
    lengths = Counter(len(context.split()) for context in contexts)
    assert sizes == [len(contexts), *(n for _, n in sorted(lengths.items(), reverse=True))]


@pytest.mark.parametrize("new", [8, 9, 256])
def test_generation_that_leaves_no_context_is_refused(model, new):
    short = LaplaceLM(model.posterior, model.tokenizer, n_samples=8, max_length=8)
    request = ("a b c d e f g h a b", {"max_gen_toks": new})
    with pytest.raises(ValueError, match=f"max_gen_toks={new} leaves no context"):
        short.generate_until(instances("generate_until", [request]))


@pytest.mark.slow
def test_a_multiple_choice_task_runs(model, tmp_path):
    import lm_eval

    rows = [
        {"question": "a b c", "choices": ["d", "e", "f"], "answer": 1},
        {"question": "h a", "choices": ["b c", "a", "g"], "answer": 0},
    ]
    path = tmp_path / "rows.json"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    }
    result = lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)
    pairs = [(row["question"], " " + choice) for row in rows for choice in row["choices"]]
    values = [value for value, _ in model.loglikelihood(instances("loglikelihood", pairs))]
    picks = [max(range(3), key=values[3 * n : 3 * n + 3].__getitem__) for n in range(2)]
    right = [pick == row["answer"] for pick, row in zip(picks, rows, strict=True)]
    assert result["results"]["choices"]["acc,none"] == sum(right) / 2
