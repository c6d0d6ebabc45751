"""report.html: one page, without scripts or external files, that shows the results of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from afa.evaluation.result import EvalResult
from afa.files import write_text
from afa.report import pictures, tables
from afa.report.curves import background_curves, curves
from afa.run import LOG, REPORT
from afa.training.snapshots import load_snapshots

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(
    run: str | Path,
    result: EvalResult,
    classes: Sequence[str],
    *,
    facts: Mapping[str, str] | None = None,
    title: str | None = None,
) -> Path:
    """Write run/report.html from the evaluation and, if they exist, run/log.jsonl and run/snapshots; returns its path.

    `classes` are the foreground names; `facts` are shown in the header, in the given order.
    """
    run = Path(run)
    names = ["background", *classes]
    page = TEMPLATES.get_template("page.html").render(
        title=title or f"AFA run {run.name}",
        has_masks=result.has_masks,
        facts=facts or {},
        notes=result.notes,
        tiles=tables.tiles(result.rows, result.f1, result.images, result.has_masks),
        score_rows=tables.scores(result.rows),
        panels=curves(read_log(run / LOG)),
        diagnosis=_diagnosis(result),
        class_bars=tables.class_bars(result.rows, names),
        confusion=_confusion(result, names),
        evolution=pictures.evolution(load_snapshots(run), names),
        extremes=_extremes(result, names),
        examples=pictures.with_key(result.samples, names) if result.samples else None,
    )
    path = run / REPORT
    # The templates' line breaks and indentation only make them easier to read.
    write_text(path, re.sub(r">\s*\n\s*<", "><", page.strip()) + "\n")
    return path


def _diagnosis(result: EvalResult) -> dict[str, Any] | None:
    found = result.diagnosis
    if found is None:
        return None
    return {
        "images": f"{found.images:,}",
        "rows": tables.checks(found),
        "tiles": tables.affinity_tiles(found),
        "panel": background_curves(found),
    }


def _confusion(result: EvalResult, names: Sequence[str]) -> dict[str, Any] | None:
    counts = result.rows[tables.final_row(result.rows)].get("confusion")
    # Runs evaluated by an earlier version did not save it.
    return tables.confusion(counts, names) if counts and result.has_masks else None


def _extremes(result: EvalResult, names: Sequence[str]) -> dict[str, Any] | None:
    if not result.best:
        return None
    key = pictures.class_key([*result.best, *result.worst], pictures.LABELS, names)
    return {
        "key": key,
        "best": pictures.examples(result.best, names),
        "worst": pictures.examples(result.worst, names),
    }


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The rows of log.jsonl by iteration; several records of one iteration are merged, later values taking precedence.

    A last line that a killed run left incomplete is skipped.
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
