"""Vision transformers: images in, activations at every patch out.

Axes: batch (images), pos (special positions first, then patches row by row), d.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from saekit.activations_cache import hooks
from saekit.activations_cache.model_base import Model
from saekit.errors import CorpusError, ModelError, first_line


class VisionModel(Model):
    """A ViT, a CLIP vision tower or a DINOv2 of transformers, and its image processor."""

    def __init__(self, name: str, fingerprint: str, model: Any, processor: Any = None) -> None:
        """A model that has a vision tower inside, such as CLIP's, is reduced to that. `processor`
        where images are not simply to be resized to the model's size and scaled to [-1, 1].

        Raises ModelError for an architecture without hook points.
        """
        tower = getattr(model, "vision_model", model)
        self.config: Any = tower.config
        points = hooks.hook_points(tower, self.config.model_type)
        super().__init__(name, fingerprint, tower, points)
        self.processor = _default_processor(self.config) if processor is None else processor

    def process(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What a pass takes for these images: `pixel_values` [batch, channel, height, width].

        Raises CorpusError for an image that the processor cannot take.
        """
        colour = [image.convert("RGB") for image in images]
        try:
            pixels = self.processor(images=colour, return_tensors="pt")["pixel_values"]
        except (ValueError, TypeError, OSError) as error:
            raise CorpusError(
                f"an image cannot be prepared for '{self.name}': {first_line(error)}. Leave it out"
            ) from error
        return {"pixel_values": pixels}

    @cached_property
    def n_positions(self) -> int:
        """Positions of an image: special ones and patches."""
        seen: list[int] = []
        with (
            torch.no_grad(),
            hooks.attached({self.points["resid_pre.0"]: lambda x: seen.append(x.shape[1])}),
        ):
            self._run(self._probe())
        return seen[0]

    @cached_property
    def special_positions(self) -> frozenset[int]:
        """Positions of no patch: the classification token, and registers behind it."""
        height, width = self._probe()["pixel_values"].shape[2:]
        size = self.config.patch_size
        down, across = (size, size) if isinstance(size, int) else size
        return frozenset(range(self.n_positions - (height // down) * (width // across)))

    def _run(self, inputs: Mapping[str, Tensor]) -> Any:
        pixels = inputs["pixel_values"].to(self.device, self.model.dtype)
        return self.model(**{**inputs, "pixel_values": pixels})

    def _shape(self, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
        return len(inputs["pixel_values"]), self.n_positions

    def _probe(self) -> dict[str, Tensor]:
        return self.process([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8))])


def image_processor(path: str) -> Any:
    """The image processor that comes with a model, or None where it comes with none.

    It works with Pillow, so that the pixels do not depend on whether torchvision is installed.
    Raises ModelError for one that cannot be used.
    """
    from transformers import AutoImageProcessor
    from transformers.models.auto.image_processing_auto import get_image_processor_config

    try:
        if not get_image_processor_config(path):
            return None
        return AutoImageProcessor.from_pretrained(path, backend="pil")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the image processor of '{path}' cannot be loaded: {first_line(error)}. Mend its "
            "preprocessor_config.json, or remove it to have images resized and scaled to [-1, 1]"
        ) from error


def _default_processor(config: Any) -> Any:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    half = [0.5, 0.5, 0.5]
    return ViTImageProcessorPil(
        size={"height": height, "width": width}, image_mean=half, image_std=half
    )
