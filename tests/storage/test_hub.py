"""Posteriors pushed to a hub, their model cards, and posteriors loaded from it."""

import re
import sys

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from peft import AutoPeftModelForSequenceClassification
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from laplace_lora import KronLoraLaplace, __version__
from laplace_lora.evaluation import MAP, evaluate
from laplace_lora.posteriors.card import loading_code
from laplace_lora.storage.files import CONFIG, TENSORS
from laplace_lora.storage.model_card import BEGIN, CARD, END, PICTURE, with_section
from support.batches import loader, token_batch
from support.hub import serving
from support.language import language_posterior
from support.on_disk import reviews, save_classifier, tokenizer
from support.posteriors import fitted

BATCH = token_batch((4, 2, 5), seed=3)
REPO = "me/adapter"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving(monkeypatch, tmp_path / "cache") as served:
        yield served


def card_of(hub):
    return hub.files[REPO][CARD].decode()


def test_a_posterior_goes_to_the_hub_and_comes_back(hub):
    la = fitted()
    address = la.push_to_hub(REPO, precision="exact", token="t", private=True)
    assert address.endswith(f"{REPO}/commit/{hub.sha(REPO)}")
    assert set(hub.files[REPO]) == {TENSORS, CONFIG, CARD}
    assert hub.commits[REPO] == ["Upload Laplace posterior"]
    again = KronLoraLaplace.from_pretrained(la.logits_model, REPO)
    assert torch.equal(again(BATCH), la(BATCH))


def test_tensors_alone_come_back_from_the_hub(hub):
    la = fitted()
    la.push_to_hub(REPO, precision="exact")
    del hub.files[REPO][CONFIG]
    loaded = KronLoraLaplace.from_pretrained(la.logits_model.model, REPO)
    assert torch.equal(loaded.mean, la.mean)


def test_what_lies_in_a_folder_of_a_repository_is_read_from_there(hub):
    la = fitted()
    la.push_to_hub(REPO, precision="exact")
    hub.files[REPO] = {f"mood/{name}": content for name, content in hub.files[REPO].items()}
    again = KronLoraLaplace.from_pretrained(la.logits_model, f"{REPO}/mood")
    assert torch.equal(again(BATCH), la(BATCH))
    with pytest.raises(FileNotFoundError, match="read as 'user/repository/folder'"):
        KronLoraLaplace.from_pretrained(la.logits_model, REPO)


@pytest.mark.parametrize("name", ["runs/exp 1", "runs/exp 1/final"])
def test_a_folder_that_is_not_there_and_no_repository(hub, name):
    model = fitted().logits_model.model
    with pytest.raises(FileNotFoundError, match=f"{name} is neither a folder nor the name"):
        KronLoraLaplace.from_pretrained(model, name)
    with pytest.raises(FileNotFoundError, match="there is no folder runs/one/final"):
        KronLoraLaplace.from_pretrained(model, "runs/one/final")


def test_what_the_hub_lacks_is_named(hub):
    la = fitted()
    model = la.logits_model.model
    with pytest.raises(FileNotFoundError, match="no repository of that name on the hub"):
        KronLoraLaplace.from_pretrained(model, "me/nothing")
    hub.create(REPO)
    with pytest.raises(FileNotFoundError, match=f"{REPO} has no {TENSORS}; was push_to_hub"):
        KronLoraLaplace.from_pretrained(model, REPO)


def test_the_card_says_what_it_is_and_how_it_was_tuned(hub):
    la = fitted()
    la.push_to_hub(REPO, commit_message="New posterior")
    card = card_of(hub)
    assert card.startswith("---\nlibrary_name: peft\n") and "# adapter" in card
    assert f"laplace_lora {__version__}" in card and str(la.tuning) in card
    for line in str(la).splitlines()[1:]:
        assert line.strip().partition(" ")[2].strip() in card
    assert f'KronLoraLaplace.from_pretrained(model, "{REPO}")' in card
    assert "Calibration" not in card and hub.commits[REPO] == ["New posterior"]


