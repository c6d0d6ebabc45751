"""Check a folder of the user's own images before training: print its contents and every bad file. Writes nothing."""

from __future__ import annotations

import difflib
from pathlib import Path

from afa.config import DataConfig
from afa.data.dataset import open_dataset
from afa.data.prepare.common import Say
from afa.data.readers.own import is_own_folder, other_files, read_own_folder
from afa.errors import UserError


def prepare_own(folder: Path, *, progress: bool = True, say: Say) -> Path:
    """Print the images, classes, splits and masks of `folder`; returns it.

    Raises UserError for everything that `afa train` would refuse, including all undecodable images at once.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; give the folder with your images")
    if not is_own_folder(folder):
        raise UserError(
            f"{folder} is in PASCAL VOC layout (it has ImageSets or JPEGImages) and doesn't need this command; "
            f"train with `afa train voc data.root={folder}`"
        )
    own = read_own_folder(folder)
    say("found", f"{len(own.pictures):,} images, tagged by {own.source}, {len(own.classes)} classes")
    if own.untagged:
        total = own.untagged + len(own.pictures)
        say("note", f"skipped because {own.source} has no line for them: {own.untagged:,} of {total:,} images")
    others = other_files(folder)
    if others:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in others.items())
        say("note", f"skipped because they are not supported image files: {kinds}")
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
    say("split", f"{counts['train']:,} for training, {counts['val']:,} for validation: {own.how_split()}")
    if masked:
        say("masks", f"{own.mask_files:,} mask files in {own.mask_folder}")
    else:
        say("masks", f"no masks in {own.mask_folder}: only the classifier's F1 will be computed")
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
            f"{len(bad):,} of the {len(own.pictures):,} images of {folder} can't be used (listed above); fix or "
            "remove them, or train with data.bad_images=skip"
        )
    return folder


def _hint(name: str, counts: dict[str, int]) -> str:
    """A hint if a rare tag looks like a misspelling of a common one."""
    common = [other for other, count in counts.items() if count >= 5 * counts[name] and other != name]
    near = difflib.get_close_matches(name, common, n=1, cutoff=0.75)
    return f"   is this '{near[0]}'?" if near and counts[name] <= 3 else ""
