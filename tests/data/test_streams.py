"""Streams: every example counts once, whoever reads it; what cannot be so is refused."""

import pytest
import torch
from torch.utils.data import DataLoader

from laplace_lora import FullLoraLaplace
from laplace_lora.data import streams
from laplace_lora.data.tally import KEPT, Tally, fingerprints
from support.batches import loader, token_batch, validation
from support.interruptions import Interrupted, Interruption
from support.models import peft_model
from support.references import assert_near
from support.rows_apart import CHOICES, choice_batch
from support.spawned import exit_codes
from support.streams import (
    PARTS,
    by_label,
    everything,
    examples,
    hugging_face,
    posterior,
    streamed,
    worker,
)

# Workers are forked, which newer versions of Python warn of where there are threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

WHOLE_STREAM = "each of the loader's 2 workers reads the whole stream, so every example came 2"


@pytest.fixture(scope="module")
def lists():
    """What lists of the same examples give."""
    return everything(lambda: loader(2), lambda: validation(2))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    assert exit_codes(worker, folder) == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_a_stream_gives_what_a_list_does(lists):
    data = list(validation().dataset)
    found = everything(lambda: streamed(), lambda: streamed(data))
    for call, value in lists.items():
        assert_near(found[call], value, 1e-9)


@pytest.mark.parametrize("kind", ["torch", "datasets"])
def test_workers_that_divide_a_stream(lists, kind):
    data = streamed(workers=2)
    if kind == "datasets":
        data = DataLoader(hugging_face(examples()), batch_size=2, num_workers=2)
    la = posterior(data)
    assert la.n_data == 7
    assert_near(la.log_marginal_likelihood(), lists["fit"], 1e-6)


@pytest.mark.slow
def test_workers_that_read_the_whole_stream_are_refused(monkeypatch):
    seen = []
    la = posterior(loader())
    original = type(la.structure).add

    def counted(structure, engine, sums, batch, *rest):
        seen.append(len(batch[1]))
        return original(structure, engine, sums, batch, *rest)

    monkeypatch.setattr(type(la.structure), "add", counted)
    data = examples(15)
    with pytest.raises(ValueError, match=WHOLE_STREAM):
        la.fit(streamed(data, 8, workers=2, divides=False))
    assert seen == [8]  # both workers' first batches were the same
    seen.clear()
    with pytest.raises(ValueError, match=WHOLE_STREAM):
        la.fit(streamed(data, 4, workers=2, divides=False, seeds=lambda worker: worker))
    assert len(seen) == 8 and la.n_data == 7
    with pytest.raises(ValueError, match="get_worker_info"):
        la.predict(streamed(data, 4, workers=2, divides=False))


def test_progress_without_a_total(capsys):
    la = posterior(loader())
    la.fit(streamed(), progress_bar=True)
    assert "Fitting the posterior: 4it" in capsys.readouterr().err
    la.predict(loader(2), progress_bar=True)
    assert "Predicting: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("after", [1, 3])
def test_a_fit_over_a_stream_goes_on(tmp_path, after):
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
    la = posterior(loader())
    expected = la(token_batch())
    for data in (streamed(), streamed(workers=2)):
        with pytest.raises(Interruption):
            la.fit(Interrupted(data, after), **options)
        la.fit(data, **options)
        assert_near(la(token_batch()), expected, 1e-9)
        assert not list(tmp_path.iterdir())


def test_a_fit_goes_on_only_with_the_same_data(tmp_path):
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
    la = posterior(loader())
    data = streamed(seeds=lambda _: 1)
    with pytest.raises(Interruption):
        la.fit(Interrupted(data, 3), **options)
    for other, said in (
        (streamed(seeds=lambda _: 2), "now gives other ones"),
        (streamed(examples(4), seeds=lambda _: 1), "now gives only 2"),
    ):
        with pytest.raises(ValueError, match=f"holds the sums of 3 batches, .* {said}"):
            la.fit(other, **options)
    la.fit(data, **options)
    assert la.n_data == 7


def test_rows_of_a_stream():
    """The exact posterior asks for the number of examples beforehand, where it is known."""
    la, one = (FullLoraLaplace(peft_model("bert"), "classification") for _ in range(2))
    la.fit(streamed())
    one.fit(loader(2))
    assert_near(la.log_marginal_likelihood(), one.log_marginal_likelihood(), 1e-9)


def test_a_stream_that_is_read_only_once():
    la = posterior(loader())
    once = streamed()
    rows = iter(list(once.dataset))
    once.dataset.__class__ = type("Once", (type(once.dataset),), {"__iter__": lambda _: rows})
    la.fit(once)
    assert la.n_data == 7
    with pytest.raises(ValueError, match="a stream that can be read only once has been read"):
        la.optimize_prior_precision(method="loo")


@pytest.mark.slow
@pytest.mark.parametrize("kind", PARTS)
def test_processes_count_every_example_once(lists, results, kind):
    la = posterior(loader())
    expected = by_label(la.predict(validation()))
    for count, evidence, rows in (found[kind] for found in results):
        assert count == 7
        assert_near(evidence, lists["fit"], 1e-6)
        assert_near(rows, expected, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["by rank", "dispatched"])
def test_every_call_takes_a_stream_that_is_dealt_out(lists, results, kind):
    for found in results:
        assert not isinstance(found[f"everything {kind}"], str), found[f"everything {kind}"]
        for call, value in lists.items():
            assert_near(found[f"everything {kind}"][call], value, 1e-4)
    assert_near(results[0][f"few {kind}"], results[1][f"few {kind}"])


