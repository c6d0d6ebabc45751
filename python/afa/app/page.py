"""The page of `afa app`: drop in a photograph, look at masks and maps, change the settings of the pseudo label."""

from __future__ import annotations

import html
import tempfile
import time
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from numpy.typing import NDArray

from afa.app.analysis import SOURCES, Analysis, analyze
from afa.config import Config
from afa.data.transforms import read_image
from afa.data.visualize import class_color, class_shares, overlay, save_mask, share_text
from afa.errors import UserError
from afa.model import AFANet

INTRODUCTION = """\
# {title}
This model segments {count} classes: {names}. Drop in a photograph. The segmentation needs nothing else. The pseudo
label below it is what training learns from: it is made from the CAMs of the tags that you tick."""
STYLE = ".legend span { white-space: nowrap; margin-right: 1.2em } .legend i { display: inline-block; width: .9em; \
height: .9em; margin-right: .35em; border-radius: 2px; vertical-align: -.1em }"
HEIGHT = 380
"""Of a picture, in pixels of the page."""
PAR_ITERATIONS = 30
"""Largest number on the slider."""


def build_page(model: AFANet, classes: list[str], config: Config, title: str, largest_side: int) -> gr.Blocks:
    """The page for a model in evaluation mode. largest_side: see `analyze`.

    labels.cam_threshold and labels.par_iterations are the initial settings.
    """
    folder = Path(tempfile.mkdtemp(prefix="afa-app-"))
    start = config.labels.cam_threshold
    start = start if isinstance(start, float) else 0.45

    def open_photograph(path: str | None) -> list[Any]:
        nothing = [None, None, None, "", gr.update(value=[])]
        if path is None:
            return ["", *nothing]
        begin = time.perf_counter()
        try:
            image = read_image(Path(path))
        except UserError as error:
            name = Path(path).name
            return [f"**{html.escape(str(error).replace(path, name))}**", *nothing]
        found = analyze(model, config, image, largest_side)
        mask = folder / f"{Path(path).stem}-mask.png"
        save_mask(mask, found.labels)
        seconds = time.perf_counter() - begin
        return [
            f"{image.width}×{image.height} pixels, {seconds:.1f} s",
            found,
            _enlarged(overlay(np.asarray(image), found.labels)),
            str(mask),
            _legend(classes, found.labels),
            gr.update(value=[classes[index] for index in found.found]),
        ]

    def show_label(
        found: Analysis | None, tags: list[str], source: str, background: float, iterations: float
    ) -> list[Any]:
        numbers = sorted(classes.index(tag) for tag in tags)
        if found is None or not numbers:
            return [None, "", None, None]
        label = found.pseudo_label(numbers, config, source, background, int(iterations))
        cams, walked = found.cams(numbers), found.walked(numbers, config, background)
        return [
            _enlarged(overlay(found.picture, label)),
            _legend(classes, label),
            [(cams[number], f"{classes[number]} {found.probabilities[number]:.2f}") for number in numbers],
            [(walked[number], classes[number]) for number in numbers],
        ]

    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.HTML(f"<style>{STYLE}</style>", padding=False)
        gr.Markdown(INTRODUCTION.format(title=title, count=len(classes), names=", ".join(classes)))
        state = gr.State(None)
        with gr.Row():
            with gr.Column(scale=1):
                photograph = gr.File(label="Photograph", file_types=["image"], height=140, elem_id="photograph")
                note = gr.Markdown(elem_id="note")
                download = gr.File(label="Mask (PNG, class indices with VOC's palette)", elem_id="mask")
            with gr.Column(scale=2):
                segmentation = gr.Image(label="Segmentation", elem_id="segmentation", interactive=False, height=HEIGHT)
                legend = gr.HTML(elem_id="legend", elem_classes="legend")
        with gr.Row():
            with gr.Column(scale=1):
                tags = gr.CheckboxGroup(classes, label="Tags", elem_id="tags")
                source = gr.Radio([(name, key) for key, name in SOURCES.items()], value="par", label="Pseudo label")
                background = gr.Slider(0.05, 0.95, value=start, step=0.05, label="Background score", elem_id="score")
                iterations = gr.Slider(
                    0,
                    PAR_ITERATIONS,
                    value=min(config.labels.par_iterations, PAR_ITERATIONS),
                    step=1,
                    label="PAR iterations",
                    elem_id="iterations",
                )
            with gr.Column(scale=2):
                label = gr.Image(label="Pseudo label", elem_id="label", interactive=False, height=HEIGHT)
                label_legend = gr.HTML(elem_id="label-legend", elem_classes="legend")
        with gr.Row():
            cams = gr.Gallery(label="CAM and probability of each tag", columns=3, elem_id="cams", object_fit="contain")
            walked = gr.Gallery(label="CAM after the walk", columns=3, elem_id="walked", object_fit="contain")

        settings = [state, tags, source, background, iterations]
        shown = [label, label_legend, cams, walked]
        photograph.change(
            open_photograph, photograph, [note, state, segmentation, download, legend, tags], api_visibility="private"
        ).then(show_label, settings, shown, api_visibility="private")
        gr.on(
            [tags.input, source.input, background.change, iterations.change],
            show_label,
            settings,
            shown,
            trigger_mode="always_last",
            show_progress="hidden",
            api_visibility="private",
        )
    return page


def _enlarged(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A small picture with each pixel repeated, since the page never enlarges pictures."""
    factor = max(1, HEIGHT // max(picture.shape[:2]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def _legend(classes: list[str], mask: NDArray[np.integer]) -> str:
    """Color, name and share of the pixels of the classes in a mask, as HTML."""
    entries = [
        f'<span><i style="background: {class_color(index)}"></i>{html.escape(classes[index - 1])} '
        f"{html.escape(share_text(share))}</span>"
        for index, share in class_shares(mask, len(classes)).items()
    ]
    return " ".join(entries) or "only background"
