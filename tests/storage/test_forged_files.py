"""Damaged, forged and hostile files are refused."""

import copy
import json
import pickle
import random
from pathlib import Path

import pytest
import torch

from laplace_lora import KronLoraLaplace
from laplace_lora.storage.archive import PRECISIONS
from laplace_lora.storage.files import CONFIG, TENSORS
from support.batches import loader, token_batch
from support.forgery import forge, forge_tensors
from support.posteriors import LOW, fitted
from support.references import assert_near
from support.uncovered import uncovered_model

BATCH = token_batch((4, 2, 5), seed=3)


@pytest.fixture(scope="module", params=PRECISIONS)
def saved(tmp_path_factory, request):
    la = fitted(**LOW)
    folder = tmp_path_factory.mktemp("saved")
    la.save_pretrained(folder, precision=request.param)
    la = KronLoraLaplace.from_pretrained(la.logits_model, folder)
    return la, {name: (folder / name).read_bytes() for name in (TENSORS, CONFIG)}


def folder_with(saved, tmp_path):
    for name, content in saved[1].items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_five_hundred_mutated_files_are_refused(saved, tmp_path):
    la, files = saved
    model = la.logits_model
    state = copy.deepcopy({n: p.detach().clone() for n, p in model.named_parameters()})
    before = la(BATCH)
    generator = random.Random(0)
    refused = 0
    for trial in range(500):
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
    assert refused > 475
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
        ({"parameters": None}, "is damaged"),
        ({"parameters": []}, "is damaged"),
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
    elif kind == "eight bits":
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    elif kind == "negative":
        tensors[name.replace("vectors", "values")].neg_()
    elif kind == "zero":
        tensors[name].zero_()
    elif kind == "prior":
        tensors["prior_precision"].neg_()
    else:
        tensors["prior_precision"] = torch.ones(7)


@pytest.mark.parametrize(
    "kind",
    [
        "nan",
        "shape",
        "missing",
        "extra",
        "integers",
        "eight bits",
        "negative",
        "zero",
        "prior",
        "lengths",
    ],
)
def test_forged_tensors_are_refused(saved, tmp_path, kind):
    folder = folder_with(saved, tmp_path)
    forge_tensors(folder, lambda tensors: corrupt(tensors, kind))
    with pytest.raises(ValueError, match="does not fit"):
        KronLoraLaplace.from_pretrained(saved[0].logits_model, folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_eigenvalues_in_a_coarse_dtype_are_widened(saved, tmp_path, dtype):
    folder = folder_with(saved, tmp_path)

    def change(tensors):
        coarse = {n: t.to(dtype) for n, t in tensors.items() if n.endswith((".values", "residual"))}
        tensors |= coarse

    forge_tensors(folder, change)
    again = KronLoraLaplace.from_pretrained(saved[0].logits_model, folder)
    assert_near(again(BATCH), saved[0](BATCH), 1e-2)
    again.fit(loader(), override=False)


@pytest.mark.parametrize("kind", ["negative", "square", "missing", "nan", "factors"])
def test_forged_diagonals_are_refused(kind, tmp_path):
    la = KronLoraLaplace(uncovered_model("dora"), "classification", uncovered="diag", **LOW)
    la.fit(loader())
    la.save_pretrained(tmp_path)

    def change(tensors):
        name = next(n for n in tensors if n.endswith(".diagonal"))
        if kind == "negative":
            tensors[name].neg_()
        elif kind == "square":
            tensors[name] = tensors[name].diag()
        elif kind == "nan":
            tensors[name][0] = torch.nan
        else:
            matrix = tensors.pop(name).diag()
            if kind == "factors":  # a dense block where a diagonal belongs
                stem = name.removesuffix("diagonal")
                eigen = {"matrix": matrix, "vectors": matrix.clone(), "values": matrix.diag()}
                tensors |= {stem + part: tensor for part, tensor in eigen.items()}
                tensors[stem + "residual"] = torch.zeros(()).double()

    forge_tensors(tmp_path, change)
    with pytest.raises(ValueError, match="does not fit"):
        KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)


@pytest.mark.parametrize("name", ["shift", "loss_gradient", "loss_gradient.scale", "sigma_noise"])
@pytest.mark.parametrize("kind", ["missing", "renamed"])
def test_a_posterior_without_one_of_its_tensors_is_refused(name, kind, tmp_path):
    la = fitted(**LOW)
    la.recentre(nll=0.8)
    la.save_pretrained(tmp_path)

    def change(tensors):
        tensor = tensors.pop(name)
        if kind == "renamed":
            tensors[f"{name}s"] = tensor

    forge_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=f"there should be .*'{name}'"):
        KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)


def test_a_missing_number_is_named(saved, tmp_path):
    folder = folder_with(saved, tmp_path)
    forge(folder, scalars={})
    with pytest.raises(ValueError, match="'covariance_scale' is missing"):
        KronLoraLaplace.from_pretrained(saved[0].logits_model, folder)
