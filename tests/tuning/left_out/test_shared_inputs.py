"""Examples that share an input are left out together."""

from itertools import combinations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from laplace_lora.data.distributed import ALONE
from laplace_lora.models.read_columns import ReadColumns
from laplace_lora.tuning.left_out import shared_inputs
from laplace_lora.tuning.left_out.report import LeaveOneOut
from laplace_lora.tuning.left_out.shared_inputs import SharedInputs, standard_error
from support.batches import split_rows, token_batch
from support.models import peft_model
from support.posteriors import posterior
from support.preferences import reward_posterior
from support.rows_apart import CHOICES, choice_batch

SIDES = ("chosen", "rejected")
LENGTHS = (3, 6, 4, 6, 5, 2)


def texts(rows, width):
    """A batch of texts padded to a width."""
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": real}


def companions_of(*batches):
    inputs = SharedInputs("labels")
    for batch in batches:
        y = torch.arange(len(next(x for name, x in batch.items() if "mask" in name)))
        inputs.add({**batch, "labels": y}, y)  # the labels differ
    return inputs.companions(ALONE)


def test_texts_that_come_again_whatever_their_padding_and_label():
    first, second = texts([[5, 6], [7], [8, 9, 3]], 3), texts([[7], [5, 6], [1], [7]], 6)
    found = companions_of(first, second)
    assert found == {0: [0, 4], 4: [0, 4], 1: [1, 3, 6], 3: [1, 3, 6], 6: [1, 3, 6]}
    assert companions_of(texts([[5, 6], [7]], 2), texts([[8]], 1)) == {}


def test_questions_that_come_again_padded_to_another_length():
    found = companions_of(choice_batch(), choice_batch(CHOICES[:2], pad_to=9))
    assert found == {0: [0, 5], 5: [0, 5], 1: [1, 6], 6: [1, 6]}


def test_pairs_that_share_a_text():
    """A text that wins here and loses there; companions of companions are not left out."""

    def pairs(chosen, rejected):
        both = {"chosen": texts(chosen, 3), "rejected": texts(rejected, 4)}
        return {f"{key}_{side}": t for side, half in both.items() for key, t in half.items()}

    found = companions_of(pairs([[5], [6], [4]], [[6], [7], [9]]), pairs([[7]], [[8]]))
    assert found == {0: [0, 1], 1: [0, 1, 3], 3: [1, 3]}


def test_batches_whose_rows_are_no_examples_share_nothing():
    inputs = SharedInputs("labels")
    odd = {"input_ids": torch.zeros(2, 3), "sizes": torch.zeros(5)}
    inputs.add(odd, torch.zeros(2))
    inputs.add(odd, torch.zeros(2))
    assert inputs.companions(ALONE) == {} and not inputs.is_known


@pytest.mark.parametrize("make", [texts, lambda rows, width: choice_batch(CHOICES[:2], width)])
def test_a_row_of_positions_for_all_is_that_of_each(make):
    """As far as its tokens are real; other positions make another input."""

    def batch(width, start=0):
        made = make([[5, 6], [7]], width)
        made.pop("labels", None)
        return {"position_ids": torch.arange(start, start + width)[None], **made}

    found = companions_of(batch(6), batch(8), batch(6, start=1))
    assert found == {0: [0, 2], 2: [0, 2], 1: [1, 3], 3: [1, 3]}


class Numbered(nn.Module):
    """A model that takes the mapping itself, and one that names nothing."""

    def __init__(self, takes_any):
        super().__init__()
        self.forward = self.of_any if takes_any else self.of_mapping

    def of_mapping(self, batch):
        return batch["x"]

    def of_any(self, **batch):
        return batch["x"]


def test_columns_that_the_model_may_read():
    columns = {"input_ids", "attention_mask", "token_type_ids", "adapter_names", "idx", "labels"}
    assert ReadColumns(peft_model("bert"))(columns) == columns - {"idx", "labels"}
    inner = {"input_ids", "cu_seq_lens_q", "idx", "hidden_states"}  # named by modules inside
    assert "hidden_states" in ReadColumns(peft_model("llama"))(inner)
    for takes_any in (False, True):
        assert ReadColumns(Numbered(takes_any))({"x", "idx"}) == {"x", "idx"}


@pytest.mark.parametrize("is_pairs", [False, True])
def test_columns_that_the_model_does_not_read_hide_no_copy(is_pairs):
    def batch(first):
        rows = texts([[5, 6], [7]], 3)
        if is_pairs:
            rows = {f"{name}_{side}": x for name, x in rows.items() for side in SIDES}
            rows["idx_chosen"] = rows["idx_rejected"] = torch.arange(first, first + 2)
        return {**rows, "idx": torch.arange(first, first + 2), "sizes": torch.zeros(5)}

    inputs = SharedInputs("labels", ReadColumns(peft_model("bert")), keep_pairs=True)
    for first in (0, 2):
        inputs.add(batch(first), torch.arange(2))
    assert inputs.companions(ALONE) == {0: [0, 2], 2: [0, 2], 1: [1, 3], 3: [1, 3]}


