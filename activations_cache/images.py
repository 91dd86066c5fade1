"""Images to batches: what a vision model sees at once.

Every image has the same number of positions: its patches, and the class and register tokens that
the model puts before them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import PIL.Image
import torch
from PIL import ImageOps
from torch import Tensor

from saekit.activations_cache import corpus
from saekit.activations_cache.masks import KINDS
from saekit.activations_cache.tokens import START, Cursor, TokenBatch
from saekit.errors import ConfigError, CorpusError, first_line

_IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp")


@runtime_checkable
class ImageModel(Protocol):
    """What is asked of a model here."""

    @property
    def n_positions(self) -> int: ...
    @property
    def special_positions(self) -> frozenset[int]: ...
    def process(self, images: Sequence[PIL.Image.Image]) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Image:
    """One image, under a name that is stable between machines."""

    id: str
    pixels: PIL.Image.Image
    """In RGB, the right way up."""


def images(
    dataset: str,
    *,
    config: str | None = None,
    split: str = "train",
    image_field: str = "image",
    skip: int = 0,
) -> Iterator[Image]:
    """The images of a corpus from number `skip` on, in a fixed order.

    `dataset` is a folder of .png, .jpg, .jpeg and .webp files (at any depth, by name), or a table
    that `corpus.rows` reads, with an image column under `image_field`. Raises CorpusError where it
    cannot be read or lacks the field.
    """
    folder = Path(dataset)
    if folder.is_dir():
        found = (p for p in folder.rglob("*") if p.suffix.lower() in _IMAGE_FILES and p.is_file())
        files = {file.relative_to(folder).as_posix(): file for file in found}
        if files:
            return (_image(name, _opener(files[name])) for name in sorted(files)[skip:])
    wanted = f"image ({', '.join(_IMAGE_FILES)})"
    table = corpus.rows(dataset, config=config, split=split, skip=skip, besides=wanted)
    return (_of_row(name, row, image_field) for name, row in table)


def _opener(source: Path | BytesIO) -> Callable[[], PIL.Image.Image]:
    return lambda: PIL.Image.open(source)


def _image(name: str, load: Callable[[], PIL.Image.Image]) -> Image:
    try:
        with load() as loaded:
            return Image(name, ImageOps.exif_transpose(loaded).convert("RGB"))
    # SyntaxError is what Pillow makes of a broken PNG.
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise CorpusError(
            f"image '{name}' cannot be read: {first_line(error)}. Mend it or leave it out"
        ) from error


def _of_row(name: str, row: Any, field: str) -> Image:
    value = row.get(field) if isinstance(row, dict) else None
    if isinstance(value, dict):
        # As a table stores it that does not say that the column is one of images.
        value = value.get("bytes")
    if isinstance(value, bytes):
        return _image(name, _opener(BytesIO(value)))
    if isinstance(value, PIL.Image.Image):
        return _image(name, lambda: value)
    keys = ", ".join(map(str, row)) if isinstance(row, dict) else f"a {type(row).__name__}"
    raise CorpusError(
        f"row '{name}' has no image under '{field}'; it has: {keys}. Name the field with "
        "--image-field"
    )


def image_batches(
    images: Iterable[Image],
    model: ImageModel,
    batch_size: int,
    *,
    n_tokens: int,
    start: Cursor = START,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[TokenBatch]:
    """Images in passes of `batch_size`, until the corpus has given `n_tokens` positions from its
    beginning, by all ranks together; an image that would pass that number is left out.

    `images` begins with number `start.document` of the corpus. A position counts as the token of
    its number, and a `Cursor` counts images as documents. With several ranks each walks all images
    and gives every `ranks`-th one. Raises ConfigError where not one image fits.
    """
    size = model.n_positions
    if n_tokens < size:
        raise ConfigError(
            f"n_tokens={n_tokens} must be at least {size}: an image is {size} positions, and only "
            "whole images are kept"
        )
    numbered = enumerate(images, start.document)
    room = (n_tokens - start.n_tokens) // size
    own = ((number, image) for number, image in islice(numbered, room) if number % ranks == rank)
    position = torch.arange(size)
    special = torch.tensor([KINDS["special"] * (p in model.special_positions) for p in range(size)])
    while some := list(islice(own, batch_size)):
        shape = (len(some), size)
        last = some[-1][0]
        yield TokenBatch(
            inputs=model.process([image.pixels for _, image in some]),
            kept=torch.ones(shape, dtype=torch.bool),
            token=position.expand(shape),
            position=position.expand(shape),
            mask=special.expand(shape),
            document=torch.arange(len(some))[:, None].expand(shape),
            names=tuple(image.id for _, image in some),
            end=Cursor(last + 1, 0, start.n_tokens + (last + 1 - start.document) * size),
        )
