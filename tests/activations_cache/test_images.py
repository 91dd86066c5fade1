from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pytest
import torch
from torch import Tensor

from saekit.activations_cache.images import Image, image_batches, images
from saekit.activations_cache.tokens import Cursor, TokenBatch
from saekit.errors import ConfigError, CorpusError

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (4, 4)) -> PIL.Image.Image:
    return PIL.Image.new("RGB", size, colour)


@dataclass(frozen=True)
class Patches:
    """What a vision model tells about itself: a class token before four patches."""

    n_positions: int = 5
    special_positions: frozenset[int] = frozenset({0})

    def process(self, images: Sequence[PIL.Image.Image]) -> dict[str, Tensor]:
        reds = [image.getpixel((0, 0)) for image in images]
        return {"pixel_values": torch.tensor(reds)[:, :, None, None].float()}


MODEL = Patches()


def table(path: Path) -> datasets.Dataset:
    path.mkdir()
    for number, colour in enumerate(COLOURS):
        picture(colour).save(path / f"{number}.png")
    files = [str(path / f"{number}.png") for number in range(3)]
    return datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())


@pytest.fixture(params=["folder", "parquet", "saved", "plain bytes"])
def any_images(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Three pictures of one colour each, in every form that they can come in."""
    source = table(tmp_path / "pictures")
    match request.param:
        case "folder":
            return str(tmp_path / "pictures")
        case "parquet":
            source.to_parquet(tmp_path / "pictures.parquet")
        case "saved":
            source.save_to_disk(tmp_path / "saved")
            return str(tmp_path / "saved")
        case _:
            data = [(tmp_path / "pictures" / f"{number}.png").read_bytes() for number in range(3)]
            datasets.Dataset.from_dict({"image": data}).to_parquet(tmp_path / "pictures.parquet")
    return str(tmp_path / "pictures.parquet")


def test_images_are_read_in_order_in_any_form_and_skipping_gives_the_rest(any_images: str) -> None:
    for skip in range(4):
        read = list(images(any_images, skip=skip))
        assert [image.pixels.getpixel((0, 0)) for image in read] == COLOURS[skip:]


def test_names_do_not_depend_on_where_a_corpus_lies(any_images: str, tmp_path: Path) -> None:
    assert not any(str(tmp_path) in image.id for image in images(any_images))


def test_a_folder_is_read_by_name_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("b/two.webp", "c.JPG", "a.png"):
        picture(COLOURS[0]).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("none of them")
    assert [image.id for image in images(str(tmp_path))] == ["a.png", "b/two.webp", "c.JPG"]


def test_images_are_turned_the_right_way_up_and_into_rgb(tmp_path: Path) -> None:
    picture(COLOURS[0], (4, 2)).convert("L").save(tmp_path / "a.png")
    turned = PIL.Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn
    picture(COLOURS[0], (4, 2)).save(tmp_path / "b.jpg", exif=turned)
    grey, sideways = (image.pixels for image in images(str(tmp_path)))
    assert (grey.mode, grey.size) == ("RGB", (4, 2))
    assert sideways.size == (2, 4)


@pytest.mark.parametrize("data", [b"nonsense", b"\x89PNG\r\n\x1a\n"])
def test_an_unreadable_image_is_refused_by_name(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(CorpusError, match=r"image 'a\.png' cannot be read: cannot identify"):
        list(images(str(tmp_path)))


def test_a_truncated_image_is_refused_by_name(tmp_path: Path) -> None:
    PIL.Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match=r"image 'a\.png' cannot be read: "):
        list(images(str(tmp_path)))


@pytest.mark.parametrize("name", ["pictures.parquet", "saved"])
def test_an_unreadable_image_of_a_table_is_refused_by_its_row(name: str, tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    picture(COLOURS[0]).save(good)
    rows = [{"bytes": data, "path": None} for data in (good.read_bytes(), b"nonsense")]
    features = datasets.Features({"image": datasets.Image()})
    made = datasets.Dataset.from_dict({"image": rows}, features=features)
    if name == "saved":
        made.save_to_disk(tmp_path / name)
    else:
        made.to_parquet(tmp_path / name)
    with pytest.raises(
        CorpusError, match=f"'{name}' cannot be read from row 1 on: cannot identify"
    ):
        list(images(str(tmp_path / name)))


def test_a_row_without_an_image_is_refused_with_the_fields_there_are(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"photo": ["x"], "id": [1]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(CorpusError, match="no image under 'image'; it has: photo, id"):
        list(images(str(tmp_path / "rows.parquet")))


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"holds no image \(\.png"):
        list(images(str(tmp_path)))


def some_images(count: int) -> list[Image]:
    return [Image(f"i{number}", picture((number, 0, 0))) for number in range(count)]


def passes(count: int, **options: Any) -> list[TokenBatch]:
    start = options.get("start", Cursor())
    given: dict[str, Any] = {"n_tokens": 10**9} | options
    return list(image_batches(some_images(count)[start.document :], MODEL, 2, **given))


def test_a_batch_of_images_keeps_every_position_and_marks_the_special_ones() -> None:
    first, second = passes(3)
    assert first.names == ("i0", "i1")
    assert first.inputs["pixel_values"][:, 0, 0, 0].tolist() == [0, 1]
    assert first.token.tolist() == first.position.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert first.mask.tolist() == [[1, 0, 0, 0, 0]] * 2
    assert first.document.tolist() == [[0] * 5, [1] * 5]
    assert (first.n_rows, first.n_padding, first.end) == (10, 0, Cursor(2, 0, 10))
    assert (second.names, second.end) == (("i2",), Cursor(3, 0, 15))


def test_an_image_that_would_pass_the_limit_is_left_out() -> None:
    assert [batch.names for batch in passes(9, n_tokens=19)] == [("i0", "i1"), ("i2",)]
    assert passes(9, n_tokens=20)[-1].end == Cursor(4, 0, 20)


def test_a_limit_below_one_image_is_refused() -> None:
    with pytest.raises(ConfigError, match="n_tokens=4 must be at least 5"):
        passes(1, n_tokens=4)


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2)])
def test_from_any_batch_on_a_stream_is_the_rest_of_the_uninterrupted_one(
    rank: int, ranks: int
) -> None:
    options = {"n_tokens": 43, "rank": rank, "ranks": ranks}
    whole = passes(9, **options)
    for number, batch in enumerate(whole):
        rest = passes(9, start=batch.end, **options)
        assert [(b.names, b.end) for b in rest] == [(b.names, b.end) for b in whole[number + 1 :]]


def test_the_ranks_together_give_what_one_gives() -> None:
    shares = [passes(9, n_tokens=38, rank=rank, ranks=3) for rank in range(3)]
    names = [name for share in shares for batch in share for name in batch.names]
    assert sorted(names) == [f"i{number}" for number in range(7)]
    assert shares[1][-1].names[-1] == "i4"
