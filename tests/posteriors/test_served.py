"""Samples exported as adapters: PEFT serves them, and their width is chosen for that."""

import copy
import hashlib
import json

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import nn
from torch.utils.data import DataLoader

from laplace_lora import DiagLoraLaplace, FullLoraLaplace, KronLoraLaplace, KronLoraLLLaplace
from laplace_lora.storage.served_adapters import MANIFEST
from support.batches import loader, token_batch, validation
from support.language import language_posterior, text_batch, text_loader
from support.models import TARGETS, base_model, excite, peft_model
from support.multilabel import known, multilabel_batch, multilabel_posterior
from support.posteriors import LOW, fitted, posterior
from support.references import assert_near
from support.spans import question_loader, span_posterior
from support.tokens import tagged_batch, tagged_posterior

NO_WIDTH_HELPS = pytest.mark.filterwarnings("ignore:samples of no width")
BATCH = {k: v for k, v in token_batch((4, 2, 5), seed=3).items() if k != "labels"}


def served(folder, name="bert", dtype=torch.float64):
    """The exported adapters in a fresh model, by PEFT alone."""
    base = base_model(name).to(dtype)
    names = [adapter["name"] for adapter in json.loads((folder / MANIFEST).read_text())["adapters"]]
    model = PeftModel.from_pretrained(base, folder / names[0], adapter_name=names[0])
    for other in names[1:]:
        model.load_adapter(folder / other, adapter_name=other)
    return model.to(dtype).eval(), names


@torch.no_grad()
def answers(model, names, batch):
    """Each adapter's logits, ``(adapters, batch, classes)``."""
    found = []
    for name in names:
        model.set_adapter(name)
        found.append(model(**batch).logits)
    return torch.stack(found)


