"""A small version of the paper's ablation: the effect of each part of AFA on the segmentation of the embedded data set.

    python benchmarks/ablation.py                    # eight rows, three seeds
    python benchmarks/ablation.py --seeds 0 --quick  # seconds: only a test that it runs, the results are meaningless

All rows of a seed share the classification phase, its weights and the order of the crops. They differ in the labels
and losses of the later phases. The network ends with its decoder, as published, so only the labels of a row refine its
edges, and it is evaluated at the images' own size. Two rows are no part of the method: the affinity as published, and a
network that learns from the true masks of the training images, without random scaling of the crops. Every evaluation
also walks with the identity and with the affinity of the true masks.

The scores of each finished run are saved in --runs, a folder of small files, and a restart continues from them, also on
another machine. The result is written after every run, from the runs that are finished.

The data is synthetic and the backbone has three million parameters: the results need not hold for VOC.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from supervised import Supervised, run_steps
from timing import RESULTS, print_table, write_results

from afa.config import Config, load_config, to_dict
from afa.data import TaggedDataset, open_dataset
from afa.data.synthetic import make_dataset
from afa.evaluation.evaluate import evaluate
from afa.files import write_text
from afa.model import build_model
from afa.training.step import TrainStep

SETTINGS = ["model.refine_iterations=0", "eval.longer_side=null"]
QUICK = [
    "model.refine_iterations=0",
    *("train.iterations=6", "train.classify_until=2", "train.par_until=4", "train.warmup=1"),
]

METHOD = "+ walk and PAR"
"""The row of the whole method. Later rows change or replace one of its parts and are compared with it."""
NO_WALK = "train.par_until=1000000"  # later than the end of any run
PUBLISHED = ["model.affinity_logits=raw", "labels.affinity_sampling=corner", "train.affinity_object_share=null"]
SUPERVISED = "true masks"
ROWS = {
    "CAM labels": ["labels.par_iterations=0", "train.weight_affinity=0", NO_WALK],
    "+ PAR": ["train.weight_affinity=0", NO_WALK],
    "+ affinity, no walk": [NO_WALK],
    "+ walk": ["labels.walk_par_iterations=0"],
    METHOD: [],
    "+ walk and PAR, dense energy loss": ["train.energy_weight=0.01"],
    "+ walk and PAR, affinity as published": [*PUBLISHED, "train.weight_affinity=0.2"],
    SUPERVISED: ["train.weight_affinity=0", NO_WALK],
}
"""Name of a row -> overrides of the full method's configuration."""
SCORES = ("cam", "walk", "walk_identity", "walk_oracle", "par", "walk_par", "f1")
"""Scores of every run besides that of the segmentation."""


def configuration(base: Sequence[str], changes: Sequence[str], seed: int) -> Config:
    return load_config("demo", [*base, f"train.seed={seed}", *changes])


def finished(seed: int, base: Sequence[str], runs: Path) -> dict[str, dict[str, Any]]:
    """Scores of the rows of a seed that are in `runs`, made with the current settings."""
    found = {}
    for number, (row, changes) in enumerate(ROWS.items()):
        file = _file(runs, seed, number)
        kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if kept.get("row") == row and kept.get("digest") == _digest(configuration(base, changes, seed)):
            found[row] = kept
    return found


def _file(runs: Path, seed: int, number: int) -> Path:
    return runs / f"seed{seed}" / f"{number}.json"


