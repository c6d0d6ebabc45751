from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from afa.config import Config
from afa.data.visualize import PALETTE, class_color, heat, overlay, save_mask
from afa.errors import UserError
from afa.evaluation.diagnostics import Diagnosis
from afa.evaluation.result import EvalResult, Example, Scores
from afa.report.curves import nice_ticks
from afa.report.page import read_log, write_report
from afa.report.pictures import affinity_map
from afa.report.results import duration, load_result, make_report, save_result
from afa.report.tables import confusion

CLASSES = ["star", "<ring>"]


def _row(value: float) -> Scores:
    iou = [value, value / 2, math.nan]
    confusion = [[800, 40, 0], [90, 60, 10], [0, 0, 0]]
    return {"miou": value, "iou": iou, "pixel_acc": value + 0.01, "mean_acc": value + 0.02, "confusion": confusion}


@pytest.fixture
def result() -> EvalResult:
    rng = np.random.default_rng(0)
    samples: list[Example] = []
    for index in range(3):
        truth = np.zeros((20, 30), np.int64)
        truth[5:12, 5:15] = 1
        truth[4, 5:15] = 255
        prediction = truth.copy()
        prediction[5:12, 5:10] = 2
        image = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
        cam = rng.random((20, 30)).astype(np.float32)
        samples.append(
            Example(
                name=f"v{index}&",
                image=image,
                tags=["star"],
                cam=cam,
                cam_label=truth.copy(),
                walk_label=truth.copy(),
                par_label=truth.copy(),
                prediction=prediction,
                truth=truth,
                iou=0.25 + 0.25 * index,
            )
        )
    scores = {sample["name"]: sample["iou"] for sample in samples}
    first, walk, par, seg = (_row(value) for value in (0.4, 0.45, 0.5, 0.615))
    return EvalResult(first, walk, par, seg, f1=0.9, seconds=3.0, images=40, samples=samples, image_iou=scores)


def _log(run: Path) -> None:
    rows = []
    for i in range(10, 1010, 10):
        phase = "classify" if i <= 200 else "par" if i <= 500 else "walk"
        other = None if phase == "classify" else 1 / i
        rows.append({"iteration": i, "phase": phase, "loss_cls": 5 / i, "loss_seg": other, "loss_aff": other})
        if i in (500, 1000):
            rows.append({"iteration": i, **{f"val_{row}_miou": i / 2000 for row in ("cam", "walk", "par", "seg")}})
    run.mkdir(parents=True, exist_ok=True)
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 1010, "lo')


