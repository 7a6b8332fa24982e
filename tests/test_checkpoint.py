"""Saving, loading and merging posteriors; hostile files."""

import copy
import json
import pickle
import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save
from test_posterior import DENSE, LOW, loader
from torch.utils.data import DataLoader

from laplace_lora import (
    DiagLoraLaplace,
    DiagLoraLLLaplace,
    FullLoraLLLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LogitsModel,
    LoraEF,
    LoraGGN,
)
from laplace_lora.storage.files import CONFIG, TENSORS, checksum
from tiny import TARGETS, adalora_model, assert_near, base_model, excite, peft_model, token_batch

CASES = [
    (KronLoraLaplace, DENSE),
    (KronLoraLaplace, LOW),
    (DiagLoraLaplace, {}),
    (KronLoraLLLaplace, {}),
    (DiagLoraLLLaplace, {}),
    (FullLoraLLLaplace, {}),
]
BATCH = token_batch((4, 2, 5), seed=3)


def fitted(cls=KronLoraLaplace, model=None, **kwargs):
    la = cls(model or peft_model("bert"), "classification", **kwargs)
    la.fit(loader())
    la.optimize_prior_precision()
    return la


def forge(folder: Path, **changes) -> None:
    """Change the configuration and sign it again, as an attacker would."""
    config = json.loads((folder / CONFIG).read_text())
    config.pop("checksum")
    config.update(changes)
    (folder / CONFIG).write_text(json.dumps({**config, "checksum": checksum(config)}))


def forge_tensors(folder: Path, change) -> None:
    import hashlib

    tensors = load_file(folder / TENSORS)
    change(tensors)
    payload = save({name: t.contiguous() for name, t in tensors.items()})
    (folder / TENSORS).write_bytes(payload)
    forge(folder, tensors=hashlib.sha256(payload).hexdigest())


@pytest.mark.parametrize("cls,kwargs", CASES)
def test_a_posterior_comes_back_bit_for_bit(cls, kwargs, tmp_path):
    la = fitted(cls, **kwargs)
    la.calibrate(loader())
    before = la(BATCH)
    la.save_pretrained(tmp_path / "new" / "folder")
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {TENSORS, CONFIG}
    again = cls.from_pretrained(la.logits_model.model, tmp_path / "new" / "folder")
    assert torch.equal(again(BATCH), before)
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())
    assert torch.equal(again.prior_precision, la.prior_precision)
    assert again.arguments() == la.arguments()
    again.optimize_prior_precision(prior_structure="scalar")
    again.fit(loader(), override=False)
    assert again.n_data == 2 * la.n_data


def test_every_setting_comes_back(tmp_path):
    model = peft_model("llama-lm")
    la = KronLoraLaplace(
        model,
        "classification",
        target_ids=TARGETS,
        modules=["q_proj"],
        backend=LoraEF,
        backend_kwargs={"kfac_approx": "reduce"},
        temperature=0.7,
        prior_mean=0.1,
        **LOW,
    )
    la.fit(loader())
    la.prior_precision = torch.linspace(1, 2, la.n_layers)
    la.save_pretrained(tmp_path)
    again = KronLoraLaplace.from_pretrained(model, tmp_path)
    assert torch.equal(again(BATCH), la(BATCH))
    assert type(again.backend) is LoraEF and again.backend.rows.approximation == "reduce"
    assert again.n_params == la.n_params and again.temperature == 0.7
    assert again.prior_mean.item() == la.prior_mean.item() == 0.1


def test_regression_comes_back(tmp_path):
    la = KronLoraLaplace(peft_model("bert"), "regression", sigma_noise=0.5)
    la.fit(loader(likelihood="regression"))
    la.optimize_prior_precision(tune_sigma_noise=True)
    la.save_pretrained(tmp_path)
    again = KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)
    for ours, theirs in zip(again(BATCH), la(BATCH), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())


@pytest.mark.parametrize("kind", [peft_model, adalora_model])
def test_a_posterior_finds_its_adapter_loaded_from_disk(kind, tmp_path):
    model = kind("bert", dtype=torch.float32)
    la = fitted(model=model)
    before = la(BATCH)
    model.save_pretrained(tmp_path)
    la.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("bert"), tmp_path)
    again = KronLoraLaplace.from_pretrained(loaded, tmp_path)
    assert_near(again(BATCH), before)


def test_another_adapter_beside_it_does_no_harm(tmp_path):
    model = peft_model("bert", dtype=torch.float32, modules_to_save=None)
    la = fitted(model=model)
    la.save_pretrained(tmp_path)
    config = copy.deepcopy(model.peft_config["default"])
    model.add_adapter("other", config)
    model.set_adapter("default")
    again = KronLoraLaplace.from_pretrained(model, tmp_path)
    assert torch.equal(again(BATCH), la(BATCH))
    model.set_adapter("other")
    with pytest.raises(ValueError, match="is another adapter active"):
        KronLoraLaplace.from_pretrained(model, tmp_path)


