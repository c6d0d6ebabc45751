"""Generate the tables of README.md and docs/evidence.md, and the README's image, from the results of runs and
benchmarks.

python -m tools.update_tables --run runs/demo    # copy a demo run's results to docs/demo, then update the tables
python -m tools.update_tables                    # update only the tables, from docs/demo and benchmarks/results
python -m tools.update_tables --check            # exit 1 if the tables are out of date
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tools.blocks import stale_blocks, write_blocks

ROOT = Path(__file__).resolve().parent.parent
TOOL = "update_tables.py"
README, EVIDENCE = ROOT / "README.md", ROOT / "docs" / "evidence.md"
SCRATCH = ROOT / "docs" / "par_from_scratch.md"
DEMO, RESULTS = ROOT / "docs" / "demo", ROOT / "benchmarks" / "results"
SHOWN = 4
"""Number of example images in the README, evenly spaced over those of the report."""

ROWS = {
    "cam": "class activation map",
    "walk": "after the affinity walk",
    "par": "PAR pseudo label",
    "seg": "**segmentation**",
}


def copy_demo(run: Path) -> None:
    """Copy a run's scores to docs/demo and draw its example images there."""
    import numpy as np
    from PIL import Image, ImageDraw

    from afa.data.visualize import heat, overlay
    from afa.report.results import load_result

    result, _, _ = load_result(run)
    DEMO.mkdir(parents=True, exist_ok=True)
    scores = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    del scores["data"]  # a path on the machine of the run
    (DEMO / "metrics.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    step = max(1, len(result.samples) // SHOWN)
    columns = ("image", "CAM", "walk", "PAR label", "prediction", "truth")
    rows = []
    for sample in result.samples[::step][:SHOWN]:
        image = sample["image"]
        masks = [overlay(image, sample[key]) for key in ("walk_label", "par_label", "prediction", "truth")]
        rows.append(np.concatenate([image, heat(image, sample["cam"]), *masks], axis=1))
    grid = Image.fromarray(np.concatenate(rows))
    head = 18
    picture = Image.new("RGB", (grid.width, grid.height + head), "white")
    picture.paste(grid, (0, head))
    draw = ImageDraw.Draw(picture)
    width = grid.width // len(columns)
    for column, name in enumerate(columns):
        draw.text((column * width + width // 2, head // 2), name, fill="black", anchor="mm")
    picture.save(DEMO / "samples.jpg", quality=90)


def demo_table() -> str:
    metrics = json.loads((DEMO / "metrics.json").read_text(encoding="utf-8"))
    about = metrics["environment"]
    lines = ["| on the validation split | mIoU |", "|---|---|"]
    lines += [f"| {text} | {metrics[f'{row}_miou']:.3f} |" for row, text in ROWS.items()]
    minutes, seconds = divmod(round(metrics["seconds"]), 60)
    return "\n".join(lines) + (
        f"\n\n{metrics['images']} images, {len(metrics['classes'])} classes with background; {minutes} min {seconds} s "
        f"from generating the data to writing the report, on {about['hardware']} (torch {about['torch']})."
    )


CHECKS = {
    "cam": "CAM",
    "walk_identity": "walk, identity",
    "walk": "walk, learned affinity",
    "walk_oracle": "walk, oracle",
    "par": "CAM + PAR",
    "walk_par": "walk + PAR",
}


def walk_table() -> str:
    """The diagnostics of the demo."""
    metrics = json.loads((DEMO / "metrics.json").read_text(encoding="utf-8"))
    found = metrics["diagnosis"]
    lines = ["| labels | mIoU |", "|---|---|"]
    lines += [f"| {text} | {found['miou'][row]:.3f} |" for row, text in CHECKS.items()]
    affinity = found["affinity"]
    return "\n".join(lines) + (
        f"\n\nMean affinity of two tokens of one object {affinity['object']:.2f}, of background "
        f"{affinity['background']:.2f}, of different classes {affinity['different']:.2f}; AUC of objects "
        f"{affinity['auc']:.2f}. {found['images']} images, one seed."
    )


DATA = {"voc8": "eight classes of VOC 2012 val, part"}
"""Folder of a data set -> what it is."""

OPERATIONS = {
    "par_kernel": "PAR, 10 iterations",
    "random_walk": "{row} walk",
    "affinity": "affinity from attention and its loss, forward and backward",
    "pseudo_labels": "PAR pseudo labels, {present} classes per image",
    "dense_crf": "{operator}",
    "train_step": "full training step of `{config}`, {phase} phase",
}
"""Benchmark name -> format string that describes a row from its entries."""


def benchmark_table() -> str:
    """One table per machine in benchmarks/results, CPUs first; one line per baseline."""
    tables: dict[str, list[str]] = {}
    gpus = set()
    for name, operation in OPERATIONS.items():
        for file in sorted(RESULTS.glob(f"{name}-*.json")):
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            where = _machine(content["machine"])
            if content["machine"]["cuda"]:
                gpus.add(where)
            lines = tables.setdefault(where, [])
            ours: dict[str, Any] = {}
            for row in content["rows"]:
                if row["times_ours"] == 1:
                    ours = row
                elif row["times_ours"] is not None:
                    memory = f"{row['peak_bytes'] / max(1, ours['peak_bytes']):.1f}×" if row.get("peak_bytes") else "–"
                    what = operation.format(**{"operator": ours["candidate"].removeprefix("afa_ext."), **row})
                    baseline = f"{row['candidate']} | {_milliseconds(row)} | **{_times(row['times_ours'])}**"
                    if row["candidate"].startswith("afa_ext"):  # this package on another device
                        baseline = "– | – | –"
                    size = f"{row['size'].replace('x', '×')} {row['dtype']}"
                    lines.append(f"| {what} | {size} | {_milliseconds(ours)} | {baseline} | {memory} |")
    head = "| | size | afa_ext | baseline | baseline time | speedup | memory |\n|---|---|---|---|---|---|---|\n"
    parts = [
        f"On {where}:\n\n{head}" + "\n".join(tables[where])
        for where in sorted(tables, key=lambda where: (where in gpus, where))
    ]
    return "\n\n".join(parts if gpus else [*parts, "GPU: not measured."])


def ablation_table() -> str:
    """One line per row of the ablation in every file of benchmarks/results."""
    heads = (
        "seeds",
        "segmentation",
        "spread",
        "gain",
        "CAM",
        "walk",
        "identity",
        "oracle",
        "PAR",
        "walk + PAR",
    )
    names = ("cam", "walk", "walk_identity", "walk_oracle", "par", "walk_par")
    lines = ["| ".join(["", "labels and losses ", *(f"{head} " for head in heads), ""]).strip(), "|---" * 11 + "|"]
    machines = set()
    for file in sorted(RESULTS.glob("ablation-*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        machines.add(_machine(content["machine"]))
        for row in content["rows"]:
            spread = "–" if row["std"] is None else f"± {row['std']:.3f}"
            gain = "–" if row.get("gain") is None else f"{row['gain']:+.3f}"
            if row.get("gain_std") is not None:
                gain += f" ± {row['gain_std']:.3f}"
            others = " | ".join(f"{row[f'{name}_mean']:.3f}" if f"{name}_mean" in row else "–" for name in names)
            lines.append(
                f"| {row['row']} | {len(row['seg_miou'])} | {row['mean']:.3f} | {spread} | {gain} | {others} |"
            )
    if not machines:
        lines.append("| not measured " + "| – " * 10 + "|")
    return "\n".join([*lines, "", "; ".join(sorted(machines)) + "."] if machines else lines)


def refinement_table(study: str) -> str:
    """Refinements of simulated CAMs: one line per refinement, mean IoU and boundary F-score for each kind of CAM."""
    tables = []
    for file in sorted(RESULTS.glob("real_photos-*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        rows = [row for row in content["rows"] if row["study"] == study]
        kinds = list(dict.fromkeys(row["cam"] for row in rows))
        names = list(dict.fromkeys(row["refinement"] for row in rows))
        cells = {(row["refinement"], row["cam"]): row for row in rows}
        best = {kind: max(cells[name, kind]["miou"] for name in names) for kind in kinds}
        lines = [f"| refinement | {' | '.join(kinds)} | images/s |", "|---" * (len(kinds) + 2) + "|"]
        for name in names:
            scores = []
            for kind in kinds:
                row = cells[name, kind]
                miou = f"{row['miou']:.3f}"
                scores.append(f"{f'**{miou}**' if row['miou'] == best[kind] else miou} / {row['boundary_f']:.3f}")
            speed = statistics.median(cells[name, kind]["images_per_s"] for kind in kinds)
            lines.append(f"| {name} | {' | '.join(scores)} | {speed:.0f} |")
        tables.append(
            "\n".join(lines) + f"\n\nmIoU / boundary F-score; {content['images']} images ({_data(content)}); "
            f"{_machine(content['machine'])}."
        )
    return "\n\n".join(tables) if tables else "Not measured."


def background_table() -> str:
    """mIoU of CAM and PAR labels at the best background score and at those of rules without masks."""
    tables = []
    for file in sorted(RESULTS.glob("background_scores-*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        scores = content["background_scores"]
        rules = list(content["rows"][0]["rules"])
        for labels in ("cam", "par"):
            lines = [f"| {labels.upper()} labels | best | {' | '.join(rules)} |", "|---" * (len(rules) + 2) + "|"]
            for row in content["rows"]:
                curve = row["curves"][labels]
                best = max(curve)
                cells = [f"{best:.3f} at {scores[curve.index(best)]:.2f}"]
                cells += [f"{row['rules'][rule][labels]:.3f} at {row['rules'][rule]['score']:.2f}" for rule in rules]
                lines.append(f"| {row['cam_kind']} | {' | '.join(cells)} |")
            tables.append("\n".join(lines))
        images = " and ".join(sorted({str(row["images"]) for row in content["rows"]}))
        tables.append(f"{images} images each; {_machine(content['machine'])}.")
    return "\n\n".join(tables) if tables else "Not measured."


def training_table() -> str:
    """Training on real photographs from tags, and from true masks."""
    tables = []
    for file in sorted(RESULTS.glob("real_photos_train-*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        tags, masks = content["rows"]
        lines = ["| labels | mIoU |", "|---|---|"]
        lines += [f"| {text} | {tags[row]:.3f} |" for row, text in CHECKS.items()]
        lines += [
            f"| segmentation, trained from tags | {tags['seg']:.3f} |",
            f"| segmentation, the same network trained from true masks | {masks['seg']:.3f} |",
            f"| share of the supervised segmentation | {tags['seg'] / masks['seg']:.0%} |",
        ]
        best = ", ".join(
            f"{CHECKS[row]} {tags[f'{row}_best']['miou']:.3f} at {tags[f'{row}_best']['background']:.2f}"
            for row in ("cam", "walk", "par")
        )
        model, train = content["config"]["model"], content["config"]["train"]
        affinity = tags["affinity"]
        tables.append(
            "\n".join(lines)
            + f"\n\nBest background scores: {best}. Tag F1 {tags['f1']:.3f}. Mean affinity of two tokens of "
            f"one object {affinity['object']:.2f}, of background {affinity['background']:.2f}, of different classes "
            f"{affinity['different']:.2f}; AUC of objects {affinity['auc']:.2f}. {model['backbone']}, "
            f"{train['iterations']} iterations of {train['batch_size']} crops; {content['training_images']:,} images "
            f"to train on, {content['images']} for validation ({_data(content)}); {_machine(content['machine'])}."
        )
    return "\n\n".join(tables) if tables else "Not measured."


def _data(content: dict[str, Any]) -> str:
    return DATA.get(content["data"], f"{len(content['classes'])} classes of {content['data']}")


def _times(value: float) -> str:
    return f"{value:.{0 if value >= 10 else 1}f}×"


def _milliseconds(row: dict[str, Any]) -> str:
    value = row["median_ms"]
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _machine(machine: dict[str, Any]) -> str:
    plural = "" if machine["threads"] == 1 else "s"
    where = machine["device"] if machine["cuda"] else f"{machine['device']}, {machine['threads']} thread{plural}"
    return f"{where}, torch {machine['torch']}"


def scratch_table() -> str:
    """The versions of PAR: one table per machine, with a small size that all versions support, and a standard one."""
    tables = []
    for file in sorted(RESULTS.glob("par_from_scratch-*.json")):
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        small, standard = dict.fromkeys(row["size"] for row in content["rows"])
        at_small = {row["candidate"]: row for row in content["rows"] if row["size"] == small}
        at_standard = [row for row in content["rows"] if row["size"] == standard]
        one_thread = {row["candidate"]: row for row in at_standard if row["threads"] == 1}
        lines = [
            f"| version | | {small.replace('x', '×')} | {standard.replace('x', '×')} | affinity | iterations | GFMA/s "
            "| speedup over v2 |",
            "|---" * 8 + "|",
        ]
        for name, row in at_small.items():
            if name not in one_thread:
                lines.append(f"| {name} | {row['change']} | {_milliseconds(row)} | – | – | – | – | – |")
        for row in at_standard:
            several = row["threads"] > 1
            name = row["candidate"] + (f", {row['threads']} threads" if several else "")
            parts = [_milliseconds({"median_ms": row[part]}) for part in ("affinity_ms", "iterations_ms")]
            lines.append(
                f"| {name} | {'' if several else row['change']} "
                f"| {'–' if several else _milliseconds(at_small[row['candidate']])} "
                f"| **{_milliseconds(row)}** | {' | '.join(parts)} | {row['gfma_per_s']:.2g} "
                f"| {_times(one_thread['v2']['median_ms'] / row['median_ms'])} |"
            )
        limit = one_thread["v2"]["limit_gfma_per_s"]
        where = _machine({**content["machine"], "threads": 1}).replace(", 1 thread", "")
        tables.append(
            "\n".join(lines) + f"\n\n{where}; median times. Limit if all data is in the L1 cache, on one thread: "
            f"{limit:.0f} GFMA/s."
        )
    return "\n\n".join(tables) if tables else "Not measured."


PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    README: {"demo": demo_table, "benchmarks": benchmark_table, "ablation": ablation_table},
    EVIDENCE: {
        "walk": walk_table,
        "refinements": partial(refinement_table, "refinements"),
        "par": partial(refinement_table, "variants of PAR"),
        "training": training_table,
        "background": background_table,
    },
    SCRATCH: {"par_from_scratch": scratch_table},
}
"""Page -> its generated blocks, by name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="an evaluated demo run to copy into docs/demo")
    parser.add_argument("--check", action="store_true", help="exit 1 if the tables are out of date")
    options = parser.parse_args()
    if options.run:
        copy_demo(options.run)
    for page, tables in PAGES.items():
        blocks = {name: table() for name, table in tables.items()}
        if not options.check:
            write_blocks(page, TOOL, blocks)
        elif stale_blocks(page, TOOL, blocks):
            sys.exit(f"the tables in {page.name} are out of date; run python -m tools.update_tables")


if __name__ == "__main__":
    main()