@torch.no_grad()
def sampled_by_hand(la, width, k, seed=0):
    """Logits of the posterior's own model, its weights overwritten and put back."""
    generator = torch.Generator().manual_seed(seed)
    half = la.fitted.deviations((k + 1) // 2, generator)
    kept = torch.nn.utils.parameters_to_vector(la.params)
    found = []
    for number in range(k):
        change = width**0.5 * half[number // 2] * (-1) ** number
        torch.nn.utils.vector_to_parameters(kept + change, la.params)
        found.append(la.logits_model.model.eval()(**BATCH).logits)
    torch.nn.utils.vector_to_parameters(kept, la.params)
    return torch.stack(found)


@pytest.mark.parametrize("name", ["bert", "llama-lm"])
@pytest.mark.parametrize("cls,kwargs", [(KronLoraLaplace, LOW), (FullLoraLaplace, {})])
def test_peft_serves_the_samples(cls, kwargs, name, tmp_path):
    """Heads in `modules_to_save` included; a batch may mix the adapters."""
    la = posterior(cls, name, **kwargs)
    export = la.export_adapters(tmp_path / "out", k=3, width=0.5)
    assert [p.name for p in export.adapters] == ["sample_0", "sample_1", "sample_2"]
    model, names = served(tmp_path / "out", name)
    found = answers(model, names, BATCH)
    assert_near(found, sampled_by_hand(la, 0.5, 3))
    assert float((found[0] - found[1]).abs().max()) > 1e-3
    order = [names[2], names[0], names[2]]
    with torch.no_grad():
        mixed = model(**BATCH, adapter_names=order).logits
    for row, adapter in enumerate(order):
        assert_near(mixed[row], found[names.index(adapter)][row])


def test_configuration_and_ranks_are_the_model_s_own(tmp_path):
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=2,
        lora_alpha=6,
        rank_pattern={"value": 3},
        use_rslora=True,
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
    )
    model = get_peft_model(base_model("bert"), lora).double()
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    la.export_adapters(tmp_path / "out", k=2, width=0.1)
    model.save_pretrained(tmp_path / "own")
    own, sampled = (
        json.loads((tmp_path / folder / "adapter_config.json").read_text())
        for folder in ("own", "out/sample_1")
    )
    for written in (own, sampled):
        written["target_modules"].sort()  # PEFT writes a set
    assert sampled == own
    assert own["rank_pattern"] == {"value": 3} and own["inference_mode"]
    model, _ = served(tmp_path / "out")
    assert model.peft_config["sample_0"].lora_alpha == 6
    shapes = {p.shape[0] for n, p in model.named_parameters() if "lora_A.sample_0" in n}
    assert shapes == {2, 3}


def test_an_adapter_of_another_name(tmp_path):
    lora = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    model = get_peft_model(base_model("bert"), lora, adapter_name="mine").double()
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    la.export_adapters(tmp_path / "out", k=2, width=0.5)
    model, names = served(tmp_path / "out")
    assert_near(answers(model, names, BATCH), sampled_by_hand(la, 0.5, 2))


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["query", "value"], feedforward_modules=[]),
        VeraConfig(target_modules=["query", "value"], r=4),
    ],
    ids=["ia3", "vera"],
)
def test_tuners_that_ignore_names_in_a_batch_are_pointed_out(config, tmp_path):
    """PEFT serves their samples one after the other, and answers a mixed batch with one."""
    model = excite(get_peft_model(base_model("bert"), config)).double()
    la = KronLoraLaplace(model, "classification", prior_precision=5.0, uncovered="diag")
    la.fit(loader())
    with pytest.warns(UserWarning, match="ignores `adapter_names`.*set_adapter"):
        la.export_adapters(tmp_path / "out", k=2, width=0.5)
    model, names = served(tmp_path / "out")
    assert_near(answers(model, names, BATCH), sampled_by_hand(la, 0.5, 2))
    repeated = {k: v.repeat(2, 1) for k, v in BATCH.items()}
    mixed = model(**repeated, adapter_names=[name for name in names for _ in range(3)]).logits
    first, second = mixed.chunk(2)
    assert_near(first, second)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_seed_reproduces_them(tmp_path):
    la = fitted()
    torch.manual_seed(1)
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        la.export_adapters(tmp_path / folder, k=3, width=0.5, seed=seed)
    again, first, other = (contents(tmp_path / folder) for folder in "bac")
    assert again == first and len(first) == 7
    assert (
        other["sample_0/adapter_model.safetensors"] != first["sample_0/adapter_model.safetensors"]
    )
    model, names = served(tmp_path / "a")
    weights = dict(model.named_parameters())
    for name, parameter in la.logits_model.model.named_parameters():
        if parameter.requires_grad:
            pair = [weights[name.replace("default", each)] for each in names[:2]]
            assert_near(sum(pair) / 2, parameter)


def test_the_manifest_says_what_they_are(tmp_path):
    la = posterior(name="llama-lm")
    la.calibrate(validation())
    export = la.export_adapters(tmp_path / "out", k=2, width=0.25)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["target_ids"] == TARGETS and manifest["likelihood"] == "classification"
    assert manifest["temperature"] == la.likelihood_temperature == export.temperature
    assert manifest["width"]["width"] == 0.25 and manifest["width"]["criterion"] == "given"
    assert manifest["seed"] == 0 and manifest["n_data"] == 7
    for adapter, path in zip(manifest["adapters"], export.adapters, strict=True):
        payload = (path / "adapter_model.safetensors").read_bytes()
        assert path.name == adapter["name"]
        assert hashlib.sha256(payload).hexdigest() == adapter["sha256"]
    assert "2 adapters in" in str(export) and "by given" in str(export)


def snapshot(la):
    model = la.logits_model.model
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    return state, modes, model.active_adapter, str(model.peft_config), list(model.peft_config)


def unchanged(la, before):
    after = snapshot(la)
    assert all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items())
    assert after[1:] == before[1:]


