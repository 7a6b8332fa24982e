"""Models sharded by `fully_shard`, in two processes: what the whole model gives in one."""

import signal

import pytest
import torch

from laplace_lora import KronLoraLaplace
from laplace_lora.data.sharding import refuse_tensor_parallel
from support.batches import loader
from support.dealt import cases, said_of
from support.models import base_model, peft_model
from support.posteriors import LOW
from support.references import assert_near
from support.sharded import (
    BATCH,
    KINDS,
    everything,
    language,
    last_layer,
    process,
    said_by,
    worker,
)
from support.spawned import exit_codes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    names = {"llama": "whole", "llama-lm": "whole language model"}
    found = {name: everything(peft_model(name), folder / at)[0] for name, at in names.items()}
    return folder, found


@pytest.fixture(scope="module")
def results(whole):
    folder = whole[0]
    base_model("llama-lm").save_pretrained(folder / "plain")
    assert exit_codes(worker, folder) == [0, -signal.SIGKILL]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_model_gives_what_the_whole_one_does(whole, results, kind):
    expected = whole[1][KINDS[kind].get("name", "llama")]
    for found in results:
        assert list(found[kind]) == list(expected)
        for call, value in expected.items():
            assert_near(found[kind][call], value, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_serves_sharded_and_whole_models(whole, results, kind):
    name = KINDS[kind].get("name", "llama")
    la = KronLoraLaplace.from_pretrained(peft_model(name), whole[0] / kind)
    assert_near(la(BATCH), whole[1][name]["loaded"], 1e-6)
    for found in results:
        assert_near(found["elsewhere"], whole[1]["llama"]["loaded"], 1e-6)


def test_a_gaussian_process_takes_data_that_are_dealt_out(results):
    la = process(peft_model("llama"))
    la.fit(loader())
    expected = said_by(la)
    for found in results:
        for said in found["processes"]:
            assert_near(said, expected, 1e-6)


def test_a_language_model_in_pieces(results):
    expected, _, _ = language(peft_model("llama-lm"))
    for found in results:
        for call, value in expected.items():
            assert_near(found["language"][call], value, 1e-6)
        assert "use method='exact'" in found["by samples"]
    for one, other in zip(*(found["drawn"] for found in results), strict=True):
        assert torch.equal(one, other)


def test_a_last_layer_of_a_model_in_pieces_is_scored_on_data_that_are_dealt_out(results):
    expected = last_layer(peft_model("llama"))
    for found in results:
        assert_near(found["last layer"], expected)


def test_what_sharded_models_cannot_do_is_refused(results):
    for rank, found in enumerate(results):
        refused = found["refusals"]
        assert "give every process all the data, in the same order" in refused["dealt"]
        assert "compiled, offloaded or sharded, cannot be copied" in refused["sampled"]
        said = "ValueError: this example cannot be read"
        other = f"OtherProcessFailed: process 1 failed: {said}"
        assert refused["broken"] == (said if rank else other)
        assert refused["kept"]


def test_a_fit_of_shared_data_goes_on(whole, results):
    """Each process continues after other batches, in step with the other."""
    for rank, found in enumerate(results):
        said, files, evidence = found["resumed"]
        assert said == (
            "OtherProcessFailed: process 0 failed: Interruption: " if rank else "Interruption: "
        )
        assert files == 2
        assert_near(evidence, whole[1]["llama"]["fit"], 1e-6)


@pytest.mark.parametrize("case", cases())
def test_batches_that_differ_give_what_one_process_finds(results, case):
    """One process alone meets padding, several examples or images first, or longer texts."""
    expected = said_of(case)
    for found in results:
        assert list(found["dealt"][case]) == list(expected)
        for call, value in expected.items():
            assert_near(found["dealt"][case][call], value, 1e-6)


def test_processes_that_take_other_passes_say_so(results):
    for found in results:
        said, kept = found["surprised"]["more"]
        assert said.startswith("RuntimeError: the processes do different things (process 0: ")
        assert said.endswith("give every process all the data, in the same order")
        assert kept


def test_a_failure_between_two_passes_ends_all(results):
    for rank, found in enumerate(results):
        said, kept = found["surprised"]["fails"]
        error = "ValueError: no luck"
        assert said == (error if rank else f"OtherProcessFailed: process 1 failed: {error}")
        assert kept


def test_a_process_that_dies_in_a_pass_ends_the_others_at_once(whole, results):
    killing = torch.load(whole[0] / "killing.pt")
    assert killing["said"] == "ProcessLost: another process has ended or cannot be reached"
    assert killing["seconds"] < 60 and killing["kept"]


def test_weights_that_change_in_one_piece_are_noticed(results):
    for found in results:
        assert "have changed since the posterior was fitted" in found["changed"]


def test_a_policy_of_mixed_precision_is_followed(results):
    la = KronLoraLaplace(peft_model("llama", dtype=torch.float32), "classification", **LOW)
    la.fit(loader())
    expected = la(BATCH)
    for found in results:
        error, probs = found["half precision"]
        assert error is None
        assert (probs - expected).abs().max() < 0.05


def test_tensor_parallel_plans_are_refused(results):
    for found in results:
        for said in found["tensor parallel"]:
            assert "TypeError: the model's layers are divided among processes by a tensor" in said
    model = peft_model("llama")
    model.get_base_model()._tp_size = 2
    with pytest.raises(TypeError, match="tensor-parallel plan"):
        refuse_tensor_parallel(model)
