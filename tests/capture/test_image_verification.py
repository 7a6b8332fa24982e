"""Batches with as many images as texts, but not one of each, against each text alone."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, LogitsModel, LoraGGN
from laplace_lora.capture import image_verification
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.models.inputs import image_rows
from support.language import EXACT
from support.models import TARGETS
from support.references import assert_near
from support.vision import (
    IMAGE,
    VISION,
    WITH_TOWER,
    image_text_model,
    image_texts,
    question,
    vision_model,
)

VIDEO = 56
UNEVEN = [(2, 1, 0), (1, 2, 0), (1, 0), (1, 1, 2, 0)]
NOT_ONE_EACH = "vision.* sees as many images .* not one of each.*every text has one image"


def backend_of(kind, **kwargs):
    options = {"uncovered": kwargs.pop("uncovered", "error")}
    wrapped = LogitsModel(image_text_model(kind, **kwargs), target_ids=TARGETS).eval()
    return LoraGGN(wrapped, "classification", **options)


def jacobians_alone(backend, singles):
    """Of each text, with all of its images, by autograd."""
    parameters, found = backend.engine.parameters, []
    for single in singles:
        f = backend.engine.model(single)[0]
        # Towers have no part in texts without an image.
        options = {"retain_graph": True, "materialize_grads": True}
        grads = [torch.autograd.grad(output, parameters, **options) for output in f]
        found.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in grads]))
    return torch.stack(found)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("counts", UNEVEN)
@pytest.mark.parametrize("kind", ["llava", "smolvlm"])
def test_text_adapters_are_exact(kind, counts, side):
    batch, singles = image_texts(counts, kind, side=side)
    backend = backend_of(kind)
    assert_near(backend.jacobians(batch)[0], jacobians_alone(backend, singles))


@pytest.mark.parametrize("counts", UNEVEN)
def test_text_adapters_are_exact_where_no_configuration_names_placeholders(counts, monkeypatch):
    """The first batch is tried text by text, the longest and the shortest included."""
    monkeypatch.setattr(image_rows, "PLACEHOLDERS", [])
    batch, singles = image_texts(counts)
    backend = backend_of("llava")
    assert_near(backend.jacobians(batch)[0], jacobians_alone(backend, singles))


@pytest.mark.parametrize("kind", ["llava", "smolvlm"])
def test_an_adapted_tower_is_exact_where_every_text_has_one_image(kind):
    batch, singles = image_texts((1, 1, 1), kind)
    backend = backend_of(kind, target=WITH_TOWER)
    assert_near(backend.jacobians(batch)[0], jacobians_alone(backend, singles))


@pytest.mark.parametrize("earlier", [None, (1, 1, 1)])
@pytest.mark.parametrize(
    ("counts", "tails"), [((2, 1, 0), (2, 3, 1)), ((1, 1, 2, 0), (40, 1, 2, 30))]
)
@pytest.mark.parametrize("kind", ["llava", "smolvlm"])
def test_an_adapted_tower_is_refused_by_name_in_any_batch(kind, counts, tails, earlier):
    """In the second case one example's gradient is right, which alone was looked at."""
    backend = backend_of(kind, target=WITH_TOWER)
    if earlier is not None:
        backend.jacobians(image_texts(earlier, kind)[0])
    batch = image_texts(counts, kind, tails=tails)[0]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=NOT_ONE_EACH):
            backend.jacobians(batch)


def test_a_diagonal_block_needs_texts_that_run_alone():
    backend = backend_of("llava", target=WITH_TOWER, uncovered="diag")
    backend.jacobians(image_texts((1, 1, 1))[0])
    batch, singles = image_texts((2, 1, 0))
    with pytest.raises(RuntimeError, match=r"without the others .*batches of one example"):
        backend.jacobians(batch)
    found = [backend.jacobians(single)[0][0] for single in singles]
    assert_near(torch.stack(found), jacobians_alone(backend, singles))


def test_texts_are_known_from_one_batch_on(monkeypatch):
    """The backward pass of a text without an image shows which layers see texts."""
    backend = backend_of("llava")
    looked_at, reached = [], image_verification._reached
    noted = lambda *args: looked_at.append(args[2]) or reached(*args)  # noqa: E731
    monkeypatch.setattr(image_verification, "_reached", noted)
    for seed in range(3):
        backend.jacobians(image_texts((2, 1, 0), seed=seed)[0])
    backend.jacobians(image_texts((1, 1, 1))[0])
    assert looked_at == [2]


