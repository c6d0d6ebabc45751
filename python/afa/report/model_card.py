"""The model card of a run: README.md of a Hugging Face model, with the run's own scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from afa.config import Config
from afa.report.page import TEMPLATES
from afa.report.results import describe_test_time, load_result
from afa.report.tables import final_row, number, scores
from afa.run import METRICS


def model_card(classes: Sequence[str], config: Config, run: Path) -> str:
    """Markdown with YAML metadata. A run that was not evaluated on masks has a card without scores."""
    name, data = run.resolve().name, Path(config.data.root).name
    front: dict[str, Any] = {
        "library_name": "afa-ext",
        "pipeline_tag": "image-segmentation",
        "tags": ["semantic-segmentation", "weakly-supervised"],
    }
    evaluated: dict[str, Any] = {"scores": None}
    result, _, facts = load_result(run) if (run / METRICS).is_file() else (None, None, {})
    if result is not None and result.has_masks:
        last = result.rows[final_row(result.rows)]
        measured = {
            "task": {"type": "image-segmentation"},
            "dataset": {"name": data, "type": data, "split": facts["split"]},
            "metrics": [{"type": "mean_iou", "name": "mIoU", "value": round(last["miou"], 4)}],
        }
        front["model-index"] = [{"name": name, "results": [measured]}]
        evaluated = {
            "scores": scores(result.rows),
            "per_class": {one: number(iou) for one, iou in zip(facts["classes"], last["iou"], strict=True)},
            "f1": number(result.f1),
            "images": f"{result.images:,}",
            "split": facts["split"],
            "test_time": describe_test_time(facts["test_time"]),
        }
    card = TEMPLATES.overlay(autoescape=False).get_template("model_card.md")
    return (
        card.render(
            front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
            name=name,
            data=data,
            classes=classes,
            backbone=config.model.backbone,
            iterations=f"{config.train.iterations:,}",
            batch_size=config.train.batch_size,
            crop_size=config.data.crop_size,
            **evaluated,
        )
        + "\n"
    )
