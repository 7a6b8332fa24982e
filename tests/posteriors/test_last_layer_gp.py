"""The last layer as a Gaussian process."""

import copy
import pickle
import threading

import pytest
import torch
from laplace import Laplace
from laplace.curvature import CurvlinopsGGN
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

from laplace_lora import FullLoraLLLaplace, FunctionalLoraLLLaplace, LogitsModel, LoraGGN
from support.architectures import IMAGE
from support.batches import images, loader, split_rows, token_batch
from support.last_layer import last_layer_logits_model
from support.models import TARGETS, peft_model
from support.references import assert_near, looped_jacobians

BATCH = token_batch((4, 2, 6), seed=9)


def test_gaussian_process_on_all_data_is_the_exact_posterior_of_regression():
    model = LogitsModel(peft_model("bert", num_labels=1))
    batch = token_batch((5,) * 6)
    batch["labels"] = torch.randn(6, 1).double()
    examples = [{k: v[n] for k, v in batch.items()} for n in range(6)]
    data = DataLoader(examples, batch_size=4)
    gp = FunctionalLoraLLLaplace(model, "regression", n_subset=6, prior_precision=2.0)
    full = FullLoraLLLaplace(model, "regression", prior_precision=2.0)
    for la in (gp, full):
        la.fit(data)
    assert_near(list(gp(BATCH)), list(full(BATCH)))


def test_gaussian_process_of_classes_has_only_the_diagonal_of_their_output_hessians():
    """laplace-torch's choice; the exact posterior's variances are others, see limits.md."""
    model = LogitsModel(peft_model("bert"))
    gp = FunctionalLoraLLLaplace(model, "classification", n_subset=7, prior_precision=2.0)
    full = FullLoraLLLaplace(model, "classification", prior_precision=2.0)
    curvature = 0
    for la in (gp, full):
        la.fit(loader(7))
    for batch in loader(7):
        J, f = full.backend.jacobians(batch)
        p = f.softmax(-1)
        curvature = torch.einsum("ncp,nc,ncq->pq", J, p - p.square(), J)
    J, _ = full.backend.jacobians(BATCH)
    posterior = torch.linalg.inv(curvature + 2.0 * torch.eye(len(curvature)).double())
    _, covariance = gp._glm_predictive_distribution(BATCH)
    assert_near(covariance, J @ posterior @ J.mT, 1e-6)
    exact = full._glm_predictive_distribution(BATCH)[1]
    assert (covariance - exact).norm() > 0.02 * exact.norm()


@pytest.mark.parametrize("outputs", [1, 3])
def test_its_evidence_of_a_regression_is_that_of_the_linear_model(outputs):
    model = peft_model("bert", num_labels=outputs)
    batch = token_batch((5, 3, 6, 2, 4, 5))
    batch["labels"] = torch.randn(6, outputs, generator=torch.Generator().manual_seed(0)).double()
    options = {"prior_precision": 2.0, "sigma_noise": 0.7}
    gp = FunctionalLoraLLLaplace(model, "regression", n_subset=6, **options)
    gp.fit(DataLoader(split_rows(batch), batch_size=4))
    full = FullLoraLLLaplace(model, "regression", **options)
    full.fit(DataLoader(split_rows(batch), batch_size=4))
    J = looped_jacobians(full.model, batch).flatten(0, 1)
    mean = full.model(batch).flatten().detach() - J @ full.mean
    for noise in (0.7, 1.4):
        covariance = J @ J.T / 2.0 + noise**2 * torch.eye(len(J)).to(J)
        exact = torch.distributions.MultivariateNormal(mean, covariance)
        expected = exact.log_prob(batch["labels"].flatten())
        found = gp.log_marginal_likelihood(sigma_noise=torch.tensor(noise))
        torch.testing.assert_close(found, expected)


def test_a_second_fit_starts_anew():
    gp = FunctionalLoraLLLaplace(peft_model("bert"), "classification", n_subset=6)
    gp.fit(loader())
    before = gp.log_marginal_likelihood()
    gp.fit(loader())
    torch.testing.assert_close(gp.log_marginal_likelihood(), before)


def test_a_new_fit_takes_the_head_as_it_is_now():
    model = peft_model("bert")
    gp = process(model)
    state = gp.state_dict()
    with torch.no_grad():
        for tensor in gp.features.source.head_tensors():
            tensor.mul_(2)
    gp.fit(loader(lengths=(4, 2, 6, 3)))
    new = process(model)
    pairs = [gp._glm_predictive_distribution(BATCH), new._glm_predictive_distribution(BATCH)]
    for found, expected in zip(*pairs, strict=True):
        assert_near(found, expected)
    assert_near(gp.log_marginal_likelihood(), new.log_marginal_likelihood())
    assert not torch.allclose(state["mean"], gp.mean)
    with torch.no_grad():
        for tensor in gp.features.source.head_tensors():
            tensor.div_(2)
    late = FunctionalLoraLLLaplace(model, "classification", n_subset=4)
    new.load_state_dict(state)
    late.load_state_dict(state)
    assert_near(new(BATCH), late(BATCH))


def test_inputs_need_no_token_ids():
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig(**IMAGE, num_labels=3))
    lora = LoraConfig(r=2, target_modules=["query", "value", "q_proj", "v_proj"])
    model = get_peft_model(base, lora).double()
    batch = images(6)
    gp = FunctionalLoraLLLaplace(model, "classification", n_subset=6)
    gp.fit(DataLoader(split_rows(batch), batch_size=4))
    assert_near(gp(batch).sum(-1), torch.ones(6).double())
    assert gp.functional_samples(batch, n_samples=2).shape == (2, 6, 3)