def test_other_weights_and_bases_are_refused(tmp_path):
    model = peft_model("bert", modules_to_save=None)
    la = fitted(model=model, modules=["query"])
    la.save_pretrained(tmp_path)
    names = dict(model.named_parameters())
    query = next(p for n, p in names.items() if "query.lora_A" in n)
    value = next(p for n, p in names.items() if "value.lora_A" in n)
    base = names["base_model.model.bert.encoder.layer.1.output.dense.weight"]
    cases = [(query, "weights are not those"), (value, "other trained weights"), (base, "the base")]
    for tensor, message in cases:
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor.mul_(1.01)
        with pytest.raises(ValueError, match=message):
            KronLoraLaplace.from_pretrained(model, tmp_path)
        with torch.no_grad():
            tensor.copy_(kept)
    KronLoraLaplace.from_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="covers other tensors than the model trains"):
        KronLoraLaplace.from_pretrained(peft_model("bert", r=3, modules_to_save=None), tmp_path)
    with pytest.raises(ValueError, match=r"load it with KronLoraLaplace\.from_pretrained"):
        DiagLoraLaplace.from_pretrained(model, tmp_path)


def test_what_a_file_cannot_hold_is_refused(tmp_path):
    class Mine(LoraGGN):
        pass

    la = fitted(backend=Mine)
    with pytest.raises(TypeError, match="the backend Mine cannot be saved"):
        la.save_pretrained(tmp_path)
    with pytest.raises(AttributeError, match="not fitted"):
        KronLoraLaplace(peft_model("bert"), "classification").save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model = peft_model("bert")
    la = fitted(model=LogitsModel(model, output=lambda out: 2 * out.logits))
    la.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LogitsModel with an `output` callable"):
        KronLoraLaplace.from_pretrained(model, tmp_path)
    again = KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)
    assert torch.equal(again(BATCH), la(BATCH))


def test_missing_files_are_named(tmp_path):
    la = fitted()
    with pytest.raises(FileNotFoundError, match=r"laplace\.safetensors is missing"):
        KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder nor"):
        KronLoraLaplace.from_pretrained(la.logits_model, tmp_path / "nowhere")


def test_a_failed_save_leaves_the_earlier_one(tmp_path, monkeypatch):
    la = fitted()
    la.save_pretrained(tmp_path)
    content = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    la.prior_precision = 3.0
    with pytest.raises(OSError, match="disk full"):
        la.save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == content


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    la = fitted(**LOW)
    folder = tmp_path_factory.mktemp("saved")
    la.save_pretrained(folder)
    return la, {name: (folder / name).read_bytes() for name in (TENSORS, CONFIG)}


def folder_with(saved, tmp_path):
    for name, content in saved[1].items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_a_thousand_mutated_files_are_refused(saved, tmp_path):
    la, files = saved
    model = la.logits_model
    state = copy.deepcopy({n: p.detach().clone() for n, p in model.named_parameters()})
    before = la(BATCH)
    generator = random.Random(0)
    refused = 0
    for trial in range(1000):
        name = TENSORS if trial % 2 else CONFIG
        content = bytearray(files[name])
        kind = generator.choice(["flip", "cut", "grow", "zero"])
        at = generator.randrange(len(content))
        if kind == "flip":
            content[at] ^= 1 << generator.randrange(8)
        elif kind == "cut":
            del content[at:]
        elif kind == "grow":
            content[at:at] = bytes(generator.randrange(256) for _ in range(8))
        else:
            content[at : at + 16] = bytes(len(content[at : at + 16]))
        if content == files[name]:
            continue
        for other, original in files.items():
            (tmp_path / other).write_bytes(content if other == name else original)
        try:
            again = KronLoraLaplace.from_pretrained(model, tmp_path)
        except ValueError:
            refused += 1
        else:  # white space in JSON may change without a change of meaning
            assert name == CONFIG
            assert json.loads(content) == json.loads(files[name])
            assert torch.equal(again(BATCH), before)
    assert refused > 950
    assert torch.equal(la(BATCH), before)
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters())


class Evil:
    def __reduce__(self):
        return (Path("/nonexistent/evil").touch, ())


