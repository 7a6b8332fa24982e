"""A fit resumed after an interruption equals one without, to the bit."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from laplace_lora import DiagLoraLaplace, FullLoraLaplace, KronLoraLaplace, LoraEF
from laplace_lora.fitting import snapshots
from laplace_lora.fitting.snapshots import point_out_other_counts
from laplace_lora.storage.identity import identity
from support.batches import loader, token_batch
from support.exact_posteriors import BOTH, NEW_BATCH, exact_posterior
from support.interruptions import Interrupted, Interruption, interrupted
from support.models import peft_model
from support.posteriors import DENSE, LOW

CASES = [(KronLoraLaplace, DENSE), (KronLoraLaplace, LOW), (DiagLoraLaplace, {})]
BATCH = token_batch((4, 2), seed=3)


def posterior(cls, **kwargs):
    return cls(peft_model("bert"), "classification", **kwargs)


@pytest.mark.parametrize("after", [1, 2, 3, 4])
@pytest.mark.parametrize("cls,kwargs", CASES)
def test_a_resumed_fit_equals_an_uninterrupted_one(cls, kwargs, after, tmp_path, monkeypatch):
    data = loader(2)
    straight = posterior(cls, **kwargs)
    straight.fit(data)
    first = posterior(cls, **kwargs)
    options = {"checkpoint_dir": tmp_path / "fit", "checkpoint_every": 1}
    if after < len(data):
        with pytest.raises(Interruption):
            first.fit(Interrupted(data, after), **options)
    else:  # after the last batch, before the posterior was made
        with monkeypatch.context() as patch, pytest.raises(Interruption):
            patch.setattr(type(first.structure), "ready", interrupted)
            first.fit(data, **options)
    with pytest.raises(AttributeError, match="not fitted"):
        first(BATCH)
    assert len(list((tmp_path / "fit").iterdir())) == 1
    seen = []
    second = posterior(cls, **kwargs)
    original = type(second.structure).add

    def counted(structure, engine, sums, batch, *rest):
        seen.append(len(batch[1]))
        return original(structure, engine, sums, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(type(second.structure), "add", counted)
        second.fit(data, **options)
    assert len(seen) == 1 + len(data) - after  # the first batch again, for the shape of the sums
    assert torch.equal(second(BATCH), straight(BATCH))
    assert torch.equal(second.state.loss_gradient, straight.state.loss_gradient)
    assert second.loss == straight.loss and second.n_data == straight.n_data
    assert not list((tmp_path / "fit").iterdir())


def test_what_is_kept_belongs_to_one_fit(tmp_path):
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
    with pytest.raises(Interruption):
        posterior(KronLoraLaplace, **LOW).fit(Interrupted(loader(2), 2), **options)
    with pytest.raises(ValueError, match="another model or with other arguments"):
        posterior(KronLoraLaplace, **DENSE).fit(loader(2), **options)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    la = posterior(KronLoraLaplace, **LOW)
    with pytest.raises(ValueError, match="is damaged"):
        la.fit(loader(2), **options)
    file.unlink()
    la.fit(loader(2), **options)
    with pytest.raises(ValueError, match="checkpoint_every must be positive"):
        la.fit(loader(2), checkpoint_dir=tmp_path, checkpoint_every=0)
    with pytest.raises(ValueError, match="checkpoint_every needs checkpoint_dir"):
        la.fit(loader(2), checkpoint_every=2)


def test_other_sums_than_this_version_s_are_refused(tmp_path):
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
    with pytest.raises(Interruption):
        posterior(KronLoraLaplace, **LOW).fit(Interrupted(loader(2), 2), **options)
    (file,) = tmp_path.iterdir()
    with safe_open(file, "pt") as opened:
        numbers = opened.metadata()
    tensors = {name: tensor.unsqueeze(0) for name, tensor in load_file(file).items()}
    save_file(tensors, file, numbers)
    with pytest.raises(ValueError, match="delete the files of its checkpoint_dir"):
        posterior(KronLoraLaplace, **LOW).fit(loader(2), **options)


def test_what_is_kept_is_of_one_backend(tmp_path):
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
    with pytest.raises(Interruption):
        posterior(KronLoraLaplace, backend=LoraEF).fit(Interrupted(loader(2), 2), **options)
    with pytest.raises(ValueError, match=r"its backend is .*\.LoraEF, this fit's .*\.LoraGGN"):
        posterior(KronLoraLaplace).fit(loader(2), **options)
    resumed, straight = (posterior(KronLoraLaplace, backend=LoraEF) for _ in range(2))
    resumed.fit(loader(2), **options)
    straight.fit(loader(2))
    assert torch.equal(resumed(BATCH), straight(BATCH))


def test_a_file_of_an_earlier_version_goes_on_with_the_default_backend(tmp_path):
    """It says neither which backend it is of nor what the buffers were."""
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
    first = posterior(KronLoraLaplace, **LOW)
    with pytest.raises(Interruption):
        first.fit(Interrupted(loader(2), 2), **options)
    (file,) = tmp_path.iterdir()
    with safe_open(file, "pt") as opened:
        numbers = opened.metadata()
    earlier = identity(first.parts, plain=False, by_name=False)
    earlier = {k: v for k, v in earlier.items() if k not in ("buffers", "order")}
    basis = json.loads(numbers["owner"])["basis"]
    numbers["owner"] = json.dumps(["KronLoraLaplace", first.arguments(), earlier, basis])
    save_file(load_file(file), file, metadata=numbers)
    with pytest.raises(ValueError, match=r"its backend is .*\.LoraGGN, this fit's .*\.LoraEF"):
        posterior(KronLoraLaplace, backend=LoraEF, **LOW).fit(loader(2), **options)
    resumed, straight = (posterior(KronLoraLaplace, **LOW) for _ in range(2))
    with torch.no_grad():
        resumed.params[0].mul_(2)
    with pytest.raises(ValueError, match="the weights are not those"):
        resumed.fit(loader(2), **options)
    with torch.no_grad():
        resumed.params[0].div_(2)
    resumed.fit(loader(2), **options)
    straight.fit(loader(2))
    assert torch.equal(resumed(BATCH), straight(BATCH))


def test_files_of_another_number_of_processes_are_pointed_out(tmp_path, recwarn):
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
    with pytest.raises(Interruption):
        posterior(KronLoraLaplace, **LOW).fit(Interrupted(loader(2), 2), **options)
    posterior(KronLoraLaplace, **LOW).fit(loader(2), **options)
    assert not any("interrupted" in str(each.message) for each in recwarn)  # its own
    of_two = [tmp_path / f"laplace_{name}_of_2.safetensors" for name in ("fit_0", "fit_1")]
    for path in (*of_two, tmp_path / "laplace_of_mine.safetensors"):
        path.write_bytes(b"sums")
    la, straight = posterior(KronLoraLaplace, **LOW), posterior(KronLoraLaplace, **LOW)
    said = r"interrupted in 2 processes: laplace_fit_0_of_2\.safetensors, laplace_fit_1_of_2\.saf"
    with pytest.warns(UserWarning, match=said) as heard:
        la.fit(loader(2), **options)
    assert len(heard) == 1 and heard[0].filename == __file__
    assert "This one runs in 1 process and cannot continue it" in str(heard[0].message)
    straight.fit(loader(2))
    assert torch.equal(la(BATCH), straight(BATCH))
    assert all(path.read_bytes() == b"sums" for path in of_two)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_main_process_alone_points_them_out(rank, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(snapshots, "processes", lambda: 2)
    monkeypatch.setattr(snapshots, "is_main", lambda: rank == 0)
    for name in ("0_of_1", "0_of_2", "0_of_3", "2_of_3"):
        (tmp_path / f"laplace_eigenvalues_{name}.safetensors").touch()
    point_out_other_counts(tmp_path)
    said = [str(each.message) for each in recwarn]
    assert len(said) == (rank == 0)
    assert all("in 1 process and 3 processes" in text and "0_of_2" not in text for text in said)


@pytest.mark.slow
def test_a_killed_process_leaves_something_to_resume(tmp_path):
    """SIGKILL between two batches; the file is whole, the result that of an uninterrupted fit."""
    script = textwrap.dedent(
        """
        import os, sys, time
        from laplace_lora import KronLoraLaplace
        from support.batches import loader
        from support.interruptions import Interrupted
        from support.models import peft_model
        from support.posteriors import LOW

        class Slow(Interrupted):
            def __iter__(self):
                for index, batch in enumerate(self.data):
                    if index == 3:
                        print("ready", flush=True)
                        time.sleep(600)
                    yield batch

        la = KronLoraLaplace(peft_model("bert"), "classification", **LOW)
        la.fit(Slow(loader(2), None), checkpoint_dir=sys.argv[1], checkpoint_every=1)
        """
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout.readline().strip() == b"ready"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    resumed, straight = posterior(KronLoraLaplace, **LOW), posterior(KronLoraLaplace, **LOW)
    resumed.fit(loader(2), checkpoint_dir=tmp_path)
    straight.fit(loader(2))
    assert torch.equal(resumed(BATCH), straight(BATCH))


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("cls,kwargs", [*BOTH, (FullLoraLaplace, {"storage": "disk"})])
def test_an_interrupted_fit_goes_on(cls, kwargs, after, tmp_path):
    data = loader(2)
    straight = exact_posterior(cls, fit=False, **kwargs)
    straight.fit(data)
    options = {"checkpoint_dir": tmp_path / "fit", "checkpoint_every": 1}
    with pytest.raises(Interruption):
        exact_posterior(cls, fit=False, **kwargs).fit(Interrupted(data, after), **options)
    again = exact_posterior(cls, fit=False, **kwargs)
    again.fit(data, **options)
    assert torch.equal(again(NEW_BATCH), straight(NEW_BATCH))
    assert again.n_data == straight.n_data and not list((tmp_path / "fit").iterdir())
