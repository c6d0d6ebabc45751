"""A look through a folder of one's own pictures before training: what was found, and every bad file. Writes nothing."""

from __future__ import annotations

import difflib
from pathlib import Path

from afa.config import DataConfig
from afa.data.dataset import open_dataset
from afa.data.prepare.common import Say
from afa.data.readers.own import is_own_folder, other_files, read_own_folder
from afa.errors import UserError


def prepare_own(folder: Path, *, progress: bool = True, say: Say) -> Path:
    """Say which pictures, classes, splits and masks `folder` holds; returns it.

    UserError for whatever `afa train` would refuse, all undecodable pictures at once.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the folder with your pictures")
    if not is_own_folder(folder):
        raise UserError(
            f"{folder} is in PASCAL VOC layout (it has ImageSets or JPEGImages), which needs no preparation of this "
            f"kind: train with `afa train voc data.root={folder}`"
        )
    own = read_own_folder(folder)
    say("found", f"{len(own.pictures):,} pictures, tagged by {own.source}, {len(own.classes)} classes")
    if own.untagged:
        total = own.untagged + len(own.pictures)
        say("note", f"left out because {own.source} has no line for them: {own.untagged:,} of {total:,} pictures")
    others = other_files(folder)
    if others:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in others.items())
        say("note", f"left out because they are not pictures that can be read: {kinds}")
    data = DataConfig(root=str(folder), bad_images="skip")
    bad: list[str] = []
    names: dict[str, set[str]] = {}
    for split in ("train", "val"):
        dataset = open_dataset(data, split, train=False, with_mask=split == "val", progress=progress)
        names[split] = set(dataset.names)
        bad += dataset.skipped
        if split == "val":
            masked, notes = dataset.has_masks, dataset.mask_notes()
    counts = {split: len(found) for split, found in names.items()}
    say("split", f"{counts['train']:,} to train on, {counts['val']:,} to measure: {own.how_split()}")
    if masked:
        say("masks", f"{own.mask_files:,} mask files in {own.mask_folder}")
    else:
        say("masks", f"no masks in {own.mask_folder}: the classifier's F1 will be measured, the segmentation can't be")
    for note in [*own.notes, *notes]:
        say("note", note)
    width, tagged = max(map(len, own.classes)), own.counts()
    for number, name in enumerate(own.classes, 1):
        shown = {s: sum(p.name in names[s] for p in own.pictures if name in p.labels) for s in ("train", "val")}
        say(
            "class",
            f"{number:>3}  {name:<{width}}  {shown['train']:>6,} train {shown['val']:>5,} val{_hint(name, tagged)}",
        )
    if bad:
        for reason in bad[:20]:
            say("bad", reason.rpartition(";")[0])
        raise UserError(
            f"{len(bad):,} of the {len(own.pictures):,} pictures of {folder} can't be used, as listed above; fix or "
            "remove them, or train with data.bad_images=skip"
        )
    return folder


def _hint(name: str, counts: dict[str, int]) -> str:
    """A question where a rare tag looks like a misspelling of one that is common."""
    common = [other for other, count in counts.items() if count >= 5 * counts[name] and other != name]
    near = difflib.get_close_matches(name, common, n=1, cutoff=0.75)
    return f"   is this '{near[0]}'?" if near and counts[name] <= 3 else ""
