"""LoRA on convolutions, in a tiny ResNet."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, LogitsModel, LoraGGN
from laplace_lora.likelihoods.roots import softmax_root
from support.batches import images
from support.models import resnet
from support.references import assert_near, explicit_jacobians


@pytest.fixture(scope="module")
def model():
    return LogitsModel(resnet()).eval()


def test_jacobians_equal_jacrev(model):
    backend = LoraGGN(model, "classification")
    assert sum(block.parameter.ndim == 4 for block in backend.blocks) > 6
    batch = images()
    _, blocks = backend.engine.jacobian_blocks(batch)
    assert_near(list(blocks), explicit_jacobians(model, batch))


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_factors_equal_an_explicit_loop_over_patches(model, approximation):
    backend = LoraGGN(model, "classification", kfac_approx=approximation)
    batch = images()
    _, kron = backend.kron(batch, batch["labels"], N=4)
    by_name = dict(zip([block.name for block in backend.blocks], kron.kfacs, strict=True))
    convs = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and f"{n}.weight" in by_name
    ]
    for name, conv in (convs[0], convs[-1]):
        seen = {}
        handle = conv.register_forward_hook(lambda m, args, out, s=seen: s.update(x=args[0], y=out))
        f = model(batch)
        handle.remove()
        patches = F.unfold(
            seen["x"].detach(), conv.kernel_size, padding=conv.padding, stride=conv.stride
        ).mT
        if approximation == "reduce":
            patches = patches.mean(1, keepdim=True)
        input_cov = torch.einsum("npi,npj->ij", patches, patches) / patches.shape[1] / 4
        grad_cov = 0
        for column in softmax_root(f.detach()):
            g = torch.autograd.grad(f, seen["y"], column, retain_graph=True)[0].flatten(2).mT
            if approximation == "reduce":
                g = g.sum(1, keepdim=True)
            grad_cov = grad_cov + torch.einsum("npi,npj->ij", g, g)
        assert_near(by_name[f"{name}.weight"], [grad_cov, input_cov])


@pytest.mark.parametrize(
    "cls,kwargs", [(KronLoraLaplace, {"factor_rank": None}), (DiagLoraLaplace, {})]
)
def test_posteriors_fit_predict_and_come_back(model, cls, kwargs, tmp_path):
    la = cls(model, "classification", **kwargs)
    batch = images()
    examples = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    la.fit(DataLoader(examples, batch_size=3))
    jacobians = torch.cat([j.flatten(2) for j in explicit_jacobians(model, batch)], -1)
    _, covariance = la._glm_predictive_distribution(batch)
    assert_near(covariance, la.functional_variance(jacobians))
    la.save_pretrained(tmp_path, precision="exact")
    assert torch.equal(cls.from_pretrained(model, tmp_path)(batch), la(batch))


def test_convolutions_in_groups_are_refused_by_name():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.LazyLinear(2))
    net(torch.zeros(1, 4, 5, 5))
    with pytest.raises(ValueError, match=r"'0\.weight', '0\.bias'"):
        LoraGGN(net, "classification")
