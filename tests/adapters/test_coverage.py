"""Every kind of adapter against explicit loops: factors, Jacobians and predictive variance."""

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from laplace_lora import KronLoraLaplace, LogitsModel, LoraGGN
from laplace_lora.likelihoods.roots import softmax_root
from support.batches import images, loader, rows, token_batch
from support.models import TARGETS, adalora_model, adapter_config, base_model, excite, peft_model
from support.references import assert_near, explicit_jacobians
from support.uncovered import deberta_model, dora_model

LENGTHS = (4, 2, 5)
BATCH = token_batch(LENGTHS)


def initialised(kind):
    """Adapters that start away from zero and change the base weights, moved a little."""
    model = get_peft_model(base_model("bert"), adapter_config("bert", init_lora_weights=kind))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    excite(model, scale=0.1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                assert before[name].abs().sum() > 0
                p.add_(before[name])
    return model.double()


def two_adapters():
    model = peft_model("bert")
    model.add_adapter("second", adapter_config("bert", r=3, target_modules=["key", "dense"]))
    model.set_adapter("second")
    return excite(model.double())


def one_layer():
    model = peft_model("llama", layers_to_transform=[1])
    assert not any("layers.0" in n for n, p in model.named_parameters() if p.requires_grad)
    return model


def both_stacks():
    model = peft_model("t5-lm", target_modules=["q", "v", "k", "o", "wi", "wo"])
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    for part in ("encoder.block", "decoder.block", "EncDecAttention"):
        assert any(part in name for name in names)
    return model


def head_too():
    return peft_model("llama-lm", target_modules=["lm_head", "v_proj"])


def pattern():
    return peft_model(
        "bert",
        use_rslora=True,
        rank_pattern={"query": 3},
        lora_bias=True,
        target_modules=["query", "dense"],
        modules_to_save=None,
    )


CASES = {
    "pissa": lambda: initialised("pissa"),
    "olora": lambda: initialised("olora"),
    "two adapters": two_adapters,
    "one layer": one_layer,
    "t5": both_stacks,
    "lm_head": head_too,
    "rslora, rank_pattern, lora_bias": pattern,
    "dora": lambda: dora_model("bert"),
    "deberta": deberta_model,
}


def wrapped(key):
    targets = TARGETS if key in ("t5", "lm_head") else None
    return LogitsModel(CASES[key](), target_ids=targets).eval()


def explicit_blocks(model, batch, lengths, jacobians):
    """Curvature of every trainable tensor, ``(numel, numel)``, one unpadded example at a time."""
    linears = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and m.weight.requires_grad
    }
    sums = {n: [0.0, 0.0] for n in linears}
    calls = {}
    for i, length in enumerate(lengths):
        one = {k: v[..., :length] for k, v in rows(batch, [i]).items() if k != "labels"}
        calls = {n: [] for n in linears}
        handles = [
            m.register_forward_hook(lambda m, args, out, n=n, c=calls: c[n].append((args[0], out)))
            for n, m in linears.items()
        ]
        f = model(one)
        for handle in handles:
            handle.remove()
        for name, found in calls.items():
            if ".lora_" in name and any("magnitude" in n for n, _ in model.named_parameters()):
                del found[0]  # DoRA sends the identity through first, without gradient
            for x, out in found:
                a = x.detach().reshape(-1, x.shape[-1])
                sums[name][1] += a.T @ a / len(a) / len(lengths)
                for column in softmax_root(f.detach()):
                    g = torch.autograd.grad(f, out, column, retain_graph=True)[0]
                    g = g.reshape(-1, g.shape[-1])
                    sums[name][0] += g.T @ g
    roots = softmax_root(model(batch).detach())
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    blocks = []
    for name, jacobian in zip(trainable, jacobians, strict=True):
        owner, _, kind = name.rpartition(".")
        uneven = len({tuple(x.shape[1:]) for x, _ in calls.get(owner, [])}) > 1
        if owner in linears and not uneven:
            grads, inputs = sums[owner]
            blocks.append(torch.kron(grads, inputs) if kind == "weight" else grads)
        else:  # no Kronecker factors: the diagonal of the GGN
            J = torch.einsum("knc,ncp->knp", roots, jacobian.flatten(2))
            blocks.append(J.square().sum((0, 1)).diag())
    return blocks


@pytest.mark.parametrize("key", CASES)
def test_factors_and_variance_equal_explicit_loops(key):
    model = wrapped(key)
    la = KronLoraLaplace(model, "classification", uncovered="diag", factor_rank=None)
    la.prior_precision = 3.0
    examples = [rows(BATCH, i) for i in range(len(LENGTHS))]
    la.fit(torch.utils.data.DataLoader(examples, batch_size=2))
    jacobians = explicit_jacobians(model, BATCH)
    _, blocks = la.engine.jacobian_blocks(BATCH)
    assert_near(list(blocks), jacobians)
    expected = explicit_blocks(model, BATCH, LENGTHS, jacobians)
    found = [
        torch.kron(*(f.matrix for f in F)) if len(F) == 2 else F[0].matrix for F in la.H_facs.kfacs
    ]
    assert_near(found, expected)
    mean, covariance = la._glm_predictive_distribution(BATCH)
    assert_near(mean, model(BATCH).detach())
    variance = 0
    for H, J in zip(expected, jacobians, strict=True):
        P = H + 3 * torch.eye(len(H)).double()
        J = J.flatten(2)
        variance = variance + J @ torch.linalg.solve(P, J.mT)
    assert_near(covariance, variance)


def test_an_idle_adapter_has_no_say():
    model = wrapped("two adapters")
    la = KronLoraLaplace(model, "classification")
    assert all("default" not in name for name in la.block_names)
    la.fit(loader())
    reference = la(BATCH)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".default." in name:
                p.add_(1)
    assert torch.equal(la(BATCH), reference)


def adalora_resnet():
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4],
        depths=[1],
        layer_type="basic",
        hidden_act="tanh",
        num_labels=3,
    )
    lora = AdaLoraConfig(
        init_r=2, target_r=1, total_step=9, tfinal=1, target_modules=["convolution"]
    )
    base = ResNetForImageClassification(config)
    return LogitsModel(excite(get_peft_model(base, lora)).double()).eval()


def test_adalora_on_convolutions_has_diagonals_or_is_refused_by_name():
    model, batch = adalora_resnet(), images(3, size=8)
    with pytest.raises(ValueError, match=r"no Kronecker factor covers.*lora_A"):
        LoraGGN(model, "classification")
    _, blocks = LoraGGN(model, "classification", uncovered="diag").engine.jacobian_blocks(batch)
    assert_near(list(blocks), explicit_jacobians(model, batch))


def test_adalora_keeps_its_kronecker_factors_beside_diagonals():
    model = LogitsModel(adalora_model("bert")).eval()
    norm = model.model.get_base_model().bert.embeddings.LayerNorm
    strict = LoraGGN(model, "classification").kron(BATCH, BATCH["labels"], N=3)[1].kfacs
    norm.weight.requires_grad_(True)
    backend = LoraGGN(model, "classification", uncovered="diag")
    kron = backend.kron(BATCH, BATCH["labels"], N=3)[1]
    by_name = dict(zip([b.name for b in backend.blocks], kron.kfacs, strict=True))
    del by_name[next(n for n in by_name if "LayerNorm" in n)]
    assert_near(list(by_name.values()), strict)