@NO_WIDTH_HELPS
@pytest.mark.parametrize("has_twin", [True, False])
def test_the_model_is_as_it_was(has_twin, tmp_path, monkeypatch):
    """Compiled and offloaded models have no twin: their own weights are overwritten meanwhile."""
    if not has_twin:
        monkeypatch.setattr("laplace_lora.models.changes.twins._has_twin", lambda model: False)
    la = fitted()
    la.logits_model.model.train()
    before = snapshot(la)
    la.export_adapters(tmp_path / "out", k=2, loader=validation())
    unchanged(la, before)
    la.export_adapters(tmp_path / "other", k=2)
    unchanged(la, before)
    kept = contents(tmp_path / "out")

    def fails(model, folder, calls=[]):  # noqa: B006
        calls.append(folder)
        if len(calls) == 2:
            raise OSError("disk full")
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"")

    monkeypatch.setattr("laplace_lora.storage.served_adapters.save_adapter", fails)
    monkeypatch.setattr("laplace_lora.storage.served_adapters._check_written", lambda *_: None)
    for folder in ("out", "new"):
        fails.__defaults__[0].clear()
        with pytest.raises(OSError, match="disk full"):
            la.export_adapters(tmp_path / folder, k=2, width=0.5)
    unchanged(la, before)
    assert {p.name for p in tmp_path.iterdir()} == {"out", "other"}
    assert contents(tmp_path / "out") == kept


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path):
    la = fitted()
    la.export_adapters(tmp_path / "out", k=3, width=0.5)
    la.export_adapters(tmp_path / "out", k=2, width=0.5)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"sample_0", "sample_1", MANIFEST}
    (tmp_path / "mine").mkdir()
    la.export_adapters(tmp_path / "mine", k=1, width=0.5)  # an empty folder is nobody's
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("one")
    with pytest.raises(FileExistsError, match="holds no exported adapters"):
        la.export_adapters(tmp_path / "thesis", k=2, width=0.5)
    assert contents(tmp_path / "thesis") == {"chapter.txt": b"one"}


def test_what_was_saved_into_an_export_stays(tmp_path):
    """The trained adapter and the posterior were deleted with the samples."""
    la, out = fitted(), tmp_path / "my-adapter"
    la.export_adapters(out, k=2, width=0.5)
    la.logits_model.model.save_pretrained(out)
    la.save_pretrained(out)
    kept = contents(out)
    with pytest.raises(
        FileExistsError, match=r"holds 'README\.md', 'adapter_config\.json', .* and 2 more beside"
    ):
        la.export_adapters(out, k=2, width=0.5)
    assert contents(out) == kept
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors"):
        (out / name).unlink()
    with pytest.raises(
        FileExistsError, match=r"'laplace\.safetensors', 'laplace_config\.json' beside"
    ):
        la.export_adapters(out, k=2, width=0.5)
    for name in ("laplace.safetensors", "laplace_config.json"):
        (out / name).unlink()
    (out / "sample_1" / "notes.txt").write_text("the best one")
    with pytest.raises(FileExistsError, match=r"holds 'sample_1/notes\.txt' beside"):
        la.export_adapters(out, k=2, width=0.5)
    (out / "sample_1" / "notes.txt").unlink()
    (out / MANIFEST).rename(out / "old.json")
    (out / MANIFEST).write_text("[]")
    with pytest.raises(FileExistsError, match="does not say which adapters were exported"):
        la.export_adapters(out, k=2, width=0.5)
    (out / "old.json").replace(out / MANIFEST)
    assert len(la.export_adapters(out, k=1, width=0.5).adapters) == 1


def batch_of(data):
    batches = list(data)
    return {key: torch.cat([b[key] for b in batches]) for key in batches[0]}