def test_a_pickle_with_the_right_name_is_not_executed(saved, tmp_path):
    import hashlib

    folder = folder_with(saved, tmp_path)
    payload = pickle.dumps(Evil())
    (folder / TENSORS).write_bytes(payload)
    with pytest.raises(ValueError, match="altered, truncated"):
        KronLoraLaplace.from_pretrained(saved[0].logits_model, folder)
    forge(folder, tensors=hashlib.sha256(payload).hexdigest())
    with pytest.raises(ValueError, match="does not fit"):
        KronLoraLaplace.from_pretrained(saved[0].logits_model, folder)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"version": 99}, "format version 99"),
        ({"version": "1"}, "not the configuration of a posterior"),
        ({"class": "../../etc/passwd"}, "load it with"),
        ({"backend": "os.system"}, "describes no posterior"),
        ({"arguments": {"likelihood": "classification", "path": "../x"}}, "describes no posterior"),
        ({"arguments": None}, "describes no posterior"),
        ({"curvature": [[0]]}, "does not fit"),
        ({"curvature": "../../x"}, "does not fit"),
        ({"scalars": {}}, "does not fit"),
        ({"weights": "0" * 64}, "weights are not those"),
        ({"parameters": {"/etc/passwd": [1]}}, "covers other tensors"),
    ],
)
def test_forged_configurations_are_refused(saved, tmp_path, changes, message):
    folder = folder_with(saved, tmp_path)
    forge(folder, **changes)
    with pytest.raises(ValueError, match=message):
        KronLoraLaplace.from_pretrained(saved[0].logits_model, folder)


@pytest.mark.parametrize("name", ["n_data", "loss", "covariance_scale", "likelihood_temperature"])
@pytest.mark.parametrize("value", [-1, "1", None, [2.0]])
def test_forged_scalars_are_refused(saved, tmp_path, name, value):
    folder = folder_with(saved, tmp_path)
    scalars = json.loads((folder / CONFIG).read_text())["scalars"]
    forge(folder, scalars={**scalars, name: value})
    with pytest.raises(ValueError, match="does not fit"):
        KronLoraLaplace.from_pretrained(saved[0].logits_model, folder)


def corrupt(tensors, kind):
    name = next(n for n in tensors if n.endswith(".vectors"))
    if kind == "nan":
        tensors[name][0, 0] = torch.nan
    elif kind == "shape":
        tensors[name] = tensors[name][:, :-1]
    elif kind == "missing":
        del tensors[name]
    elif kind == "extra":
        tensors["curvature.99.matrix"] = torch.eye(2)
    elif kind == "integers":
        tensors[name] = tensors[name].to(torch.int64)
    elif kind == "negative":
        tensors[name.replace("vectors", "values")].neg_()
    elif kind == "prior":
        tensors["prior_precision"].neg_()
    else:
        tensors["prior_precision"] = torch.ones(7)


@pytest.mark.parametrize(
    "kind", ["nan", "shape", "missing", "extra", "integers", "negative", "prior", "lengths"]
)
def test_forged_tensors_are_refused(saved, tmp_path, kind):
    folder = folder_with(saved, tmp_path)
    forge_tensors(folder, lambda tensors: corrupt(tensors, kind))
    with pytest.raises(ValueError, match="does not fit"):
        KronLoraLaplace.from_pretrained(saved[0].logits_model, folder)


def test_push_to_hub_uploads_both_files(monkeypatch):
    calls = {}

    class Api:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            calls["repo"] = (repo_id, private, exist_ok)

        def upload_folder(self, repo_id, folder_path, **kwargs):
            calls["files"] = {p.name for p in Path(folder_path).iterdir()}
            calls["kwargs"] = kwargs
            return "address"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    la = fitted()
    assert la.push_to_hub("me/adapter", token="t", private=True, revision="v1") == "address"
    assert calls["repo"] == ("me/adapter", True, True) and calls["token"] == "t"
    assert calls["files"] == {TENSORS, CONFIG}
    assert calls["kwargs"] == {"commit_message": "Upload Laplace posterior", "revision": "v1"}


def test_a_repository_name_is_looked_up_on_the_hub(monkeypatch, tmp_path):
    la = fitted()
    la.save_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name: tmp_path / name)
    again = KronLoraLaplace.from_pretrained(la.logits_model, "me/adapter")
    assert torch.equal(again(BATCH), la(BATCH))


@pytest.mark.parametrize("cls,kwargs", CASES)
def test_merged_posteriors_equal_one_fit(cls, kwargs):
    model = peft_model("bert")
    whole = fitted(cls, model, **kwargs)
    examples = loader().dataset
    parts = []
    for some in (examples[:2], examples[2:3], examples[3:]):
        la = cls(model, "classification", **kwargs)
        la.fit(DataLoader(some, batch_size=2))
        parts.append(la)
    parts[0].merge(parts[1:])
    assert parts[0].n_data == whole.n_data
    parts[0].prior_precision = whole.prior_precision
    assert_near(parts[0].log_marginal_likelihood(), whole.log_marginal_likelihood())
    assert_near(parts[0](BATCH), whole(BATCH))


def test_what_does_not_belong_together_is_not_merged():
    model = peft_model("bert")
    la = fitted(model=model)
    with pytest.raises(ValueError, match="one class with the same arguments"):
        la.merge([fitted(DiagLoraLaplace, model)])
    with pytest.raises(ValueError, match="one class with the same arguments"):
        la.merge([fitted(model=model, **LOW)])
    other = excite(peft_model("bert"), 0.2)
    with pytest.raises(ValueError, match="weights are not those"):
        la.merge([fitted(model=other)])
