"""CLIP, DINOv2, classifier and pixel features: shapes, checksums, long captions, local folders only."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from carrara.evaluation import Moments, clip_score
from carrara.evaluation.collect import collect
from carrara.evaluation.features import Pixels, open_features, preparation
from carrara.evaluation.features.classifier import ClassifierFeatures
from carrara.evaluation.features.pretrained import CLIP_MEAN, CLIP_STD, Clip, Dino
from carrara.networks import EncoderClassifier, EncoderClassifierParams
from tests.errors import refused
from tests.evaluation.clips import save_clip


def images(n: int = 4, size: int = 32, channels: int = 3) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights with a vocabulary of a few letters, as transformers saves one."""

    return save_clip(tmp_path_factory.mktemp("clip"))


def test_clip_embeds_images_and_texts_into_one_space(clip_folder: Path) -> None:
    clip = Clip(clip_folder)
    pictures, texts = clip(images(3)), clip.texts(["a cat", "a dog", "a cat"])
    assert pictures.shape == texts.shape == (3, 12)
    torch.testing.assert_close(texts[0], texts[2])
    assert not torch.allclose(texts[0], texts[1])
    assert 0 <= clip_score(pictures, texts).score <= 100


def test_clip_is_the_models_own_calculation(clip_folder: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    clip, model = Clip(clip_folder), CLIPModel.from_pretrained(clip_folder).eval()
    pixels = preparation.standardised(images(2), 16, CLIP_MEAN, CLIP_STD)
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(["a cat", "a dog"], padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=pixels, **tokens)
    ours = torch.nn.functional.normalize(clip(images(2)), dim=1)
    torch.testing.assert_close(ours, out.image_embeds, rtol=1e-5, atol=1e-6)
    ours = torch.nn.functional.normalize(clip.texts(["a cat", "a dog"]), dim=1)
    torch.testing.assert_close(ours, out.text_embeds, rtol=1e-5, atol=1e-6)


def test_long_captions_keep_their_end_token(clip_folder: Path) -> None:
    """CLIP reads a text at its end token; one cut away moved a score from 26 to 16 (torchmetrics #2883)."""
    clip = Clip(clip_folder)
    long = " ".join(["a red cat"] * 40)
    tokens = clip._tokenizer([long], truncation=True, max_length=clip.longest)["input_ids"][0]
    assert len(tokens) == clip.longest == 8
    assert tokens[-1] == clip._tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert torch.isfinite(clip.texts([long])).all()


def test_dino_gives_its_class_token(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"crop_size": {"height": 28, "width": 28}}))
    dino = Dino(tmp_path)
    features = dino(images(2, 40))
    assert features.shape == (2, 16)
    assert "28" in dino.preparation
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    with torch.no_grad():
        expected = model(pixel_values=preparation.standardised(images(2, 40), 28, mean, std)).pooler_output
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)


def test_checksums_tell_weights_apart(clip_folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip_folder)
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(tmp_path)
    assert len(Clip(clip_folder).checksum) == 64
    assert Clip(clip_folder).checksum != Clip(tmp_path).checksum


def test_a_folder_of_something_else_is_told(tmp_path: Path) -> None:
    with refused("missing"):
        Clip(tmp_path)


def test_standardised_is_pillows_resize_and_crop() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    pillow = Image.fromarray(levels).resize((40, 24), Image.Resampling.BICUBIC).crop((8, 0, 32, 24))
    expected = torch.tensor(np.asarray(pillow)).permute(2, 0, 1).float() / 255
    given = torch.tensor(levels).permute(2, 0, 1)[None].float() / 127.5 - 1
    ours = preparation.standardised(given, 24, [0, 0, 0], [1, 1, 1])[0]
    # The two round their filters differently: a level or two of 255, seldom.
    apart = (ours - expected).abs() * 255
    assert float(apart.max()) < 2.1
    assert float((apart > 0.1).double().mean()) < 0.02


def classifier(classes: int = 5) -> EncoderClassifier:
    torch.manual_seed(0)
    params = EncoderClassifierParams(
        image_size=(8, 8),
        in_channels=1,
        channels=32,
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention=(2,),
        num_classes=classes,
    )
    return EncoderClassifier(params)


def test_classifier_features_lead_to_its_logits() -> None:
    network = classifier()
    features = ClassifierFeatures(network)
    x = images(3, 8, 1)
    penultimate = features(x)
    with torch.no_grad():
        logits = network(x, torch.zeros(3))
    out = network.pool.out
    assert isinstance(out, torch.nn.Linear)
    torch.testing.assert_close(out(penultimate), logits, rtol=1e-5, atol=1e-6)
    assert len(features.checksum) == 64


def test_collecting_is_the_same_for_any_batches() -> None:
    x = images(50, 4)
    whole = collect([x], Pixels(), rows=20)
    parts = collect(iter(x.split(7)), Pixels(), rows=20)
    assert whole.content == parts.content
    assert torch.equal(whole.statistics.covariance, parts.statistics.covariance)
    assert torch.equal(whole.rows, parts.rows)
    assert torch.equal(whole.rows, x[:20].flatten(1))
    assert whole.shape == (3, 4, 4)
    assert whole.statistics.count == 50
    assert torch.equal(whole.statistics.mean, Moments.of(x).mean)


def test_content_is_of_pixels_and_order() -> None:
    x = images(6, 4)
    nudged = x.clone()
    nudged[3, 0, 0, 0] = -nudged[3, 0, 0, 0]
    contents = {collect([y], Pixels()).content for y in (x, nudged, x.flip(0))}
    assert len(contents) == 3


def test_bad_streams_are_told() -> None:
    with refused("missing", "n"):
        collect([], Pixels())
    with refused("shape", "resolution"):
        collect([images(2, 4), images(2, 8)], Pixels())
    with refused("not_finite", "features"):
        collect([images(2, 4) * torch.nan], Pixels())


def test_features_open_by_a_word(clip_folder: Path) -> None:
    assert open_features("pixels").name == "pixels"
    clip = open_features(f"clip={clip_folder}")
    assert clip(images(2)).shape == (2, 12)
    with refused("unknown", "features"):
        open_features("incepton=x.pth")
    with refused("missing", "features"):
        open_features("inception")
    with refused("missing", "nowhere"):
        open_features("inception=nowhere")
