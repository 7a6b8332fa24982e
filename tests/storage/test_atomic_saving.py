"""A folder holds a whole posterior at any moment: after a kill, and beside a writer."""

import fcntl
import json
import os
import threading
import time

import pytest
import torch

from laplace_lora import DiagLoraLaplace, FullLoraLaplace, KronLoraLaplace
from laplace_lora.storage import files, whole_files
from laplace_lora.storage.files import CONFIG, TENSORS
from support.batches import token_batch
from support.forgery import forge, forge_tensors
from support.models import peft_model
from support.posteriors import fitted

BATCH = token_batch((4, 2, 5), seed=3)


class Killed(BaseException):
    """What a kill looks like from inside: nothing is tidied up."""


def die_at(monkeypatch, moment):
    """End the process, in effect, at the given call that touches the disk."""
    calls = []

    def counted(name):
        function = getattr(os, name)

        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) == moment:
                monkeypatch.setattr(files.Path, "unlink", lambda *args, **kwargs: None)
                raise Killed
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, counted(name))


def make_old(path):
    before = time.time() - 2 * whole_files.NEW
    os.utime(path, (before, before))


@pytest.mark.parametrize("moment", [1, 2, 3, 4])
@pytest.mark.parametrize("first", [True, False])
def test_a_killed_save_leaves_the_earlier_posterior_or_the_new_one(
    tmp_path, monkeypatch, moment, first
):
    la = fitted()
    if not first:
        la.save_pretrained(tmp_path, precision="exact")
    before = la(BATCH)
    la.prior_precision = 0.01
    after = la(BATCH)
    assert not torch.equal(before, after)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, moment)
        la.save_pretrained(tmp_path, precision="exact")
    litter = [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
    assert len(litter) == 1
    if first and moment <= 2:
        with pytest.raises(FileNotFoundError):
            KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)
    else:
        again = KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)
        assert torch.equal(again(BATCH), after if moment > 2 else before)
    la.save_pretrained(tmp_path, precision="exact")
    assert litter[0].exists()  # as new as this, it might be another process's
    make_old(litter[0])
    la.save_pretrained(tmp_path, precision="exact")
    assert {path.name for path in tmp_path.iterdir()} == {TENSORS, CONFIG}


@pytest.mark.slow
def test_readers_beside_a_writer_see_whole_posteriors(tmp_path):
    la = fitted()
    la.save_pretrained(tmp_path, precision="exact")
    done, errors, read = threading.Event(), [], 0

    def write():
        for i in range(25):
            la.prior_precision = 1.0 + i
            la.save_pretrained(tmp_path, precision="exact")
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        try:
            files.read_files(tmp_path)
            read += 1
        except (OSError, ValueError) as error:
            errors.append(error)
    writer.join()
    assert not errors, errors[0]
    assert read > 25


def test_a_file_that_is_being_written_is_no_litter(tmp_path):
    other = tmp_path / f"{TENSORS}abc.tmp"
    other.write_bytes(b"half")
    make_old(other)
    with other.open("rb") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        fitted().save_pretrained(tmp_path, precision="exact")
        assert other.exists()
    fitted().save_pretrained(tmp_path, precision="exact")
    assert not other.exists()


def test_the_first_file_is_a_whole_by_itself(tmp_path):
    la = fitted()
    la.save_pretrained(tmp_path, precision="exact")
    (tmp_path / CONFIG).unlink()
    assert torch.equal(KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)(BATCH), la(BATCH))
    content = bytearray((tmp_path / TENSORS).read_bytes())
    content[-3] ^= 1
    (tmp_path / TENSORS).write_bytes(content)
    with pytest.raises(FileNotFoundError, match=r"laplace_config\.json is missing"):
        KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)


def test_another_alpha_is_another_adapter(tmp_path):
    model = peft_model("bert")
    la = fitted(model=model)
    la.save_pretrained(tmp_path, precision="exact")
    layer = next(m for m in model.modules() if isinstance(getattr(m, "scaling", None), dict))
    layer.scaling["default"] *= 40
    with pytest.raises(ValueError, match="configuration differs"):
        KronLoraLaplace.from_pretrained(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    for name in ("adapter_settings", "adapter_layers", "checksum"):  # as earlier versions wrote it
        del config[name]
    (tmp_path / CONFIG).write_text(json.dumps({**config, "checksum": files.checksum(config)}))
    KronLoraLaplace.from_pretrained(model, tmp_path)


@pytest.mark.parametrize("temperature", [0.0, -1.0, "x", None, [1.0]])
def test_a_forged_temperature_is_refused(tmp_path, temperature):
    la = fitted()
    la.save_pretrained(tmp_path, precision="exact")
    arguments = json.loads((tmp_path / CONFIG).read_text())["arguments"]
    forge(tmp_path, arguments={**arguments, "temperature": temperature})
    with pytest.raises(ValueError, match="temperature must be"):
        KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)


@pytest.mark.parametrize("key", ["class", "arguments", "backend", "output", "scalars", "weights"])
def test_a_missing_key_is_refused(tmp_path, key):
    la = fitted()
    la.save_pretrained(tmp_path, precision="exact")
    config = json.loads((tmp_path / CONFIG).read_text())
    del config[key], config["checksum"]
    (tmp_path / CONFIG).write_text(json.dumps({**config, "checksum": files.checksum(config)}))
    with pytest.raises(ValueError, match=key):
        KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)


@pytest.mark.parametrize("kind", [DiagLoraLaplace, FullLoraLaplace, KronLoraLaplace])
def test_a_negative_curvature_is_refused(tmp_path, kind):
    la = fitted(kind)
    la.save_pretrained(tmp_path, precision="exact")
    names = []

    def negate(tensors):
        name = next(n for n in tensors if n.endswith((".matrix", ".diagonal", ".trace")))
        names.append(name)
        tensors[name].neg_()

    try:
        forge_tensors(tmp_path, negate)
    except StopIteration:
        pytest.skip("this curvature is a root, which has no sign")
    with pytest.raises(ValueError, match="negative entries on its diagonal"):
        kind.from_pretrained(la.logits_model, tmp_path)


def test_files_are_readable_by_others_as_new_files_are(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    fitted().save_pretrained(tmp_path)
    modes = {(tmp_path / name).stat().st_mode for name in (TENSORS, CONFIG)}
    assert modes == {plain.stat().st_mode}
