"""`afa app` in a browser: a photograph goes in, a mask comes out. Skipped without Gradio, Playwright or Chromium."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from afa.data.transforms import voc_palette
from afa.model import build_model
from afa.model.network import save_model
from afa.run import MODEL
from tests.afa.conftest import TinyConfig

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to look at the page with"), pytest.mark.slow]

WAIT = 60_000
"""Milliseconds."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, tiny_config: TinyConfig) -> Iterator[str]:
    """The page of a model with random weights, served by the command."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    run.mkdir()
    torch.manual_seed(0)
    config = tiny_config()
    network = build_model(config.model, 3)
    torch.nn.init.normal_(network.decoder.get_parameter("predict.weight"))
    save_model(run / MODEL, network, config, ["cat", "dog", "a <b>sofa</b>"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "afa", "app", str(run), "--port", port, "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            lines = iter(server.stdout.readline, "")
            found = next((match[0] for line in lines if (match := re.search(r"http://\S+", line))), None)
            assert found is not None, "the command printed no address"
            _wait_for(found)
            yield found
        finally:
            server.terminate()


def _wait_for(address: str) -> None:
    end = time.monotonic() + WAIT / 1000
    while True:
        try:
            with urllib.request.urlopen(address):
                return
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.2)  # until the next try


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1280, "height": 1400})
        page.goto(address)
        page.wait_for_selector("#photograph", timeout=WAIT)
        yield page
        browser.close()


def _open(page: Any, photograph: Path) -> None:
    page.locator("#photograph input[type=file]").set_input_files(photograph)


def test_a_photograph_goes_in_and_a_mask_comes_out(page: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    small.resize((200, 150), Image.Resampling.BICUBIC).save(tmp_path / "photo.jpg")
    _open(page, tmp_path / "photo.jpg")
    page.wait_for_selector("#segmentation img", timeout=WAIT)
    assert "200×150 pixels" in page.locator("#note").inner_text()
    with page.expect_download(timeout=WAIT) as download:
        page.locator("#mask a").first.click()
    mask = Image.open(download.value.path())
    assert (mask.mode, mask.size) == ("P", (200, 150))
    palette = mask.getpalette()
    assert palette is not None and palette[:12] == voc_palette()[:4].reshape(-1).tolist()
    classes = np.unique(np.asarray(mask))
    assert set(classes) <= {0, 1, 2, 3} and classes.max() > 0
    legend = page.locator("#legend").inner_text()
    for index in classes[classes > 0]:
        assert ["cat", "dog", "a <b>sofa</b>"][index - 1] in legend

    for name in ("cat", "dog", "a <b>sofa</b>"):
        page.get_by_label(name, exact=True).check()
    page.wait_for_function("document.querySelectorAll('#cams img').length >= 3", timeout=WAIT)
    page.wait_for_function("document.querySelectorAll('#walked img').length >= 3", timeout=WAIT)
    page.wait_for_selector("#label img", timeout=WAIT)
    before = page.locator("#label img").get_attribute("src")
    score = page.locator("#score input[type=number]")
    score.fill("0.9")
    score.press("Enter")
    page.wait_for_function("old => document.querySelector('#label img').src !== old", arg=before, timeout=WAIT)


def test_an_unreadable_file_gives_one_sentence(page: Any, tmp_path: Path) -> None:
    (tmp_path / "letter.jpg").write_bytes(b"Dear model, please segment this.")
    _open(page, tmp_path / "letter.jpg")
    page.wait_for_function("document.querySelector('#note').innerText.includes('letter.jpg')", timeout=WAIT)
    text = page.locator("#note").inner_text().strip()
    assert "\n" not in text and "Traceback" not in text and str(tmp_path) not in text
    assert page.locator("#segmentation img").count() == 0
