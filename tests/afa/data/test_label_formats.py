"""Class maps in the formats of annotation tools, read back as these tools do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from afa.data.label_formats import BACKGROUND, MaskWriter, labelme
from afa.data.transforms import voc_palette

NAMES = ["background", "cat", "dog", "sofa"]


def scene() -> np.ndarray:
    """Regions that touch each other and the border, one with a hole, which contains another one, and ignored pixels."""
    y, x = np.mgrid[:80, :100]
    mask = np.zeros((80, 100), np.uint8)
    mask[(y - 40) ** 2 + (x - 50) ** 2 < 30**2] = 1
    mask[(y - 40) ** 2 + (x - 50) ** 2 < 20**2] = 0
    mask[35:46, 45:56] = 2
    mask[60:, 80:] = 3
    mask[10:20, :15] = 1
    mask[20:25, :15] = 2
    mask[70:72, 5:40] = 255
    return mask


def drawn(content: dict[str, object]) -> np.ndarray:
    """The polygons drawn in their order, at four times the size, so that borders fall between pixels."""
    height, width = content["imageHeight"], content["imageWidth"]
    assert isinstance(height, int) and isinstance(width, int) and isinstance(content["shapes"], list)
    canvas = Image.new("L", (4 * width, 4 * height))
    for shape in content["shapes"]:
        index = 0 if shape["label"] == BACKGROUND else NAMES.index(shape["label"])
        ImageDraw.Draw(canvas).polygon([(4 * x - 0.5, 4 * y - 0.5) for x, y in shape["points"]], fill=index)
    return np.asarray(canvas)[2::4, 2::4]


def test_labelme_polygons_draw_the_mask() -> None:
    mask = scene()
    content = labelme(mask, NAMES, "../photo.jpg")
    assert content["imagePath"] == "../photo.jpg"
    labels = [shape["label"] for shape in content["shapes"]]
    assert sorted(labels) == sorted(["cat", "cat", "dog", "dog", "sofa", BACKGROUND])
    expected = np.where(mask == 255, 0, mask)
    found = drawn(content)
    for index in range(4):
        inside, own = found == index, expected == index
        assert (inside & own).sum() / (inside | own).sum() > 0.97, NAMES[index]


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (40, 1)])
def test_labelme_polygons_of_thin_images(shape: tuple[int, int]) -> None:
    mask = np.ones(shape, np.uint8)
    (polygon,) = labelme(mask, NAMES, "a.png")["shapes"]
    assert len(polygon["points"]) >= 3
    assert labelme(0 * mask, NAMES, "a.png")["shapes"] == []


def test_labelme_polygon_of_one_pixel() -> None:
    mask = np.zeros((9, 9), np.uint8)
    mask[4, 6] = 2
    (polygon,) = labelme(mask, NAMES, "a.png")["shapes"]
    points = np.array(polygon["points"])
    assert len(points) >= 3
    np.testing.assert_allclose(points.mean(0), (6.5, 4.5), atol=0.01)


def test_coco_is_read_by_its_own_tools(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    mask = scene()
    writer = MaskWriter(tmp_path, "coco", NAMES)
    writer.write("a", Path("photos/a.jpg"), mask)
    writer.write("more/b", Path("photos/more/b.png"), np.zeros((5, 7), np.uint8))
    writer.finish()
    data = coco.COCO(str(tmp_path / "coco.json"))
    assert [image["file_name"] for image in data.loadImgs([1, 2])] == ["a.jpg", "more/b.png"]
    assert [one["name"] for one in data.loadCats(data.getCatIds())] == NAMES[1:]
    assert data.getAnnIds(imgIds=2) == []
    for one in data.loadAnns(data.getAnnIds(imgIds=1)):
        expected = mask == one["category_id"]
        np.testing.assert_array_equal(data.annToMask(one), expected)
        assert one["area"] == expected.sum()
        rows, columns = np.nonzero(expected)
        x, y, width, height = one["bbox"]
        assert (x, y, width, height) == (
            columns.min(),
            rows.min(),
            columns.max() + 1 - columns.min(),
            rows.max() + 1 - rows.min(),
        )


def test_pictures(tmp_path: Path) -> None:
    mask = scene()
    for kind in ("palette", "index"):
        (tmp_path / kind).mkdir()
        writer = MaskWriter(tmp_path / kind, kind, NAMES)
        writer.write("a", Path("a.jpg"), mask)
        writer.finish()
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / kind / "a.png")), mask)
    assert Image.open(tmp_path / "index/a.png").mode == "L"
    palette = Image.open(tmp_path / "palette/a.png").getpalette()
    assert palette is not None and palette[: 3 * 4] == voc_palette()[:4].reshape(-1).tolist()


def test_labelme_file_points_to_the_image(tmp_path: Path) -> None:
    (tmp_path / "masks/more").mkdir(parents=True)
    writer = MaskWriter(tmp_path / "masks", "labelme", NAMES)
    writer.write("more/a", tmp_path / "photos/more/a.jpg", scene())
    content = json.loads((tmp_path / "masks/more/a.json").read_text())
    assert (tmp_path / "masks/more" / content["imagePath"]).resolve() == tmp_path / "photos/more/a.jpg"