def test_gaussian_process_options():
    gp = FunctionalLoraLLLaplace(
        peft_model("llama-lm"), "classification", n_subset=50, target_ids=TARGETS
    )
    with pytest.raises(ValueError, match="n_subset is 50, but there are 7"):
        gp.fit(loader())


def test_plain_gaussian_process_takes_pairs_of_tensors():
    """laplace-torch's own takes neither mappings nor other backends than three it names."""
    model = last_layer_logits_model("bert")
    batch = token_batch((5,) * 6)
    data = DataLoader(TensorDataset(batch["input_ids"], batch["labels"]), batch_size=3)
    options = {"subset_of_weights": "last_layer", "hessian_structure": "gp", "n_subset": 4}
    la = Laplace(model, "classification", backend=CurvlinopsGGN, **options)
    la.fit(data)
    ours = FunctionalLoraLLLaplace(model, "classification", n_subset=4)
    ours.fit(data)
    assert_near(ours(batch["input_ids"]), la(batch["input_ids"]))
    with pytest.raises(AssertionError):
        Laplace(model, "classification", backend=LoraGGN, **options)


def process(model=None):
    gp = FunctionalLoraLLLaplace(model or peft_model("bert"), "classification", n_subset=4)
    gp.fit(loader(lengths=(4, 2, 6, 3)))
    return gp


def test_a_deep_copy_has_features_of_its_own():
    gp = process()
    other = token_batch((3, 5, 1), seed=5)  # as many rows, which would go unnoticed
    expected = gp._glm_predictive_distribution(other)
    gp(BATCH)
    twin = copy.deepcopy(gp)
    found = twin._glm_predictive_distribution(other)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    with torch.no_grad():
        for parameter in twin.features.source.parameters():
            parameter.mul_(2)
    assert torch.equal(gp._glm_predictive_distribution(other)[1], expected[1])
    with pytest.raises(RuntimeError, match="have changed since"):
        twin(other)
    assert torch.equal(copy.copy(gp)(other), gp(other))
    with pytest.raises(TypeError, match=r"keep `la.state_dict\(\)`"):
        pickle.dumps(gp)


def test_a_thread_keeps_its_features_beside_another(monkeypatch):
    gp, other = process(), token_batch((3, 5, 1), seed=5)
    expected = gp._glm_predictive_distribution(BATCH)
    forward, first = type(gp.model).forward, threading.get_ident()

    def with_another_between(model, x):
        output = forward(model, x)
        if threading.get_ident() == first:
            thread = threading.Thread(target=lambda: gp._glm_predictive_distribution(other))
            thread.start()
            thread.join()
        return output

    monkeypatch.setattr(type(gp.model), "forward", with_another_between)
    found = gp._glm_predictive_distribution(BATCH)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def change_weight(model):
    next(p for n, p in model.named_parameters() if "lora_B" in n).data.mul_(1.1)


def change_frozen(model):
    with torch.no_grad():
        model.get_base_model().bert.embeddings.word_embeddings.weight.mul_(1.1)


def change_scaling(model):
    model.get_base_model().bert.encoder.layer[0].attention.self.query.scale_layer(2.0)


@pytest.mark.parametrize("change", [change_weight, change_frozen, change_scaling])
def test_features_of_another_transformer_are_refused(change):
    model = peft_model("bert")
    gp = process(model)
    gp(BATCH)
    change(model)
    for ask in (gp, lambda _: gp.log_marginal_likelihood()):
        with pytest.raises(RuntimeError, match="have changed since the posterior was fitted"):
            ask(BATCH)
    gp.fit(loader())
    gp(BATCH)


def test_a_model_in_another_dtype_is_refused():
    model = peft_model("bert")
    gp = process(model)
    model.float()
    with pytest.raises(RuntimeError, match=r"now in torch.float32.*fitted in torch.float64"):
        gp(BATCH)


def test_a_state_is_for_the_weights_at_which_it_is_loaded():
    gp, again = process(), process()
    change_weight(gp.features.source)
    gp.fit(loader(lengths=(4, 2, 6, 3)))
    change_weight(again.features.source)
    again.load_state_dict(gp.state_dict())
    assert torch.equal(again(BATCH), gp(BATCH))


@pytest.mark.filterwarnings("ignore:Using FunctionalLaplace with the diagonal approximation")
@pytest.mark.parametrize("independent", [False, True])
def test_predictions_follow_every_setting(independent):
    """laplace-torch follows an assigned prior precision alone."""

    def process(**kwargs):
        gp = FunctionalLoraLLLaplace(
            peft_model("bert"), "regression", 7, independent_outputs=independent, **kwargs
        )
        gp.fit(loader(likelihood="regression"))
        return gp

    gp = process()
    gp(BATCH)
    gp.sigma_noise = 0.3
    assert_near(gp(BATCH)[1], process(sigma_noise=0.3)(BATCH)[1])
    gp.temperature = 4.0
    assert_near(gp(BATCH)[1], process(sigma_noise=0.3, temperature=4.0)(BATCH)[1])
    gp.prior_precision.mul_(20)
    expected = process(sigma_noise=0.3, temperature=4.0, prior_precision=20.0)(BATCH)[1]
    assert_near(gp(BATCH)[1], expected)
    gp.log_marginal_likelihood(sigma_noise=torch.tensor(1.0))
    assert_near(gp(BATCH)[1], process(temperature=4.0, prior_precision=20.0)(BATCH)[1])


def test_its_matrix_is_factorised_once_for_each_setting(monkeypatch):
    gp = process()
    builds = []
    build = torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda x: builds.append(x) or build(x))
    gp.fit(loader())
    gp(BATCH)
    gp(BATCH)
    assert len(builds) == 1
    gp.prior_precision.mul_(2)
    gp(BATCH)
    gp(BATCH)
    assert len(builds) == 2