class _Page(HTMLParser):
    """Tags of a page that are not closed or closed in the wrong order, its addresses and its text."""

    VOID = frozenset({"meta", "img", "br", "link", "rect", "line", "path", "circle"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_complete_and_self_contained(tmp_path: Path, result: EvalResult) -> None:
    _log(tmp_path)
    path = write_report(tmp_path, result, CLASSES, facts={"Backbone": "a & b"}, title="Trial <1>")
    assert path == tmp_path / "report.html"
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert re.search(r"url\(|@import|https?://", text) is None
    assert "$" not in text  # every placeholder of the template was filled
    assert len(page.addresses) == 3 * 6  # three rows: image, CAM, walk, PAR label, prediction, truth
    picture = Image.open(io.BytesIO(base64.b64decode(page.addresses[0].partition(",")[2])))
    assert picture.size == (30, 20)
    for words in ("Trial <1>", "a & b", "<ring>", "v0&", "0.615", "+0.215", "0.400", "0.450", "0.500"):
        assert words in page.text, words
    for head in ("Image", "Tags", "CAM", "Walk", "PAR label", "Prediction", "Truth", "ignored"):
        assert head in page.text
    assert text.count(class_color(1)) >= 4
    assert list(tmp_path.glob(".*")) == []


def test_curves(tmp_path: Path, result: EvalResult) -> None:
    _log(tmp_path)
    text = write_report(tmp_path, result, CLASSES).read_text(encoding="utf-8")
    charts = re.findall(r"<svg.*?</svg>", text)
    assert [re.search(r'aria-label="([^"]*)"', chart)[1] for chart in charts] == [  # type: ignore[index]
        "Classification loss by iteration",
        "Segmentation loss by iteration",
        "Affinity loss by iteration",
        "Validation mIoU by iteration",
    ]
    for chart in charts:
        for label in (">tags<", ">PAR labels<", ">walk labels<"):
            assert label in chart
        assert all(f'class="phase-{number}"' in chart for number in range(3))
        assert "NaN" not in chart
        assert "nan" not in chart
        spans = re.findall(r'<rect class="phase-\d" x="([\d.]+)" y="\d+" width="([\d.]+)"', chart)
        edges = [(float(x), float(x) + float(width)) for x, width in spans]
        # Both numbers are rounded to a tenth.
        assert [end for _, end in edges[:-1]] == pytest.approx([start for start, _ in edges[1:]], abs=0.11)
    first = [float(re.search(r'class="raw"[^>]* d="M([\d.]+)', chart)[1]) for chart in charts[:3]]  # type: ignore[index]
    assert first[0] < first[1] == first[2]  # the other two losses start with their phase
    assert charts[3].count("<circle") == 8


def _diagnosed(result: EvalResult) -> EvalResult:
    miou = {"cam": 0.4, "walk": 0.45, "par": 0.5, "walk_identity": 0.391, "walk_oracle": 0.631, "walk_par": 0.52}
    curves = {
        row: [0.2 + 0.01 * i for i in range(11)] + [value] for row, value in zip(miou, (0.41, 0.46, 0.51), strict=False)
    }
    affinity = {"different": 0.211, "background": 0.911, "object": 0.811, "auc": 0.877}
    result.diagnosis = Diagnosis(38, miou, curves, affinity)
    for sample in result.samples:
        sample["token"], sample["affinity"] = (0.25, 0.75), np.linspace(0, 1, 24, dtype=np.float32).reshape(4, 6)
    return result


def test_diagnosis_is_saved_and_shown(tmp_path: Path, result: EvalResult) -> None:
    before = _diagnosed(result)
    save_result(tmp_path, before, CLASSES, Config(), {})
    after = load_result(tmp_path)[0]
    assert after.diagnosis == before.diagnosis
    assert after.samples[0]["token"] == (0.25, 0.75)
    np.testing.assert_allclose(after.samples[0]["affinity"], before.samples[0]["affinity"], atol=1e-3)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = _Page(text)
    assert page.open == []
    for words in ("38 images", "0.391", "0.631", "0.520", "0.410 at 0.65", "0.211", "0.911", "0.811", "0.877"):
        assert words in page.text, words
    assert 'aria-label="mIoU by background score (%)"' in text
    assert "Affinity" in page.text
    assert len(page.addresses) == 3 * 7
    samples = after.samples
    del samples[0]["token"], samples[0]["affinity"]  # like a run evaluated by an earlier version
    assert len(_Page(write_report(tmp_path, after, CLASSES).read_text(encoding="utf-8")).addresses) == 3 * 6


def test_affinity_map_marks_the_token() -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    affinity = np.zeros((4, 6), np.float32)
    affinity[3, 5] = 1
    drawn = affinity_map(image, affinity, (0.375, 0.25))
    assert drawn.shape == image.shape
    bright = drawn.sum(-1)
    assert (bright[30:, 50:] > 400).all(), "the affine token"
    assert (bright[10:20, 10:20] == 765).any(), "the ring"
    assert (bright[20:30] < 200).all()


def test_curve_of_the_dense_energy(tmp_path: Path, result: EvalResult) -> None:
    """It is negative: the chart ends at 0 and has room for all values."""
    _log(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()[:-1]]
    for row in rows:
        if "phase" in row:
            row["loss_energy"] = None if row["phase"] == "classify" else -row["iteration"] / 100
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report(tmp_path, result, CLASSES).read_text(encoding="utf-8")
    chart = next(chart for chart in re.findall(r"<svg.*?</svg>", text) if 'aria-label="Dense energy loss by' in chart)
    labels = [float(label) for label in re.findall(r'text-anchor="end">(-?[\d.]+)</text>', chart)]
    assert labels[:-1] == [-10, -5, 0] and labels[-1] > -10
    line = re.search(r'class="raw"[^>]* d="M([^"]*)"', chart)
    assert line is not None
    heights = [float(point.split()[1]) for point in line[1].split("L")]
    assert heights == sorted(heights) and len(set(heights)) == len(heights)


def test_page_without_log_and_samples(tmp_path: Path, result: EvalResult) -> None:
    result.samples = []
    del result.seg["confusion"]  # like a run evaluated by an earlier version
    page = _Page(write_report(tmp_path, result, CLASSES).read_text(encoding="utf-8"))
    assert page.open == []
    assert "no training log" in page.text
    assert "eval.report_images" in page.text
    assert "predicted as" not in page.text


def test_read_log_merges_rows_and_skips_an_incomplete_line(tmp_path: Path) -> None:
    _log(tmp_path)
    rows = read_log(tmp_path / "log.jsonl")
    assert [row["iteration"] for row in rows] == list(range(10, 1010, 10))
    assert rows[-1]["val_seg_miou"] == 0.5
    assert rows[-1]["loss_cls"] == 0.005
    assert read_log(tmp_path / "none.jsonl") == []


def test_result_survives_the_disk(tmp_path: Path, result: EvalResult) -> None:
    _log(tmp_path)
    save_result(tmp_path, result, CLASSES, Config(), {"seconds": 100.0, "config": "demo", "environment": {}})
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [metrics[f"{row}_miou"] for row in ("cam", "walk", "par", "seg")] == [0.4, 0.45, 0.5, 0.615]
    assert metrics["seconds"] == 100.0
    assert metrics["per_class"]["seg"] == {"background": 0.615, "star": 0.3075, "<ring>": None}
    again, classes, _ = load_result(tmp_path)
    assert classes == CLASSES
    assert again.seg["iou"][:2] == result.seg["iou"][:2]
    assert math.isnan(again.seg["iou"][2])
    assert again.samples[1]["tags"] == ["star"]
    for key in ("image", "truth", "prediction", "walk_label"):
        assert np.array_equal(again.samples[1][key], result.samples[1][key])
    assert np.abs(again.samples[1]["cam"] - result.samples[1]["cam"]).max() < 1e-3
    assert again.seg["confusion"] == result.seg["confusion"]
    assert again.image_iou == result.image_iou
    assert [sample["iou"] for sample in again.samples] == [0.25, 0.5, 0.75]
    before = (tmp_path / "report.html").read_bytes()
    (tmp_path / "report.html").unlink()
    make_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before


def test_tables(tmp_path: Path, result: EvalResult) -> None:
    result.crf = _row(0.7)
    result.best, result.worst = [result.samples[2]], [result.samples[0]]
    save_result(tmp_path, result, CLASSES, Config(), {"seconds": 1.0})
    rows = list(csv.reader((tmp_path / "metrics.csv").open(encoding="utf-8")))
    assert rows[0] == ["class", "cam", "walk", "par", "seg", "crf"]
    assert rows[2] == ["star", "0.200000", "0.225000", "0.250000", "0.307500", "0.350000"]
    assert rows[3] == ["<ring>", "", "", "", "", ""]
    assert [row[0] for row in rows[4:]] == ["(miou)", "(pixel_acc)", "(mean_acc)"]
    assert rows[4][-1] == "0.700000"
    assert (tmp_path / "images.csv").read_text() == "image,miou\nv0&,0.250000\nv1&,0.500000\nv2&,0.750000\n"
    rows = list(csv.reader((tmp_path / "confusion.csv").open(encoding="utf-8")))
    assert rows == [
        ["true", "background", "star", "<ring>"],
        ["background", "800", "40", "0"],
        ["star", "90", "60", "10"],
        ["<ring>", "0", "0", "0"],
    ]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["crf_miou"] == 0.7 and metrics["per_class"]["crf"]["star"] == 0.35
    expected = {"longer_side": None, "scales": [1.0], "flip": False, "fusion": "max", "crf": False}
    assert metrics["test_time"] == expected
    again = load_result(tmp_path)[0]
    assert again.rows.keys() == result.rows.keys()
    assert again.crf is not None and again.crf["confusion"] == [[800, 40, 0], [90, 60, 10], [0, 0, 0]]
    assert [[sample["name"] for sample in group] for group in (again.best, again.worst)] == [["v2&"], ["v0&"]]

    # A split without masks has no tables, and those of an earlier evaluation are removed.
    nothing = {**_row(math.nan), "iou": [math.nan] * 3}
    save_result(
        tmp_path,
        EvalResult(nothing, nothing, nothing, nothing, f1=0.5, seconds=1.0, images=40, has_masks=False),
        CLASSES,
        Config(),
        {},
    )
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "samples.npz", "report.html"}
    again = load_result(tmp_path)[0]
    assert not again.has_masks and again.f1 == 0.5 and math.isnan(again.seg["miou"])


def test_damaged_runs_and_runs_without_evaluation_are_reported(tmp_path: Path, result: EvalResult) -> None:
    with pytest.raises(UserError, match=r"metrics\.json does not exist.*afa evaluate"):
        make_report(tmp_path)
    save_result(tmp_path, result, CLASSES, Config(), {})
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"metrics\.json.*damaged.*afa evaluate"):
        make_report(tmp_path)