def noted_passes(monkeypatch):
    """The list that `torch.autograd.grad` adds an entry to whenever it is called."""
    passes, grad = [], torch.autograd.grad
    noted = lambda *args, **kwargs: passes.append(0) or grad(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(torch.autograd, "grad", noted)
    return passes


def passes_of_jacobians(backend, batch, singles, monkeypatch):
    """The passes that a batch's Jacobians took, which are those of its texts alone."""
    expected = jacobians_alone(backend, singles)
    with monkeypatch.context() as patch:
        passes = noted_passes(patch)
        found = backend.jacobians(batch)[0]
    assert_near(found, expected)
    return passes


def images_and_videos(kind, counts, seed):
    """Texts with images, the second of which speaks of a video as well."""
    batch, singles = image_texts(counts, kind, seed=seed)
    for texts, row in ((batch["input_ids"], 1), (singles[1]["input_ids"], 0)):
        texts[row, (texts[row] == 6).nonzero().item() + 1] = VIDEO
    return batch, singles


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("kind", ["llava", "smolvlm"])
def test_later_batches_cost_nothing_where_every_text_has_an_image(kind, is_trained, monkeypatch):
    backend = backend_of(kind)
    backend.engine.model.model.get_base_model().config.video_token_id = VIDEO
    if not is_trained:
        for name, parameter in backend.engine.model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
    for seed in range(3):
        batch, singles = images_and_videos(kind, (2, 1, 1), seed)
        passes = passes_of_jacobians(backend, batch, singles, monkeypatch)
        if seed:
            assert len(passes) == len(TARGETS)


def test_later_batches_cost_nothing_where_patches_are_packed(monkeypatch):
    """Qwen2-VL: images of some texts, videos of the others."""
    kind, config, vision = VISION["qwen2_vl"]
    model = LogitsModel(vision_model(kind, config, **vision), target_ids=TARGETS).eval()
    backend = LoraGGN(model, "classification")
    for later in (False, True):
        texts = [question(answer) for answer in range(4)]
        for text in texts[1::2]:
            ids = text["input_ids"]
            ids[ids == IMAGE] = VIDEO
            text["mm_token_type_ids"] *= 2
            text["pixel_values_videos"] = text.pop("pixel_values")
            text["video_grid_thw"] = text.pop("image_grid_thw")
        keys = texts[0] | texts[1]
        batch = {key: torch.cat([text[key] for text in texts if key in text]) for key in keys}
        passes = passes_of_jacobians(backend, batch, texts, monkeypatch)
        if later:
            assert len(passes) == len(TARGETS)


@pytest.mark.parametrize("kind", ["llava", "smolvlm"])
def test_an_adapted_tower_is_refused_after_batches_in_which_all_went_well(kind):
    """One image of each text, beside a video of one: no row is another text's."""
    backend = backend_of(kind, target=WITH_TOWER)
    backend.engine.model.model.get_base_model().config.video_token_id = VIDEO
    batch, singles = images_and_videos(kind, (1, 1, 1), 0)
    assert_near(backend.jacobians(batch)[0], jacobians_alone(backend, singles))
    with pytest.raises(RuntimeError, match=NOT_ONE_EACH):
        backend.jacobians(images_and_videos(kind, (2, 1, 0), 0)[0])


def with_labels(texts):
    """The tokens behind an image and its 6, two a text at most."""
    ids = texts["input_ids"]
    return {**texts, "labels": ids.masked_fill((ids < 7) | (ids > 8), IGNORED)}


@pytest.mark.parametrize("kind", ["llava", "smolvlm"])
def test_language_models_are_fitted_as_on_texts_alone(kind):
    batch, singles = image_texts((2, 0, 1), kind)
    found = []
    for batches in ([batch], singles):
        la = KronLoraLaplace(image_text_model(kind), "language_modeling", **EXACT)
        loader = DataLoader([with_labels(texts) for texts in batches], batch_size=None)
        la.fit(loader, evidence_correction=False)
        found.append(la.log_marginal_likelihood().detach())
    torch.testing.assert_close(*found)


def test_language_models_with_an_adapted_tower_are_refused_by_name():
    la = DiagLoraLaplace(image_text_model(target=WITH_TOWER), "language_modeling", **EXACT)
    batches = [with_labels(image_texts(counts)[0]) for counts in ((1, 1, 1), (2, 1, 0))]
    with pytest.raises(RuntimeError, match=NOT_ONE_EACH):
        la.fit(DataLoader(batches, batch_size=None))


class Unnamed(nn.Module):
    """An image of each text, of which neither tokens nor a configuration speak."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.text, self.image = nn.Embedding(60, 3).double(), nn.Linear(768, 3).double()
        self.text.requires_grad_(False)

    def forward(self, batch):
        images = self.image(batch["pixel_values"].flatten(1)).tanh()
        return images * self.text(batch["input_ids"]).sum(1)


def test_models_without_placeholders_take_an_image_of_each_text():
    batch = image_texts((2, 1, 0))[0]
    jacobians, _ = LoraGGN(Unnamed(), "classification").jacobians(batch)
    singles = [{k: v[n : n + 1] for k, v in batch.items()} for n in range(3)]
    model = Unnamed()
    alone = [LoraGGN(model, "classification").jacobians(single)[0][0] for single in singles]
    assert_near(jacobians, torch.stack(alone))