@pytest.mark.parametrize("seed", [0, 1])
def test_the_width_of_least_nll(seed, tmp_path):
    """Labels of which half are what the model finds least likely: it is far too sure."""
    la = fitted()
    la.prior_precision = 1.0
    batch = batch_of(validation())
    with torch.no_grad():
        order = la.logits_model.model.eval()(**{**batch, "labels": None}).logits.argsort(1)
    batch["labels"] = torch.where(torch.arange(len(order)) % 2 == 0, order[:, 0], order[:, -1])
    export = la.export_adapters(tmp_path / "out", k=8, loader=[batch], seed=seed)
    width = export.width
    model, names = served(tmp_path / "out")
    y = batch.pop("labels")

    def nll(logits):
        p = logits.softmax(-1).mean(0)
        return float(-p.gather(1, y.unsqueeze(1)).log().mean())

    assert width.criterion == "nll"
    assert width.value == pytest.approx(nll(answers(model, names, batch)), rel=1e-6)
    with torch.no_grad():
        alone = la.logits_model.model.eval()(**batch).logits
    assert width.reference == pytest.approx(nll(alone.unsqueeze(0)), rel=1e-6)
    assert width.value == min(value for _, value in width.tried) < width.reference
    for factor in (0.25, 4.0):  # no better on either side
        other = la.export_adapters(tmp_path / "o", k=8, width=factor * width.width, seed=seed)
        model, names = served(other.folder)
        assert nll(answers(model, names, batch)) > width.value - 1e-4


def test_the_width_of_the_linearised_entropy(tmp_path):
    la = fitted()
    data = [{k: v for k, v in batch.items() if k != "labels"} for batch in validation()]
    export = la.export_adapters(tmp_path / "out", k=4, loader=data)
    batch = batch_of(validation())
    del batch["labels"]
    linearised = torch.special.entr(la(batch)).sum(1).mean()
    model, names = served(tmp_path / "out")
    p = answers(model, names, batch).softmax(-1).mean(0)
    own = torch.special.entr(p).sum(1).mean()
    assert export.width.criterion == "entropy"
    assert export.width.reference == pytest.approx(float(linearised), rel=1e-6)
    assert export.width.value == pytest.approx(float(own), rel=1e-6)
    assert abs(own - linearised) <= 0.01 * linearised
    labelled = la.export_adapters(tmp_path / "o", k=4, loader=validation(), criterion="entropy")
    assert labelled.width == export.width
    without = [{**batch, "labels": None} for batch in data]
    assert la.export_adapters(tmp_path / "o", k=4, loader=without).width == export.width
    other = la.export_adapters(tmp_path / "o", k=4)  # on the training data
    assert other.width.criterion == "entropy" and other.width != export.width


@NO_WIDTH_HELPS
def test_a_temperature_is_part_of_both_sides(tmp_path):
    la = fitted()
    la.likelihood_temperature = 2.0
    export = la.export_adapters(tmp_path / "out", k=2, loader=validation())
    batch = batch_of(validation())
    y = batch.pop("labels")
    model, names = served(tmp_path / "out")
    p = (answers(model, names, batch) / 2).softmax(-1).mean(0)
    nll = float(-p.gather(1, y.unsqueeze(1)).log().mean())
    assert export.width.value == pytest.approx(nll, rel=1e-6)


def test_no_width_helps_where_the_labels_are_sure(tmp_path):
    la = fitted()
    batch = batch_of(validation())
    with torch.no_grad():
        batch["labels"] = la.logits_model.model.eval()(**{**batch, "labels": None}).logits.argmax(1)
    with pytest.warns(UserWarning, match="samples of no width predict the labels better"):
        width = la.export_adapters(tmp_path / "out", k=2, loader=[batch]).width
    assert width.reference < width.value <= width.reference + 0.0025
    assert all(v > width.reference + 0.0025 for w, v in width.tried if w > width.width)


@NO_WIDTH_HELPS
@pytest.mark.parametrize(("seed", "one_helps"), [(1, False), (5, True)])
def test_the_search_goes_on_where_a_rise_is_small(seed, one_helps, tmp_path):
    """The NLL rises from the narrowest width on, by next to nothing."""
    torch.manual_seed(0)
    la = language_posterior(prior_precision=3.0)
    texts = text_loader(batch=text_batch(seed=seed))
    width = la.export_adapters(tmp_path / "out", k=4, loader=texts).width
    tried = dict(width.tried)
    narrowest = sorted(tried)[:3]
    assert width.reference < tried[narrowest[0]] < tried[narrowest[1]] < tried[narrowest[2]]
    if one_helps:
        assert width.value == min(tried.values()) < width.reference - 0.01
    else:
        assert width.reference < width.value <= width.reference + 0.0025
        assert tried[4 * width.width] > width.reference + 0.0025


