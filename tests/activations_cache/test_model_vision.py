"""Vision models: files, image processors and positions. The contract stands in test_model.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from saekit.activations_cache.model import LanguageModel, load, wrap
from saekit.activations_cache.model_vision import VisionModel
from saekit.errors import ConfigError, CorpusError, ModelError

_IMAGE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
_TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT without an image processor."""
    folder = tmp_path_factory.mktemp("vit")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTModel(ViTConfig(**_IMAGE)).save_pretrained(folder)
    return folder


def vision(name: str) -> VisionModel:
    model = load(name)
    assert isinstance(model, VisionModel)
    return model


def test_positions_are_patches_and_special_ones_before_them(folder: Path) -> None:
    model = vision(str(folder))
    assert (model.n_positions, model.special_positions) == (10, frozenset({0}))
    config = Dinov2WithRegistersConfig(**_IMAGE, num_register_tokens=3)
    model = VisionModel("d", "f", Dinov2WithRegistersModel(config))
    assert (model.n_positions, model.special_positions) == (13, frozenset(range(4)))


def test_special_positions_do_not_depend_on_their_place_in_the_image(folder: Path) -> None:
    """Positions that are called special hold no patch: before the first block, they do not change
    with the image, and all others do."""
    config = Dinov2WithRegistersConfig(**_IMAGE, num_register_tokens=3)
    for model in (
        vision(str(folder)),
        VisionModel("d", "f", Dinov2WithRegistersModel(config)),
    ):
        seen = model.capture({"pixel_values": torch.randn(2, 3, 12, 12)}, ["resid_pre.0"])
        one, other = seen["resid_pre.0"]
        same = {i for i in range(model.n_positions) if one[i].equal(other[i])}
        assert same == model.special_positions


def test_images_are_resized_and_scaled_where_no_processor_comes_with_the_model(
    folder: Path,
) -> None:
    images = [Image.new("RGB", (30, 20), (255, 255, 255)), Image.new("L", (5, 5), 0)]
    pixels = vision(str(folder)).process(images)["pixel_values"]
    assert pixels.shape == (2, 3, 12, 12)
    torch.testing.assert_close(pixels[0], torch.ones(3, 12, 12))
    torch.testing.assert_close(pixels[1], -torch.ones(3, 12, 12))


def test_the_processor_in_the_folder_is_used(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "size": {"height": 12, "width": 12}, '
        '"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}'
    )
    white = Image.new("RGB", (3, 3), (255, 255, 255))
    pixels = vision(str(tmp_path)).process([white])["pixel_values"]
    torch.testing.assert_close(pixels, torch.ones(1, 3, 12, 12))
    pixels = vision(str(tmp_path)).process([Image.new("RGB", (3, 3))])["pixel_values"]
    torch.testing.assert_close(pixels, torch.zeros(1, 3, 12, 12))
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "Nonesuch"}')
    with pytest.raises(ModelError, match="image processor of .* cannot be loaded"):
        load(str(tmp_path))


def test_an_image_that_cannot_be_prepared_is_refused(folder: Path) -> None:
    model = vision(str(folder))

    def refuse(**_: object) -> None:
        raise ValueError("too flat")

    model.processor = refuse
    with pytest.raises(CorpusError, match="cannot be prepared for .*: too flat"):
        model.process([Image.new("RGB", (1, 1))])


def test_the_vision_tower_of_a_whole_clip_is_taken(tmp_path: Path) -> None:
    clip = CLIPModel(CLIPConfig(text_config=_TEXT, vision_config=_IMAGE))
    clip.save_pretrained(tmp_path)
    model, built = vision(str(tmp_path)), wrap(clip)
    pixels = {"pixel_values": torch.randn(2, 3, 12, 12)}
    expected = clip.vision_model(**pixels).last_hidden_state
    for one in (model, built):
        torch.testing.assert_close(one.capture(pixels, ["resid_post.1"])["resid_post.1"], expected)
    assert model.special_positions == {0}


def test_a_model_in_low_precision_takes_the_same_pixels(folder: Path) -> None:
    model = load(str(folder), dtype=torch.bfloat16)
    assert isinstance(model, VisionModel)
    inputs = model.process([Image.new("RGB", (12, 12))])
    assert model.capture(inputs, ["resid_post.1"])["resid_post.1"].dtype == torch.bfloat16


def test_a_vision_model_is_no_language_model(folder: Path) -> None:
    with pytest.raises(ModelError, match="reads no text"):
        LanguageModel.load(str(folder))
    with pytest.raises(ConfigError, match="the bridge is for language models"):
        load(str(folder), backend="transformer_lens")
