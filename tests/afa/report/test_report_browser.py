"""report.html in a browser: wide and narrow, light and dark. Skipped without Chromium."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from afa.config import Config
from afa.evaluation.result import EvalResult, Example, Scores
from afa.report.results import save_result
from afa.run import SNAPSHOTS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to look at the page with")

CLASSES = ["diningtable", "motorbike", "a class with quite a long name", *(f"class {i}" for i in range(17))]
WIDTHS = (1440, 800, 390, 320)


def _chromium(tmp_path: Path, page: Path, *options: str, dark: bool = False) -> tuple[str, str]:
    """stdout, and what the page wrote to its console."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"),
        *("--enable-logging=stderr", "--log-level=0", f"--user-data-dir={tmp_path / 'profile'}"),
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        *options,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of an artificial run with all sections: 21 classes, a CRF, three phases, long names."""
    run = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    names = ["background", *CLASSES]

    def row(value: float) -> Scores:
        iou = np.clip(value + rng.normal(0, 0.15, len(names)), 0, 1).tolist()
        counts = rng.integers(0, 60, (len(names), len(names))) + np.diag(np.full(len(names), 900))
        return {"miou": value, "iou": iou, "pixel_acc": 0.9, "mean_acc": 0.7, "confusion": counts.tolist()}

    def label() -> np.ndarray:
        mask = np.zeros((60, 90), np.uint8)
        mask[10:40, 20:70] = rng.integers(1, 21)
        mask[40:44, 20:70] = 255
        return mask

    def sample(i: int) -> Example:
        return Example(
            name=f"2007_{i:06d}",
            image=rng.integers(0, 256, (60, 90, 3)).astype(np.uint8),
            tags=CLASSES[:3],
            cam=rng.random((60, 90)),
            cam_label=label(),
            walk_label=label(),
            par_label=label(),
            prediction=label(),
            truth=label(),
            iou=float(rng.random()),
        )

    cam, walk, par, seg = (row(value) for value in (0.5, 0.55, 0.6, 0.63))
    result = EvalResult(cam, walk, par, seg, f1=0.9, seconds=100.0, images=1449, samples=[sample(i) for i in range(3)])
    result.crf, result.best, result.worst = row(0.66), [sample(8)], [sample(9)]
    lines = []
    for i in range(100, 20100, 100):
        phase = "classify" if i <= 2000 else "par" if i <= 6000 else "walk"
        lines.append({"iteration": i, "phase": phase, "loss_cls": 100 / i, "loss_seg": 80 / i, "loss_aff": 0.3})
        if i % 2000 == 0:
            lines.append({"iteration": i, **{f"val_{key}_miou": i / 40000 for key in ("cam", "walk", "par", "seg")}})
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / SNAPSHOTS).mkdir()
    for iteration, phase in ((2000, "classify"), (6000, "par"), (20000, "walk")):
        about = [{"name": f"2008_{i:06d}", "tags": CLASSES[:2], "phase": phase} for i in range(2)]
        arrays: dict[str, Any] = {
            f"{i}_{key}": sample(0)["image"] if key == "image" else label()
            for i in range(2)
            for key in ("image", "cam", "par", "walk", "prediction")
        }
        np.savez(run / SNAPSHOTS / f"{iteration:08d}.npz", about=np.array(json.dumps(about)), **arrays)
    save_result(run, result, CLASSES, Config(), {"seconds": 33240.0, "config": "voc", "date": "2026-01-02T03:04:05"})
    return run / "report.html"


def _measuring(page: Path, out: Path) -> Path:
    """A page that shows `page` in frames of several widths and records the width of each frame's content, the size of
    overflowing elements, images that failed to load, and text with low contrast (WCAG AA)."""
    frames = "".join(
        f'<iframe width="{width}" height="900" srcdoc="{html.escape(page.read_text(encoding="utf-8"))}"></iframe>'
        for width in WIDTHS
    )
    script = """
    function rgb(text) {
      const box = document.createElement('canvas'); box.width = box.height = 1;
      const pen = box.getContext('2d', {willReadFrequently: true}); pen.fillStyle = text; pen.fillRect(0, 0, 1, 1);
      return pen.getImageData(0, 0, 1, 1).data;
    }
    function light(c) {
      const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
      const [r, g, b] = [...c].slice(0, 3).map(v => linear(v / 255));
      return .2126 * r + .7152 * g + .0722 * b;
    }
    function ground(element) {
      for (let e = element; e; e = e.parentElement) {
        const color = getComputedStyle(e).backgroundColor;
        if (rgb(color)[3] === 255) return rgb(color);
      }
      return rgb('white');
    }
    addEventListener('load', () => {
      const found = [...document.querySelectorAll('iframe')].map(frame => {
        const page = frame.contentDocument, root = page.documentElement;
        const faint = [...page.querySelectorAll('main *')].filter(e => {
          if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || e.closest('svg')) return false;
          const a = light(rgb(getComputedStyle(e).color)), b = light(ground(e));
          return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) < (e.closest('.cell') ? 3 : 4.5);
        }).map(e => e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 20));
        return {
          width: frame.clientWidth, content: root.scrollWidth, height: root.scrollHeight,
          broken: [...page.images].filter(i => !i.naturalWidth).length, pictures: page.images.length,
          faint: [...new Set(faint)],
        };
      });
      document.body.innerHTML = '<pre id="found">' + JSON.stringify(found) + '</pre>';
    });
    """
    out.write_text(f"<!doctype html><meta charset=utf-8><body>{frames}<script>{script}</script>", encoding="utf-8")
    return out


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_fits_and_is_readable_at_every_width(page: Path, tmp_path: Path, dark: bool) -> None:
    measuring = _measuring(page, tmp_path / "measure.html")
    shown, console = _chromium(tmp_path, measuring, "--dump-dom", "--virtual-time-budget=5000", dark=dark)
    assert console == ""
    match = re.search(r'<pre id="found">(.*?)</pre>', shown, re.DOTALL)
    assert match is not None, shown[:2000]
    for frame, width in zip(json.loads(html.unescape(match[1])), WIDTHS, strict=True):
        assert frame["width"] == width
        assert frame["content"] <= width, f"the page is wider than the screen of {width} pixels"
        assert frame["height"] > 2000 and frame["pictures"] > 50 and frame["broken"] == 0
        assert frame["faint"] == []


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_screenshot(page: Path, tmp_path: Path, dark: bool) -> None:
    path = tmp_path / "page.png"
    _, console = _chromium(tmp_path, page, f"--screenshot={path}", "--window-size=1280,2400", dark=dark)
    assert console == ""
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert picture.shape[1] == 1280
    # The margin is the page's color, and every band of the page has something in it.
    assert picture[5, 5].tolist() == ([17, 20, 26] if dark else [246, 247, 249])
    assert (picture.mean() < 80) == dark and (picture.mean() > 180) != dark
    for band in np.array_split(picture @ [1 << 16, 1 << 8, 1], 12):
        assert len(np.unique(band)) > 20
    bars = picture[(np.abs(picture - ([79, 201, 194] if dark else [11, 127, 122])).sum(-1) < 6)]
    assert len(bars) > 5000, "the bars of the CRF row"


@pytest.mark.slow
def test_the_check_of_the_console_can_fail(tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text("<body><script>console.error('bad news')</script>")
    assert "bad news" in _chromium(tmp_path, tmp_path / "bad.html", "--dump-dom")[1]
