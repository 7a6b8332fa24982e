"""Answers by token, chat templates, and the tokens of texts."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from laplace_lora import KronLoraLaplace
from laplace_lora.commands.reading.plan import PLAN
from laplace_lora.generation import score
from laplace_lora.storage.files import CONFIG
from support.command_line import refused, run
from support.on_disk import CHAT, SIZES, WORDS, reviews, tokenizer, write_json_lines
from support.texts import stripping_tokenizer

ANSWERS = ("--target", "bad", "good")


def asked(row):
    return {"prompt": row["text"], "label": ("bad", "good")[row["label"]]}


def completed(n, seed):
    rows = reviews(n, seed)
    return [{"prompt": "the film was", "completion": f" {row['text'].split()[-1]}"} for row in rows]


@pytest.mark.parametrize("kind", ["decoder", "chat"])
def test_answers_by_token(posterior, data, made, kind):
    folder = posterior(kind, data("train", asked), *ANSWERS)
    result = run("predict", folder, "--data", data("test", asked), "-q")
    found = [json.loads(line)["probabilities"] for line in result.stdout.splitlines()]
    base = made(kind).parent / "base"
    words = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder)
    la = KronLoraLaplace.from_pretrained(model, folder)
    assert la.logits_model.target_ids.tolist() == words.convert_tokens_to_ids(["bad", "good"])
    texts = [row["text"] for row in reviews(20, 2)]
    if kind == "chat":
        texts = [f"user : {text} assistant :" for text in texts]
    expected = la.predict(texts, words).probs.tolist()
    assert [list(p.values()) for p in found] == [pytest.approx(p, abs=1e-5) for p in expected]


def test_answers_behind_a_template_are_those_of_its_conversations(tmp_path, data):
    words = stripping_tokenizer(("the", "film", "meal", "was", "user", ":", "bad", "good"))
    words.pad_token, words.chat_template = "<0x00>", CHAT.replace(" : ", " :\n")
    sizes = {**SIZES, "vocab_size": len(words), "max_position_embeddings": 64}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).eval()
    model.save_pretrained(tmp_path / "adapter")
    args = (tmp_path / "adapter", "--data", data("train", asked))
    said = run("fit", *args, *ANSWERS, "--labels-as", "names", "-q").stderr
    losses, answers = [], {}
    for row in map(asked, reviews(48, 0)):
        turn = [{"role": "user", "content": row["prompt"]}]
        prompt = words.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        start, whole = (
            words(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            for text in (prompt, prompt + row["label"])
        )
        assert whole[:, :-1].tolist() == start.tolist()
        answers[row["label"]] = int(whole[0, -1])
        losses.append((model(start).logits[0, -1], row["label"]))
    ids = [answers["bad"], answers["good"]]
    assert words.convert_ids_to_tokens(ids) == ["bad", "good"]
    assert "alone it would be the tokens '▁bad'" in said
    saved = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert saved["arguments"]["target_ids"] == ids
    targets = torch.tensor([ids.index(answers[label]) for _, label in losses])
    expected = F.cross_entropy(torch.stack([x for x, _ in losses])[:, ids], targets).item()
    run("evaluate", *args, "--out", tmp_path / "scores.json", "-q")
    (of_map, *_) = json.loads((tmp_path / "scores.json").read_text())
    assert of_map["values"]["NLL"] == pytest.approx(expected, rel=1e-5)


def test_the_chat_template_is_the_fit_s_unless_said_otherwise(posterior, data):
    folder = posterior("chat", data("train", asked), *ANSWERS)
    assert json.loads((folder / PLAN).read_text())["chat"] is True
    args = ("predict", folder, "--data", data("test", asked), "-q")
    with_template, without = run(*args).stdout, run(*args, "--no-chat").stdout
    assert with_template != without and run(*args, "--chat").stdout == with_template
    (folder / PLAN).unlink()
    assert "give --chat or --no-chat" in refused(*args)
    assert run(*args, "--chat").stdout == with_template


def test_messages_are_prompts(adapter, posterior, data):
    def message(row):
        turn = {"role": "user", "content": row["text"]}
        return {"messages": [turn], "label": row["label"]}

    folder = posterior("chat", data("train", message), *ANSWERS)
    result = run("predict", folder, "--data", data("test", message), "-q").stdout
    run("fit", folder, "--data", data("train", asked), *ANSWERS, "--overwrite", "-q")
    assert run("predict", folder, "--data", data("test", asked), "-q").stdout == result
    plain = adapter("decoder")
    refusal = refused("fit", plain, "--data", data("train", message), *ANSWERS)
    assert "the tokenizer has no chat template" in refusal
    run("fit", plain, "--data", data("train", asked), *ANSWERS, "-q")
    refusal = refused("predict", plain, "--data", data("test", asked), "--chat")
    assert "--chat: the tokenizer has no chat template" in refusal


def test_conversations_that_hold_their_answers_are_no_prompts(adapter, data):
    def conversation(row):
        turn = {"role": "user", "content": row["text"]}
        answer = {"role": "assistant", "content": ["bad", "good"][row["label"]]}
        return {"messages": [turn, answer], "label": row["label"]}

    folder = adapter("chat")
    told = data("train", conversation)
    message = refused("fit", folder, "--data", told, *ANSWERS)
    assert "row 1: the last message in its column 'messages' is the assistant's" in message
    assert refused("doctor", folder, "--data", told, *ANSWERS) == message
    run("fit", folder, "--data", data("train", asked), *ANSWERS, "-q")
    told = data("test", conversation)
    for command in ("predict", "evaluate"):
        args = (command, folder, "--data", told, "--text-field", "messages")
        assert refused(*args) == message
    run("fit", folder, "--data", told, "--text-field", "messages", "--overwrite", "-q")  # on texts
    assert refused("generate", folder, "--data", told) == message
    run("score", folder, "--data", told, "--top-k", 4, "-q")


def test_answers_must_be_single_known_tokens(adapter, data):
    folder = adapter("decoder")
    cases = {
        ("--target", "good"): "needs two answers or more",
        ("--target", "good", "very good"): "'very good' is 2 tokens",
        ("--target", "good", "marvellous"): "every answer must be one known token",
        ("--target", "good", "good"): "the same token",
        ("--target", "a", "b", "--labels", "a", "b"): "leave --labels out",
        ("--likelihood", "classification"): "name the answers by --target",
    }
    for args, message in cases.items():
        assert message in refused("fit", folder, "--data", data("train", asked), *args)


def test_a_prompt_that_is_too_long_is_refused(posterior, data, tmp_path):
    folder = posterior("decoder", data("train", asked), *ANSWERS)
    path = write_json_lines(tmp_path / "long.jsonl", [{"prompt": "the film was good " * 9}])
    assert "row 1 has 36 tokens, more than 24" in refused("predict", folder, "--data", path)


@pytest.fixture
def writer(adapter, tmp_path):
    folder = adapter("decoder")
    run("fit", folder, "--data", write_json_lines(tmp_path / "t.jsonl", completed(24, 0)), "-q")
    return folder


def test_score_is_the_python_call(writer, made, tmp_path):
    rows = completed(5, 1)
    path = write_json_lines(tmp_path / "x.jsonl", rows)
    result = run("score", writer, "--data", path, "--batch-size", 5, "-q", "--top-k", 4)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["text"] for row in found] == [f"{r['completion'].strip()} [EOS]" for r in rows]
    base = made("decoder").parent / "base"
    words = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), writer)
    la = KronLoraLaplace.from_pretrained(model, writer)
    ids = words([f"{r['prompt']}{r['completion']} [EOS]" for r in rows], return_tensors="pt")
    labels = ids["input_ids"].clone()
    labels[:, :3] = -100
    source = torch.Generator().manual_seed(0)
    expected = score(la, {**ids, "labels": labels}, top_k=4, generator=source)
    for row, other in zip(found, expected.to_dict(words)["texts"], strict=True):
        assert row["log_prob"] == pytest.approx(other["log_prob"], rel=1e-4)
        assert len(row["tokens"]) == 2
        assert row["tokens"][0]["mutual_information"] > 0


def test_texts_without_prompts_are_scored_whole(writer, data):
    result = run(
        "score", writer, "--data", data("test"), "--text-field", "text", "--top-k", 4, "-q"
    )
    first = json.loads(result.stdout.splitlines()[0])
    assert first["text"] == reviews(20, 2)[0]["text"].partition(" ")[2]  # nothing before the first


def test_a_text_of_one_token_has_an_empty_result_in_any_batch(writer, tmp_path):
    rows = [{"text": text} for text in ("the film was good", "the", "film")]
    path = write_json_lines(tmp_path / "x.jsonl", rows)
    args = ("score", writer, "--data", path, "--text-field", "text", "--top-k", 4, "-q")
    together, alone = (
        [json.loads(line) for line in run(*args, "--batch-size", size).stdout.splitlines()]
        for size in (3, 1)
    )
    assert [len(row["tokens"]) for row in alone] == [3, 0, 0]
    assert alone[1:] == together[1:] and list(alone[1]) == list(alone[0])
    assert alone[0]["log_prob"] == pytest.approx(together[0]["log_prob"], rel=1e-4)


def test_generate_writes_and_stops(writer, tmp_path):
    out = tmp_path / "written.jsonl"
    path = write_json_lines(tmp_path / "x.jsonl", [{"prompt": "the film was"}] * 3)
    args = ("generate", writer, "--data", path, "--max-new-tokens", 3, "--top-k", 9, "-q")
    run(*args, "--out", out, "--batch-size", 2)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(found) == 3 and all(1 <= len(row["tokens"]) <= 3 for row in found)
    assert found[0] == found[1] and not found[0]["stopped"]
    (stopped, *_) = run(*args, "--stop-above", 0).stdout.splitlines()
    assert json.loads(stopped)["stopped"] and len(json.loads(stopped)["tokens"]) == 1
    drawn = [run(*args, "--do-sample", "--seed", seed).stdout for seed in (0, 1, 2, 3)]
    assert len(set(drawn)) > 1


@pytest.mark.slow
def test_equal_prompts_are_continued_differently_in_different_batches(writer, tmp_path):
    path = write_json_lines(tmp_path / "x.jsonl", [{"prompt": "the film"}] * 6)
    args = ("generate", writer, "--data", path, "--max-new-tokens", 3, "--top-k", 9, "-q")
    args = (*args, "--batch-size", 1)
    drawn = run(*args, "--do-sample").stdout
    texts = [json.loads(line)["text"] for line in drawn.splitlines()]
    assert len(set(texts)) > 3 and run(*args, "--do-sample").stdout == drawn
    assert len(set(run(*args).stdout.splitlines())) == 1


def test_conversations_are_scored_in_the_last_message(posterior, data):
    def conversation(row):
        *words, last = row["text"].split()
        turn = {"role": "user", "content": " ".join(words)}
        return {"messages": [turn, {"role": "assistant", "content": last}]}

    folder = posterior("chat", data("train", conversation))
    result = run("score", folder, "--data", data("test", conversation), "--top-k", 4, "-q")
    tokens = json.loads(result.stdout.splitlines()[0])["tokens"]
    assert [t["text"] for t in tokens] == [f" {reviews(20, 2)[0]['text'].split()[-1]}", " [EOS]"]
    question = data("test", lambda row: {"messages": conversation(row)["messages"][:1]})
    assert "last message is not the assistant's" in refused("score", folder, "--data", question)
    run("generate", folder, "--data", question, "--max-new-tokens", 1, "--top-k", 4, "-q")


@pytest.mark.slow
def test_prompts_after_a_fit_on_messages_go_through_the_chat_template(adapter, data, tmp_path):
    def turns(row):
        return [{"role": "user", "content": row["prompt"]}]

    def messages(row):
        answer = {"role": "assistant", "content": row["completion"].strip()}
        return {"messages": [*turns(row), answer]}

    folder, rows = adapter("chat"), completed(24, 0)
    run("fit", folder, "--data", write_json_lines(tmp_path / "f.jsonl", map(messages, rows)), "-q")
    plan = json.loads((folder / PLAN).read_text())
    assert plan["chat"] is True
    told = write_json_lines(tmp_path / "m.jsonl", map(messages, rows[:3]))
    plain = write_json_lines(tmp_path / "p.jsonl", rows[:3])
    scored = ("score", folder, "--top-k", 4, "-q", "--data")
    expected, prompts = run(*scored, told).stdout, (plain, "--text-field", "prompt")
    assert run(*scored, *prompts).stdout == expected != run(*scored, *prompts, "--no-chat").stdout
    asked = write_json_lines(tmp_path / "a.jsonl", [{"messages": turns(r)} for r in rows[:3]])
    written = ("generate", folder, "--max-new-tokens", 2, "--top-k", 4, "-q", "--data")
    assert run(*written, *prompts).stdout == run(*written, asked).stdout
    message = refused("score", folder, "--data", data("test"), "--text-field", "text")
    assert "--no-chat scores plain texts" in message
    (folder / PLAN).write_text(json.dumps({**plan, "chat": False}))  # of an earlier version
    assert run(*scored, *prompts).stdout == run(*scored, *prompts, "--no-chat").stdout
    run("fit", folder, "--data", told, "--no-chat", "--overwrite", "-q")
    assert json.loads((folder / PLAN).read_text())["chat"] is False


def test_commands_that_do_not_fit_the_model(writer, posterior, data):
    assert "laplace-lora score" in refused("predict", writer, "--data", data("test", asked))
    message = refused("evaluate", writer, "--data", data("test", asked))
    assert "`laplace-lora score` gives each token's probability" in message
    folder = posterior("classifier", data("train"))
    assert "by causal language models" in refused("score", folder, "--data", data("test"))


def test_data_for_texts(adapter, data, tmp_path):
    folder = adapter("chat")
    only_text = data("train", lambda row: {"text": row["text"]})
    run("fit", folder, "--data", only_text, "-q")
    assert json.loads((folder / PLAN).read_text())["chat"] is False
    message = refused("fit", folder, "--data", only_text, "--chat", "--overwrite")
    assert "needs to know the answer" in message


@pytest.mark.parametrize("saved_from_python", [False, True])
def test_commands_for_classes_name_the_one_for_tokens(writer, tmp_path, saved_from_python):
    if saved_from_python:
        (writer / PLAN).unlink()
    args = (writer, "--data", write_json_lines(tmp_path / "x.jsonl", completed(5, 1)))
    for option in ((), ("--labels", "bad", "good"), ("--labels-as", "names")):
        said = refused("evaluate", *args, *option)
        assert "this is a language_modeling posterior. `laplace-lora score` gives each" in said
    for option in ((), ("--labels", "bad", "good")):
        assert "says which tokens it is unsure of" in refused("predict", *args, *option)


def test_language_models_are_not_calibrated(adapter, data):
    texts = data("train", lambda row: {"prompt": row["text"], "completion": " good"})
    message = refused("fit", adapter("decoder"), "--data", texts, "--val", texts)
    assert "--val: a language_modeling posterior cannot be calibrated" in message


def test_a_small_vocabulary_is_compared_as_a_whole(writer, tmp_path):
    path = write_json_lines(tmp_path / "x.jsonl", completed(2, 1))
    for command, more in (("score", ()), ("generate", ("--max-new-tokens", 1))):
        args = (command, writer, "--data", path, "-q", *more)
        assert run(*args).stdout == run(*args, "--top-k", SIZES["vocab_size"]).stdout
        assert "--top-k 17: the vocabulary has 16 tokens" in refused(*args, "--top-k", 17)


def test_no_text_goes_on_beyond_the_model_s_positions(tmp_path):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
    config = GPT2Config(vocab_size=len(WORDS), eos_token_id=2, bos_token_id=2, **sizes)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    folder, rows = tmp_path / "adapter", [{"text": "the film was"}, {"text": "the"}] * 4
    run("fit", folder, "--data", write_json_lines(tmp_path / "x.jsonl", rows), "-q")
    args = ("generate", folder, "--data", tmp_path / "x.jsonl", "-q", "--max-new-tokens")
    message = refused(*args, 12)
    assert "--max-new-tokens 12: the model has positions for 8 tokens" in message
    assert "the longest prompt has 3; give 6 or less" in message
    assert len(json.loads(run(*args, 6).stdout.splitlines()[0])["tokens"]) == 6
    assert "give 6 or less" in refused(*args, 7)