def _digest(config: Config) -> str:
    """Identifies the settings, without the paths of this machine."""
    content = to_dict(config)
    del content["data"]["root"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def run_seed(
    seed: int,
    base: Sequence[str],
    runs: Path,
    device: torch.device,
    done: Callable[[], object] = lambda: None,
    rows: Sequence[str] = tuple(ROWS),
) -> dict[str, dict[str, Any]]:
    """Scores of one seed. Computes these rows unless they are in `runs`, and calls `done` after each."""
    kept = finished(seed, base, runs)
    due = {row: configuration(base, ROWS[row], seed) for row in rows if row not in kept}
    if due:
        shared = _classified(configuration(base, [], seed), device)
        for row, config in due.items():
            begin = time.perf_counter()
            train_step = _train_step(config, device, Supervised if row == SUPERVISED else TrainStep)
            train_step.model.load_state_dict(shared["model"])
            train_step.optimizer.load_state_dict(copy.deepcopy(shared["optimizer"]))
            run_steps(train_step, config.train.classify_until + 1, config.train.iterations, f"seed {seed}, {row}")
            result = evaluate(train_step.model, _split(config, train=False), config)
            assert result.diagnosis is not None
            scores = {"seg": result.seg["miou"], **result.diagnosis.miou, "f1": result.f1}
            content: dict[str, Any] = {"row": row, "settings": [*base, *ROWS[row]], "digest": _digest(config)}
            content |= {"affinity": result.diagnosis.affinity, **scores, "seconds": time.perf_counter() - begin}
            file = _file(runs, seed, list(ROWS).index(row))
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(content) + "\n")
            done()
    return finished(seed, base, runs)


def _classified(config: Config, device: torch.device) -> dict[str, Any]:
    """Weights and optimizer state after the phase that all rows share."""
    train_step = _train_step(config, device)
    run_steps(train_step, 0, config.train.classify_until + 1, f"seed {config.train.seed}, classification")
    return {"model": train_step.model.state_dict(), "optimizer": train_step.optimizer.state_dict()}


def _train_step(config: Config, device: torch.device, kind: type[TrainStep] = TrainStep) -> TrainStep:
    torch.manual_seed(config.train.seed)
    return kind(build_model(config.model, len(_split(config, train=True).classes)), config, device)


def _split(config: Config, *, train: bool) -> TaggedDataset:
    data = config.data
    split = data.train_split if train else data.val_split
    return open_dataset(data, split, train=train, with_mask=not train)


def summarize(seeds: Sequence[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One entry per row with at least one finished run: the seeds' segmentation scores, and their mean and standard
    deviation; the same of the differences, with the same seed, from the row before, or from `METHOD` for rows after
    it; means of the other scores."""
    rows: list[dict[str, Any]] = []
    before: str | None = None
    for row in ROWS:
        runs = [scores[row] for scores in seeds if row in scores]
        if not runs:
            continue
        values = [run["seg"] for run in runs]
        gains = [scores[row]["seg"] - scores[before]["seg"] for scores in seeds if row in scores and before in scores]
        rows.append(
            {
                "row": row,
                "seg_miou": values,
                "mean": statistics.mean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "gain": statistics.mean(gains) if gains else None,
                "gain_std": statistics.stdev(gains) if len(gains) > 1 else None,
                **{f"{name}_mean": statistics.mean(run[name] for run in runs) for name in SCORES},
                "settings": runs[0]["settings"],
            }
        )
        if before != METHOD:
            before = row
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", choices=ROWS, nargs="+", default=list(ROWS), metavar="ROW", help="default: all")
    parser.add_argument("--quick", action="store_true", help="a few iterations")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--runs", type=Path, help="folder for the scores of finished runs (default: benchmarks/results/ablation)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result")
    options = parser.parse_args(arguments)
    base = QUICK if options.quick else SETTINGS
    runs = options.runs or (Path("runs/ablation-quick") if options.quick else RESULTS / "ablation")
    device = torch.device(options.device)
    root = Path(configuration(base, [], 0).data.root)
    if not root.exists():
        make_dataset(root)

    def summary() -> tuple[list[dict[str, Any]], Path]:
        rows = summarize([finished(seed, base, runs) for seed in options.seeds])
        return rows, write_results("ablation", device, rows, options.out)

    for seed in options.seeds:
        run_seed(seed, base, runs, device, summary, options.rows)
    rows, file = summary()
    cells = [
        {
            "labels and losses": row["row"],
            "seg mIoU": f"{row['mean']:.3f}",
            "std": "–" if row["std"] is None else f"{row['std']:.3f}",
            "gain": "–" if row["gain"] is None else f"{row['gain']:+.3f}",
            **{name: f"{row[f'{name}_mean']:.3f}" for name in SCORES},
            "seeds": " ".join(f"{value:.3f}" for value in row["seg_miou"]),
        }
        for row in rows
    ]
    print_table("segmentation on the embedded data set's val split", cells)
    print(file)


if __name__ == "__main__":
    main()
