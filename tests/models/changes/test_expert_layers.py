"""LoRA on the stacked weights of experts: layers for as long as a pass is recorded."""

import pytest
import torch
from torch.nn import functional as F

from laplace_lora import KronLoraLaplace, LogitsModel, LoraGGN
from laplace_lora.models.changes.expert_layers import adapted_experts
from support.batches import loader, rows, token_batch
from support.experts import KINDS, experts_model
from support.references import assert_near, looped_jacobians

BATCH = token_batch((5, 3, 4))


def model_of(*args, **kwargs):
    return LogitsModel(experts_model(*args, **kwargs)).eval()


def experts_of(model):
    return list(adapted_experts(model.modules()))


@pytest.mark.parametrize("parameters", [("gate_up_proj", "down_proj"), ("down_proj",)])
@pytest.mark.parametrize("name", KINDS)
def test_jacobians_are_those_of_each_example_alone(name, parameters):
    model = model_of(name, parameters)
    backend = LoraGGN(model, "classification")
    jacobians, f = backend.jacobians(BATCH)
    assert not any(linear.is_diagonal for linear in backend.maps)
    assert_near(f, model(BATCH).detach())
    # Routers and norms compute in single precision whatever the model's.
    assert_near(jacobians, looped_jacobians(model, BATCH), 1e-5)


def plain_loop(experts, record):
    """An experts' forward pass, token by token and expert by expert."""

    def forward(hidden_states, top_k_index, top_k_weights):
        total = torch.zeros_like(hidden_states)
        for t, x in enumerate(hidden_states):
            for e, weight in zip(top_k_index[t].tolist(), top_k_weights[t], strict=True):
                up = F.linear(x, experts.gate_up_proj[e])
                gate, value = up.chunk(2)
                inner = experts.act_fn(gate) * value
                out = F.linear(inner, experts.down_proj[e])
                record.append(("gate_up_proj", e, x.detach(), up))
                record.append(("down_proj", e, inner, out))
                total = total.index_add(0, torch.tensor([t]), (weight * out).unsqueeze(0))
        return total

    return forward


def looped_factors(model, batch):
    """Factors of every adapted weight's ``A`` and ``B``, from routed rows one by one."""
    sums = {}
    for n in range(len(batch["labels"])):
        length = int(batch["attention_mask"][n].sum())
        example = {k: v[n : n + 1, :length] for k, v in batch.items() if k != "labels"}
        records = [[] for _ in experts_of(model)]
        for experts, record in zip(experts_of(model), records, strict=True):
            experts.forward = plain_loop(experts, record)
        f = model(example)[0]
        for experts in experts_of(model):
            del experts.forward
        p = f.softmax(-1).detach()
        values, vectors = torch.linalg.eigh(p.diag() - torch.outer(p, p))
        for layer, ((_, wrappers), record) in enumerate(
            zip(adapted_experts(model.modules()).items(), records, strict=True)
        ):
            for name, wrapped in wrappers.items():
                seen = [(e, x.detach(), z) for part, e, x, z in record if part == name]
                A = wrapped.lora_A["default"].weight.detach().unflatten(0, (4, 2))
                B = wrapped.lora_B["default"].weight.detach().unflatten(1, (2, 4))
                total = sums.setdefault((layer, name), [0.0] * 4)
                for e, x, _ in seen:
                    v = torch.zeros(2, 4).double()
                    v[:, e] = A[e] @ x
                    total[1] = total[1] + torch.outer(x, x) / len(seen) / len(batch["labels"])
                    v = v.flatten()
                    total[3] = total[3] + torch.outer(v, v) / len(seen) / len(batch["labels"])
                for column in (vectors * values.clamp(min=0).sqrt()).T:
                    found = torch.autograd.grad(
                        f, [z for _, _, z in seen], column, retain_graph=True
                    )
                    for (e, _, _), g in zip(seen, found, strict=True):
                        g = g * wrapped.scaling["default"]
                        own = torch.zeros(4, 2).double()
                        own[e] = B[:, :, e].T @ g
                        own = own.flatten()
                        total[0] = total[0] + torch.outer(own, own)
                        total[2] = total[2] + torch.outer(g, g)
    return sums


def test_factors_are_sums_over_the_tokens_that_are_routed_to_an_expert():
    model, batch = model_of(), token_batch((5, 3, 4), pad_to=7)
    backend = LoraGGN(model, "classification")
    _, kron = backend.kron(batch, batch["labels"], N=3)
    expected = looped_factors(model, batch)
    names = {
        id(w): (i, key)
        for i, by in enumerate(adapted_experts(model.modules()).values())
        for key, w in by.items()
    }
    seen = 0
    for block, factors in zip(backend.blocks, kron.kfacs, strict=True):
        owner = names.get(id(backend.maps[block.map].layer))
        if owner is None:
            continue
        start = 0 if "lora_A" in block.name else 2
        assert_near(factors, expected[owner][start : start + 2], 1e-5)
        seen += 1
        if start == 0:  # a block an expert
            blocks = factors[0].unflatten(0, (4, 2)).unflatten(2, (4, 2))
            apart = ~torch.eye(4, dtype=torch.bool)
            assert float(blocks.transpose(1, 2)[apart].abs().max()) == 0
    assert seen == 8


def test_batches_and_padding_change_nothing():
    la = KronLoraLaplace(model_of(), "classification")
    found = []
    for batch_size, options in ((7, {}), (1, {}), (3, {"pad_to": 9}), (2, {"side": "left"})):
        la.fit(loader(batch_size, **options))
        found.append(la.log_marginal_likelihood())
    for evidence in found[1:]:
        assert_near(evidence, found[0], 1e-5)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_texts_of_one_token_are_as_with_padding(approximation):
    backend = LoraGGN(model_of(), "classification", kfac_approx=approximation)
    found = []
    for width in (1, 4):
        batch = token_batch((1, 1, 1), pad_to=width)
        found.append(backend.kron(batch, batch["labels"], N=3)[1].to_matrix())
    assert_near(*found, 1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_experts_are_left_as_they_were(implementation):
    model = model_of(implementation=implementation)
    before = [dict(vars(experts)) for experts in experts_of(model)]
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    with pytest.raises(ValueError, match="labels must lie"):
        la.fit(torch.utils.data.DataLoader([{**BATCH, "labels": torch.full((3,), 9)}], None))
    assert [vars(experts).keys() for experts in experts_of(model)] == [b.keys() for b in before]
    assert_near(la(rows(BATCH, slice(0, 1))), la(BATCH)[:1], 1e-5)


def test_experts_that_compute_something_else_are_refused():
    model = model_of()
    experts_of(model)[1]._apply_gate = lambda up: up.chunk(2, -1)[0]
    with pytest.raises(RuntimeError, match="computes something else than its projections"):
        LoraGGN(model, "classification").jacobians(BATCH)


def test_experts_of_unknown_classes_are_refused_by_name_or_get_the_diagonal():
    model = model_of()
    for experts in experts_of(model):
        del experts.is_transposed
    model.config._experts_implementation = "eager"
    with pytest.raises(RuntimeError, match=r"target_parameters.*uncovered='diag'"):
        LoraGGN(model, "classification").jacobians(BATCH)
    jacobians, _ = LoraGGN(model, "classification", uncovered="diag").jacobians(BATCH)
    assert_near(jacobians, looped_jacobians(model, BATCH), 1e-5)