def test_the_rest_of_a_card_stays(hub):
    la = fitted()
    hub.create(REPO)
    hub.files[REPO][CARD] = "---\nlicense: mit\n---\n# Mine ü\n\nText \\1.\n".encode()
    la.push_to_hub(REPO)
    first = card_of(hub)
    assert first.startswith("---\nlicense: mit\n---\n# Mine ü\n\nText \\1.\n\n" + BEGIN)
    hub.files[REPO][CARD] += b"After.\n"
    la.prior_precision = 3.0
    la.push_to_hub(REPO)
    second = card_of(hub)
    assert second.count(BEGIN) == second.count(END) == 1 and second.endswith("After.\n")
    assert second.partition(BEGIN)[0] == first.partition(BEGIN)[0]
    assert "precision 3 around zero" in second and "precision 3 around zero" not in first


def test_reports_make_a_table_and_a_picture(hub):
    la = fitted()
    methods = {"MAP": MAP(la.logits_model), "Laplace": la}
    reports = [evaluate(m, loader(), name=n, bootstrap=5) for n, m in methods.items()]
    la.push_to_hub(REPO, report=reports)
    card = card_of(hub)
    assert "| on held-out data, ± standard error | MAP | Laplace |" in card
    values = [f"{r['NLL']:.3f} ± {r.errors['NLL']:.3f}" for r in reports]
    assert f"| NLL | {values[0]} | {values[1]} |" in card
    assert f"]({PICTURE})" in card and hub.files[REPO][PICTURE].startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_picture(hub, monkeypatch):
    la = fitted()
    report = evaluate(la, loader(), name="Laplace", bootstrap=5)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    la.push_to_hub(REPO, report=report)
    assert "| NLL |" in card_of(hub) and PICTURE not in card_of(hub)
    assert PICTURE not in hub.files[REPO]


def test_a_repository_that_changes_in_between_is_left_alone(hub, monkeypatch):
    la = fitted()
    la.push_to_hub(REPO)
    before = dict(hub.files[REPO])

    def meanwhile(*args):
        hub.commits[REPO].append("somebody else's")
        return with_section(*args)

    monkeypatch.setattr("laplace_lora.storage.hub.with_section", meanwhile)
    with pytest.raises(HfHubHTTPError, match="412"):
        la.push_to_hub(REPO)
    assert hub.files[REPO] == before


def test_nobody_s_folder_is_named(hub):
    la = fitted()
    config = la.logits_model.model.active_peft_config
    config.base_model_name_or_path = "google/some-base"
    la.push_to_hub(REPO)
    assert "google/some-base" in card_of(hub)
    config.base_model_name_or_path = "/home/somebody/base"
    la.push_to_hub(REPO)
    assert "somebody" not in card_of(hub)


def test_the_lines_in_the_card_load_it(tmp_path):
    folder = str(save_classifier(tmp_path))
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    la = KronLoraLaplace(model, "classification")
    words = tokenizer()
    rows = [{**words(r["text"]), "labels": r["label"]} for r in reviews(16, 0)]
    la.fit(DataLoader(rows, 4, collate_fn=DataCollatorWithPadding(words)))
    la.save_pretrained(folder, precision="exact")
    code = loading_code(la.fitted, folder)
    assert len([line for line in code.splitlines() if line]) == 5
    names = {"tokenizer": words}
    exec(code, names)
    assert torch.equal(names["found"].probs, la.predict(["..."], words).probs)


def test_the_lines_of_other_models():
    la = language_posterior()
    code = loading_code(la.fitted, REPO)
    assert "generate(la, " in code and "PeftModel.from_pretrained(base_model" in code
    la.logits_model.model.active_peft_config.task_type = "CAUSAL_LM"
    code = loading_code(la.fitted, REPO)
    assert re.search(r"AutoPeftModelForCausalLM\.from_pretrained\(\"me/adapter\"\)$", code, re.M)