@pytest.mark.slow
def test_a_trainer_of_several_processes_takes_streams(results):
    (count, nll, predicted), other = (found["trained"] for found in results)
    assert (count, predicted) == (7, 8)
    assert other == (count, nll, predicted)


@pytest.mark.slow
def test_a_stream_that_all_processes_read(lists, results):
    for found in results:
        count, evidence = found["alone"]
        assert count == 7
        assert_near(evidence, lists["fit"], 1e-9)
        assert found["empty"] == 7
    assert results[0]["only one"] == 7


@pytest.mark.slow
def test_a_stream_that_two_processes_count_is_refused(results):
    for found in results:
        assert "processes 0 and 1 read the same examples of the stream" in found["shuffled"]
        assert "split_dataset_by_node" in found["shuffled"] and found["kept"] == 7


@pytest.mark.slow
def test_an_example_that_cannot_be_read_ends_all(results):
    said = "ValueError: this example cannot be read"
    other = f"OtherProcessFailed: process 0 failed: {said}"
    for kind in ("by rank", "dispatched"):
        assert [found[f"unreadable {kind}"] for found in results] == [said, other]


def test_some_processes_with_the_same_examples_are_refused():
    stream = streamed()
    for heads in ([[1], [1], [2]], [[1], [1], []]):
        with pytest.raises(TypeError, match="some processes read the same examples"):
            streams.decide(stream, heads)
    for heads, dealt in (
        ([[1], [2]], True),
        ([[1], []], True),
        ([[1], [1]], False),
        ([[], []], False),
    ):
        streams.decide(stream, heads)
        assert streams.is_dealt(stream) is dealt


def test_a_tally_counts_a_sample_whatever_the_order():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(2**62, (5 * KEPT,), generator=generator).tolist()
    smallest = sorted(set(numbers))[:KEPT]
    found = []
    for order in (numbers + numbers, numbers[::-1] + numbers):
        tally = Tally()
        for start in range(0, len(order), 100):
            tally.add(order[start : start + 100])
        found.append(tally.sample)
        assert tally.came_by_each(2) and not tally.came_by_each(3)
    assert found[0] == found[1] == {(number, 2) for number in smallest}
    once = Tally()
    once.add([*numbers, numbers[0]])
    assert not once.came_by_each(2) and not Tally().came_by_each(2)


def test_padding_does_not_change_a_fingerprint():
    lengths = (3, 5, 2)
    expected = fingerprints(token_batch(lengths))
    assert len(set(expected)) == 3
    for options in ({"pad_to": 9}, {"side": "left"}):
        assert fingerprints(token_batch(lengths, **options)) == expected
    batch = token_batch(lengths)
    pair = fingerprints(({"input_ids": batch["input_ids"]}, batch["labels"]))
    assert len(pair) == 3 and pair != expected
    assert (
        fingerprints([torch.ones(2, 3), torch.tensor([0, 1])])[0]
        != fingerprints([torch.ones(2, 3), torch.tensor([1, 1])])[0]
    )
    uneven = {"pixels": torch.ones(5, 2), "sizes": torch.ones(2, 2)}
    assert len(fingerprints(uneven)) == 1


@pytest.mark.parametrize("name", ["input_ids", "inputs_embeds"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_nor_does_that_of_choices(side, name):
    def batch(pad_to, lengths=CHOICES):
        choices = choice_batch(lengths, pad_to, side)
        if name == "inputs_embeds":
            ids = choices.pop("input_ids")
            choices[name] = torch.stack([ids, -ids, 2 * ids], -1).double()
        return choices

    found = fingerprints(batch(7))
    assert len(set(found)) == len(CHOICES)
    assert fingerprints(batch(9)) == found


def test_a_token_belongs_to_its_choice():
    """The same tokens one after the other, in choices of other lengths."""
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]], [[1, 0, 0], [1, 1, 0]]])
    ids = torch.tensor([[[5, 6, 0], [7, 0, 0]], [[5, 0, 0], [6, 7, 0]]])
    one, other = fingerprints({"input_ids": ids, "attention_mask": mask})
    assert one != other


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 1, 4, 4)])
def test_masks_of_pairs_of_tokens_mark_no_padding(shape):
    """As many marks elsewhere are another mask, and none of them drops a token."""
    masks = torch.zeros(shape), torch.zeros(shape)
    for mask, at in zip(masks, (1, 2), strict=True):
        mask[..., at, 0] = 1
    ids = torch.arange(8).view(2, 4)
    first, second = (fingerprints({"input_ids": ids, "attention_mask": mask}) for mask in masks)
    assert not set(first) & set(second)
    changed = fingerprints({"input_ids": ids.flip(1), "attention_mask": masks[0]})
    assert not set(first) & set(changed)


@pytest.mark.parametrize("has_mask", [True, False])
def test_both_texts_of_an_encoder_decoder_tell_examples_apart(has_mask):
    """The decoder's text is read by its own mask, even where both are padded to one length."""

    def batch(decoder_pad):
        texts, decoder = token_batch((2, 3, 6)), token_batch((5, 6, 2), pad_to=decoder_pad, seed=3)
        texts["decoder_input_ids"] = decoder["input_ids"]
        if has_mask:
            texts["decoder_attention_mask"] = decoder["attention_mask"]
        return texts

    found = fingerprints(batch(6))
    if has_mask:
        assert fingerprints(batch(9)) == found
    changed = batch(6)
    changed["decoder_input_ids"][0, 4] += 1
    assert [a == b for a, b in zip(fingerprints(changed), found, strict=True)] == [
        False,
        True,
        True,
    ]
