"""`afa report`: rewrite a run's report.html from its files."""

from __future__ import annotations

import argparse

from afa.commands.common import say
from afa.errors import UserError
from afa.report.results import make_report


def run(options: argparse.Namespace) -> None:
    """Run `afa report` with its parsed options."""
    if not options.run.is_dir():
        raise UserError(f"no such run: {options.run}; give a folder that `afa train` wrote")
    say("report", str(make_report(options.run)))
