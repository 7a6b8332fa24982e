"""`predict` takes what image and speech processors return, and gives what the model itself says."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
)

from laplace_lora import KronLoraLaplace
from support.architectures import SPEECH, WHISPER
from support.models import excite
from support.references import assert_near

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 8,
}
HEAD = {"num_labels": 3}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
IMAGES = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**SMALL, **HEAD)),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**SMALL, **HEAD)),
    "swin": lambda: SwinForImageClassification(
        SwinConfig(
            image_size=16,
            patch_size=2,
            embed_dim=8,
            depths=[1],
            num_heads=[2],
            window_size=4,
            **HEAD,
        )
    ),
    "convnext": lambda: ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8], depths=[1], num_stages=1, image_size=16, **HEAD)
    ),
    "clip": lambda: CLIPForImageClassification(
        CLIPConfig(vision_config=SMALL, text_config=TEXT, projection_dim=8, **HEAD)
    ),
}
TARGETED = ["q_proj", "v_proj", "query", "value", "pwconv1"]


def adapted(base, **kwargs):
    present = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    modules = [name for name in TARGETED if name in present]
    return excite(get_peft_model(base, LoraConfig(r=2, target_modules=modules, **kwargs))).eval()


def pictures(n):
    generator = np.random.default_rng(0)
    return [generator.integers(0, 255, (16, 16, 3), dtype=np.uint8) for _ in range(n)]


def check(model, inputs, output, **kwargs):
    """Fit on processed inputs; predictions have the model's own logits as their mean."""
    n = len(next(iter(inputs.values())))
    rows = [{**{k: v[i] for k, v in inputs.items()}, "labels": i % 3} for i in range(n)]
    la = KronLoraLaplace(model, "classification", **kwargs)
    loader = DataLoader(rows, 3)
    la.fit(loader)
    with torch.no_grad():
        expected = output(model, inputs)
    found = la.predict(inputs)  # a BatchFeature, as the processor returns it
    assert_near(found.mean, expected, 1e-4)
    assert_near(found.probs.sum(1), torch.ones(n), 1e-5)
    by_loader = la.predict(loader)
    assert_near(by_loader.probs, found.probs, 1e-4)
    assert bool((found.mutual_information > 0).all())


@pytest.mark.parametrize("name", IMAGES)
def test_images(name):
    torch.manual_seed(0)
    processor = ViTImageProcessor(do_resize=False, size=16)
    inputs = processor(images=pictures(4), return_tensors="pt")
    model = adapted(IMAGES[name](), modules_to_save=["classifier"])
    check(model, inputs, lambda m, x: m(**x).logits)


@pytest.mark.parametrize("lengths", [(400,) * 4, (400, 250, 330, 400)])
def test_speech_of_any_length(lengths):
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    waves = [generator.standard_normal(length).astype(np.float32) for length in lengths]
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    inputs = extractor(waves, sampling_rate=16000, padding=True, return_tensors="pt")
    config = Wav2Vec2Config(**SPEECH, **HEAD)
    model = adapted(Wav2Vec2ForSequenceClassification(config), modules_to_save=["classifier"])
    check(model, inputs, lambda m, x: m(**x).logits)


def spectrograms():
    generator = np.random.default_rng(0)
    waves = [generator.standard_normal(640).astype(np.float32) for _ in range(4)]
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=400, n_fft=400)
    return extractor(waves, sampling_rate=16000, return_tensors="pt")


def test_whisper_classifies():
    torch.manual_seed(0)
    base = WhisperForAudioClassification(WhisperConfig(**WHISPER, **HEAD))
    model = adapted(base, modules_to_save=["classifier"])
    check(model, spectrograms(), lambda m, x: m(**x).logits)


def test_whisper_answers_with_its_first_token():
    torch.manual_seed(0)
    base = WhisperForConditionalGeneration(WhisperConfig(**WHISPER))
    targets = [3, 4, 5]

    def first(model, x):
        start = torch.full((len(x["input_features"]), 1), base.config.decoder_start_token_id)
        return model(**x, decoder_input_ids=start).logits[:, 0, targets]

    check(adapted(base), spectrograms(), first, target_ids=targets)