def test_failing_write_leaves_the_old_file(tmp_path: Path, result: EvalResult, monkeypatch: pytest.MonkeyPatch) -> None:
    save_result(tmp_path, result, CLASSES, Config(), {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(UserError, match=r"samples\.npz can't be written: No space left on device"):
        save_result(tmp_path, result, CLASSES, Config(), {"seconds": 1.0})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_mask_file_is_a_voc_palette_png(tmp_path: Path) -> None:
    mask = np.array([[0, 1, 20], [255, 2, 0]])
    save_mask(tmp_path / "deep/mask.png", mask)
    image = Image.open(tmp_path / "deep/mask.png")
    assert image.mode == "P"
    assert np.array_equal(np.asarray(image), mask)
    assert np.array_equal(np.asarray(image.convert("RGB")), PALETTE[mask])


def test_overlay_and_heat() -> None:
    picture = np.full((8, 8, 3), 100, np.uint8)
    mask = np.zeros((8, 8), np.int64)
    mask[2:7, 2:7] = 1  # VOC's class 1 is red
    laid = overlay(picture, mask)
    assert laid[4, 4, 0] > laid[4, 4, 1] + 50
    assert (laid[0, 0] < 100).all()
    assert laid[2, 4].min() > 180  # a light outline
    warm = heat(picture, np.linspace(0, 1, 64).reshape(8, 8))
    brightness = warm.astype(int).sum(-1).reshape(-1)
    assert (np.diff(brightness) >= -2).all()
    stacked = np.stack([np.zeros((8, 8)), np.linspace(0, 1, 64).reshape(8, 8)])
    assert np.array_equal(heat(picture, stacked), warm)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.5, 1.0]), (0, 0.7, [0, 0.2, 0.4, 0.6]), (10, 20000, [5000, 10000, 15000, 20000])],
)
def test_nice_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("seconds", "text"), [(48.2, "48 s"), (59.9, "1 min 0 s"), (400, "6 min 40 s"), (33240, "9 h 14 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sections_of_a_full_run(tmp_path: Path, result: EvalResult) -> None:
    _log(tmp_path)
    result.crf = _row(0.7)
    result.best, result.worst = [result.samples[2]], [result.samples[0]]
    (tmp_path / "snapshots").mkdir()
    for iteration, phase in ((200, "classify"), (500, "par"), (1000, "walk")):
        maps = {key: np.ones((20, 30), np.uint8) for key in ("cam", "par", "walk", "prediction")}
        arrays: dict[str, Any] = {
            f"0_{key}": value for key, value in {"image": np.zeros((20, 30, 3), np.uint8), **maps}.items()
        }
        about = np.array(json.dumps([{"name": "t<7>", "tags": ["star"], "phase": phase}]))
        np.savez(tmp_path / f"snapshots/{iteration:08d}.npz", about=about, **arrays)
    text = write_report(tmp_path, result, CLASSES).read_text(encoding="utf-8")
    page = _Page(text)
    assert page.open == []
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        *("Scores", "Training", "IoU by class", "Confusion matrix", "How the labels develop"),
        *("Best and worst images", "Examples"),
    ]
    # The main tile and the highlighted row show the CRF, the last row.
    assert re.findall(r'<tr class="main">.*?<b>(.*?)</b>', text) == ["Segmentation + CRF"]
    assert '<div class="tile card main"><b>0.700</b>' in text and "+0.300" in page.text
    # One image, three phases; of the first, walk and prediction are not trained.
    part = text.partition("How the labels develop</h2>")[2].partition("<h2>")[0]
    assert part.count("not trained yet") == 2
    assert part.count("<img") == 1 + 3 * 4 - 2
    assert re.findall(r'<div class="when"><b>(.*?)</b>(.*?)</div>', part) == [
        ("tags", "200"),
        ("PAR labels", "500"),
        ("walk labels", "1,000"),
    ]
    assert "t<7>" in page.text
    assert text.count("IoU 0.75") == 2 and text.count("IoU 0.25") == 2  # as best or worst, and as an example
    # 90 of 160 star pixels are predicted as background.
    assert "56.2% of star predicted as background" in text
    assert re.search(r"56\.2%</td><td>.*?star</td><td>.*?background</td>", text)


def test_large_confusion_is_listed_and_not_drawn() -> None:
    names = [f"class{i}" for i in range(40)]
    counts = np.diag(np.full(40, 100))
    counts[7, 9] = 25
    large = confusion(counts.tolist(), names)
    assert large["matrix"] is None
    assert [(pair["share"], pair["true"], pair["predicted"]) for pair in large["pairs"]] == [
        ("20.0%", "class7", "class9")
    ]
    assert len(confusion(counts[:20, :20].tolist(), names[:20])["matrix"]) == 20


def test_page_without_masks(tmp_path: Path, result: EvalResult) -> None:
    nothing = {**_row(math.nan), "iou": [math.nan] * 3}
    for sample in result.samples:
        sample["truth"][:] = 255
        sample["iou"] = math.nan
    empty = EvalResult(
        nothing, nothing, nothing, nothing, f1=0.5, seconds=1.0, images=40, has_masks=False, samples=result.samples
    )
    text = write_report(tmp_path, empty, CLASSES).read_text(encoding="utf-8")
    page = _Page(text)
    assert page.open == [] and "nan" not in text
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Training", "Examples"]
    assert "0.500" in page.text and "has no masks" in page.text
    assert "Truth" not in page.text and len(page.addresses) == 3 * 5
