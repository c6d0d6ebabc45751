"""`afa prepare`: prepare a data set for training."""

from __future__ import annotations

import argparse

from afa.commands.common import say
from afa.data import prepare
from afa.errors import UserError, did_you_mean
from afa.files import check_writable


def run(options: argparse.Namespace) -> None:
    """Run `afa prepare` with its parsed options."""
    folder, masks, progress = options.folder, options.train_masks, not options.quiet
    kinds = ("voc", "coco", "own")
    if options.kind not in kinds:
        raise UserError(
            f"unknown data set '{options.kind}'; expected {', '.join(kinds)}{did_you_mean(options.kind, kinds)}"
        )
    if options.sbd is not None and options.kind != "voc":
        raise UserError(f"--sbd is only valid for `afa prepare voc`, got {options.kind}")
    try:
        if options.kind != "own" and folder.is_dir():
            check_writable(folder, "the data folder")
        if options.kind == "voc":
            root = prepare.prepare_voc(folder, sbd=options.sbd, train_masks=masks, progress=progress, say=say)
        elif options.kind == "coco":
            root = prepare.prepare_coco(folder, train_masks=masks, progress=progress, say=say)
        else:
            root = prepare.prepare_own(folder, progress=progress, say=say)
    except KeyboardInterrupt:
        say("stopped", "run the same command again to resume; all written files are complete")
        raise
    say("next", f"afa train {options.kind} data.root={root}")
