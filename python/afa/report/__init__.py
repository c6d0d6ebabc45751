"""report.html: one page, without scripts or outside files, that shows what a run learnt."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from afa.files import write_text
from afa.report import pictures, tables
from afa.report.curves import curves, nice_ticks
from afa.snapshots import load_snapshots

if TYPE_CHECKING:
    from afa.evaluate import EvalResult

__all__ = ["nice_ticks", "read_log", "write_report"]
_TEMPLATE = Path(__file__).parent.parent / "templates" / "report.html"


def write_report(
    run: str | Path,
    result: EvalResult,
    classes: Sequence[str],
    *,
    facts: Mapping[str, str] | None = None,
    title: str | None = None,
) -> Path:
    """Write run/report.html from the evaluation and, where they are, run/log.jsonl and run/snapshots; returns its path.

    `classes` are the foreground names; `facts` are shown in the header in their order.
    """
    run = Path(run)
    names = ["background", *classes]
    template = Template(_TEMPLATE.read_text(encoding="utf-8"))
    log = read_log(run / "log.jsonl")
    where = "All scores are on the validation split, against masks that training did not see."
    if not result.has_masks:
        where = "The validation split has no masks, so only the classifier is measured."
    page = template.substitute(
        title=html.escape(title or f"AFA run {run.name}"),
        lead=(
            "Semantic segmentation learnt from image tags alone: which classes an image shows, never where. " + where
        ),
        tiles=tables.tiles(result.rows, result.f1, result.images, result.has_masks),
        facts="".join(
            f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd></div>"
            for key, value in (facts or {}).items()
        ),
        sections="".join(
            f"<section><h2>{heading}</h2>{body}</section>" for heading, body in _sections(run, result, names, log)
        ),
        footer="Written by afa report. Colours are PASCAL VOC's, brightened for the screen.",
    )
    path = run / "report.html"
    write_text(path, page)
    return path


def _sections(
    run: Path, result: EvalResult, names: Sequence[str], log: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """(heading, HTML) from top to bottom."""
    metrics = result.rows
    found: list[tuple[str, str]] = []
    if result.has_masks:
        text = (
            "mIoU is the mean over classes, background included, of intersection over union; 1 is perfect. Pixels and "
            "classes: the share of pixels that are right, over all and as the mean over classes. The first three rows "
            "are labels made for training, given the tags."
        )
        text += "".join(f" <b>Note: {html.escape(note)}.</b>" for note in result.notes)
        found.append(("Scores", f'{_note(text)}<div class="card wide">{tables.scores(metrics)}</div>'))
    found.append(("Training", curves(log)))
    if result.has_masks:
        found.append(("IoU by class", tables.class_bars(metrics, names)))
        counts = metrics[tables.final_row(metrics)].get("confusion")
        text = "Percent of the pixels of a true class (row) that the final segmentation takes for another (column)."
        if counts:  # an earlier version did not keep them
            found.append(("What is taken for what", _note(text) + tables.confusion(counts, names)))
    if snapshots := load_snapshots(run):
        text = (
            "The same training images at the end of each phase: what the network is taught (PAR label, then walk "
            "label) and what it answers. No mask of theirs was ever opened."
        )
        found.append(("How the labels grow", _note(text) + pictures.evolution(snapshots, names)))
    labels = ("walk_label", "par_label", "prediction", "truth")
    if result.best:
        key = pictures.class_key([*result.best, *result.worst], labels, names)
        text = "By the mean IoU over the classes that an image shows; the most extreme first."
        best, worst = (pictures.examples(group, names) for group in (result.best, result.worst))
        found.append(("Best and worst images", f"{_note(text)}{key}<h3>Best</h3>{best}<h3>Worst</h3>{worst}"))
    if result.samples:
        text = "Spread evenly over the validation split, not chosen. Point at a picture to enlarge it."
        key = pictures.class_key(result.samples, labels, names)
        found.append(("Examples", _note(text) + key + pictures.examples(result.samples, names)))
    else:
        text = "No example was kept; set eval.report_images above 0 and evaluate again."
        found.append(("Examples", _note(text)))
    return found


def _note(text: str) -> str:
    return f'<p class="note">{text}</p>'


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The rows of log.jsonl by iteration; what is logged twice of one iteration is merged, the later value counting.

    A last line cut short by a killed run is passed over.
    """
    path = Path(path)
    rows: dict[int, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                rows.setdefault(int(row["iteration"]), {}).update(row)
            except (ValueError, KeyError, TypeError):
                continue
    return [rows[iteration] for iteration in sorted(rows)]