@NO_WIDTH_HELPS
def test_language_models_by_texts(tmp_path):
    la = language_posterior()
    export = la.export_adapters(tmp_path / "out", k=2, loader=text_loader())
    model, names = served(tmp_path / "out", "llama-lm")
    batch = text_batch()
    labels = batch.pop("labels")[:, 1:]
    log_p = answers(model, names, batch).softmax(-1).mean(0).log()[:, :-1]
    scored = labels != -100
    found = -log_p[scored].gather(1, labels[scored].unsqueeze(1)).mean()
    assert export.width.value == pytest.approx(float(found), rel=1e-5)
    with pytest.raises(ValueError, match="chosen by the NLL of labelled tokens"):
        la.export_adapters(tmp_path / "new", k=2)
    assert not (tmp_path / "new").exists()


def logistic(logits):
    return torch.stack([-logits, logits], -1).sigmoid().mean(0)


@NO_WIDTH_HELPS
@pytest.mark.parametrize("criterion", ["nll", "entropy"])
def test_labels_that_do_not_exclude_each_other(criterion, tmp_path):
    la = multilabel_posterior()
    batch = multilabel_batch()
    export = la.export_adapters(tmp_path / "out", k=3, loader=[batch], criterion=criterion)
    model, names = served(tmp_path / "out")
    counts, y = known(batch), batch.pop("labels")
    p = logistic(answers(model, names, batch))
    if criterion == "nll":
        found = -p[counts].gather(1, y[counts].long().unsqueeze(1)).log().mean()
    else:
        found = torch.special.entr(p).sum(-1).mean()
        q = la(batch)
        linearised = torch.special.entr(torch.stack([q, 1 - q])).sum(0).mean()
        assert export.width.reference == pytest.approx(float(linearised), rel=1e-6)
    assert export.width.value == pytest.approx(float(found), rel=1e-6)


@NO_WIDTH_HELPS
def test_token_classifiers_by_labelled_tokens(tmp_path):
    la = tagged_posterior()
    batch = tagged_batch()
    export = la.export_adapters(tmp_path / "out", k=2, loader=[batch])
    y = batch.pop("labels")
    logits = []
    for adapter in export.adapters:
        model = la.logits_model.model
        model.load_adapter(adapter, adapter_name=adapter.name)
        model.set_adapter(adapter.name)
        logits.append(model(**batch).logits.detach())
    model.set_adapter("default")
    p = torch.stack(logits).softmax(-1).mean(0)
    found = -p[y != -100].gather(1, y[y != -100].unsqueeze(1)).log().mean()
    assert export.width.value == pytest.approx(float(found), rel=1e-5)


def test_what_has_no_softmax_needs_a_width(tmp_path):
    la = DiagLoraLaplace(peft_model("bert"), "regression")
    la.fit(loader(likelihood="regression"))
    with pytest.raises(ValueError, match="likelihood='regression'"):
        la.export_adapters(tmp_path / "out", k=2)
    la.export_adapters(tmp_path / "out", k=2, width=0.5)
    model, names = served(tmp_path / "out")
    assert_near(answers(model, names, BATCH), sampled_by_hand(la, 0.5, 2))


def test_answers_in_texts_need_a_width(tmp_path):
    """Their two softmaxes are over tokens, a start's and an end's."""
    la = span_posterior()
    with pytest.raises(ValueError, match="likelihood='question_answering'"):
        la.export_adapters(tmp_path / "out", k=2, loader=question_loader())
    la.export_adapters(tmp_path / "out", k=2, width=0.5)
    assert (tmp_path / "out" / "sample_1" / "adapter_model.safetensors").is_file()