@pytest.mark.parametrize("extra", ["idx", "position_ids"])
def test_leave_one_out_finds_copies_beside_other_columns(extra):
    rows, n = token_batch(LENGTHS), len(LENGTHS)

    def tuned(*extras):
        la = posterior(name="bert", fit=False)
        la.fit(DataLoader([{**rows, **columns} for columns in extras], batch_size=None))
        la.optimize_prior_precision(recentre=False)
        return la.tuning.leave_one_out

    if extra == "idx":
        columns = [{extra: torch.arange(n)}, {extra: torch.arange(n, 2 * n)}]
    else:
        columns = [{extra: torch.arange(max(LENGTHS))[None]}] * 2
    plain, found = tuned({}, {}), tuned(*columns)
    assert found.sharing == plain.sharing == 2 * n
    assert found.nll == pytest.approx(plain.nll)


def test_it_says_where_copies_could_not_be_looked_for(monkeypatch):
    monkeypatch.setattr(shared_inputs, "with_own_rows", lambda x, examples: x)  # as of images
    said = []
    for columns in ({}, {"position_ids": torch.arange(max(LENGTHS))[None]}):
        la = posterior(name="bert", fit=False)
        la.fit(DataLoader([{**token_batch(LENGTHS), **columns}], batch_size=None))
        la.optimize_prior_precision()
        said.append("6 examples (copies among them are not left out" in str(la.tuning))
        assert la.tuning.leave_one_out.is_sharing_unknown == bool(columns)
    assert said == [False, True]


def test_leave_one_out_is_not_fooled_by_copies(monkeypatch):
    """Copies have their labels in each other, which says nothing about new texts."""
    rows = split_rows(token_batch(LENGTHS))

    def tuned(times):
        la = posterior(fit=False)
        la.fit(DataLoader(rows * times, batch_size=1))
        la.optimize_prior_precision(recentre=False)
        report = la.tuning.leave_one_out
        assert isinstance(report, LeaveOneOut)
        return report

    once, twice = tuned(1), tuned(2)
    assert (once.sharing, twice.sharing) == (0, 2 * len(rows))
    assert "(12 share inputs)" in str(twice)
    monkeypatch.setattr(SharedInputs, "companions", lambda self, team: {})
    fooled = tuned(2)
    assert fooled.nll_map < twice.nll_map
    assert abs(twice.nll_map - once.nll_map) < 0.5 * abs(fooled.nll_map - once.nll_map)


def test_copies_are_no_further_evidence():
    """The standard error of each value twice is that of each value once, up to n - 1."""
    values = torch.randn(40, generator=torch.Generator().manual_seed(0)).double()
    once = standard_error(values)
    assert once == pytest.approx(float(values.std()) / 40**0.5)
    copies = {i: sorted({i, (i + 40) % 80}) for i in range(80)}
    assert standard_error(values.repeat(2), copies) == pytest.approx(once * (78 / 79) ** 0.5)


def test_pairs_of_a_reward_model_are_left_out_with_those_that_share_a_text():
    rows = split_rows(token_batch((3, 6, 4, 5), 6))
    pairs = [
        {f"{key}_{side}": row[key] for side, row in both.items() for key in row if key != "labels"}
        for both in ({"chosen": a, "rejected": b} for a, b in combinations(rows, 2))
    ]
    la = reward_posterior(fit=False)
    la.fit(DataLoader(pairs, batch_size=2))
    la.optimize_prior_precision()
    assert la.tuning.leave_one_out.sharing == len(pairs) == 6


def test_inputs_that_come_with_several_labels_are_counted():
    inputs = SharedInputs("labels")
    y = torch.tensor([0, 1, 0, 2, 1])
    inputs.add(texts([[5, 6], [7], [5, 6], [5, 6], [7]], 3), y)
    inputs.companions(ALONE)
    assert inputs.contradicted(y) == 3
    assert inputs.contradicted(torch.zeros(5)) == 0


@pytest.mark.parametrize("agree", [True, False])
def test_texts_that_come_again_and_again_are_drawn_again(agree):
    """Left out with all their copies, they would say what is known of other texts."""
    few = split_rows(token_batch((3, 6, 4)))
    data = [{**few[i % 3], "labels": torch.tensor((i if agree else i // 3) % 3)} for i in range(12)]
    la = posterior(name="bert", fit=False)
    la.fit(DataLoader(data, batch_size=4))
    la.optimize_prior_precision()
    assert la.tuning.leave_one_out.sharing == (12 if agree else 0)