def test_refusals(tmp_path):
    la, out = fitted(), tmp_path / "out"
    data = validation()
    for arguments, message in [
        ({"k": 0}, "at least 1; got 0"),
        ({"width": -1.0}, "width must be positive"),
        ({"width": 0.5, "loader": data}, "either a `width`"),
        ({"width": 0.5, "criterion": "nll"}, "either a `width`"),
        ({"loader": data, "criterion": "ece"}, "criterion must be one of"),
        ({"criterion": "NLL"}, "criterion must be one of"),
        ({"loader": iter(data)}, "iterated over repeatedly"),
        ({"loader": []}, "no example to choose the width by"),
        ({"criterion": "nll"}, "labels that were trained on"),
        ({"loader": [BATCH], "criterion": "nll"}, "labels"),
    ]:
        with pytest.raises(ValueError, match=message):
            la.export_adapters(out, **arguments)
    la.save_pretrained(tmp_path / "saved")
    again = KronLoraLaplace.from_pretrained(la.logits_model, tmp_path / "saved")
    with pytest.raises(ValueError, match="not at hand"):
        again.export_adapters(out)
    with pytest.raises(AttributeError, match="not fitted"):
        KronLoraLaplace(peft_model("bert"), "classification").export_adapters(out)
    with pytest.raises(ValueError, match="KronLoraLLLaplace has a head of its own"):
        fitted(KronLoraLLLaplace).export_adapters(out, width=0.5)
    assert {p.name for p in tmp_path.iterdir()} == {"saved"}


def test_models_that_peft_does_not_write_are_refused_by_name(tmp_path):
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["query"]), base_model("bert"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    la = KronLoraLaplace(model.double(), "classification")
    la.fit(loader())
    with pytest.raises(TypeError, match="PeftModel, got BertForSequenceClassification"):
        la.export_adapters(tmp_path / "out", width=0.5)
    model = peft_model("bert")
    norm = next(m for m in model.modules() if isinstance(m, nn.LayerNorm))
    norm.weight.requires_grad_(True)
    la = KronLoraLaplace(model, "classification", uncovered="diag")
    la.fit(loader())
    with pytest.raises(ValueError, match=r"does not write '.*LayerNorm\.weight'"):
        la.export_adapters(tmp_path / "out", width=0.5)
    assert not list(tmp_path.iterdir())


def test_adapters_with_biases_are_refused():
    """PEFT loads one of them."""
    lora = LoraConfig(r=2, target_modules=["query"], bias="lora_only", task_type="SEQ_CLS")
    model = get_peft_model(base_model("bert"), lora).double().eval()
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    with pytest.raises(ValueError, match="bias='lora_only', and PEFT loads one such adapter"):
        la.export_adapters("never-made", k=2, width=1.0)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_starts_that_change_the_base_model_are_refused(start, tmp_path):
    """Two such adapters beside each other take their start from the base weights twice."""
    lora = LoraConfig(r=2, target_modules=["query"], init_lora_weights=start, task_type="SEQ_CLS")
    model = excite(get_peft_model(base_model("bert"), lora))
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}', which changes the base"):
        la.export_adapters(tmp_path / "out", width=0.5)
    kept = copy.deepcopy(model).unload()
    model.peft_config["default"].init_lora_weights = True
    export = la.export_adapters(tmp_path / "out", 2, width=1e-8)
    served = PeftModel.from_pretrained(kept, export.adapters[0], adapter_name="first")
    served.load_adapter(export.adapters[1], "second")
    for name in ("first", "second"):
        served.set_adapter(name)
        assert_near(served.eval()(**BATCH).logits, model.eval()(**BATCH).logits, 1e-3)


@NO_WIDTH_HELPS
@pytest.mark.parametrize("criterion", ["nll", "entropy"])
def test_pairs_of_inputs_and_labels_choose_the_width_of_mappings(criterion, tmp_path):
    la = posterior(name="bert", **LOW)
    pairs = [({k: v for k, v in b.items() if k != "labels"}, b["labels"]) for b in validation()]
    widths = [
        la.export_adapters(tmp_path / name, k=4, loader=data, criterion=criterion).width.width
        for name, data in (("maps", validation()), ("pairs", DataLoader(pairs, batch_size=None)))
    ]
    assert widths[0] == pytest.approx(widths[1], rel=1e-9)
