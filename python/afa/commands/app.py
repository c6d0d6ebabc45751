"""`afa app`: a page in the browser to try a run's model on photographs."""

from __future__ import annotations

import argparse

from afa.app.page import build_page
from afa.commands.common import check_largest_side, choose_device, need_run, say
from afa.config import with_overrides
from afa.errors import UserError
from afa.model import load_model
from afa.run import MODEL


def run(options: argparse.Namespace) -> None:
    """Run `afa app` with its parsed options, until Ctrl-C."""
    folder = need_run(options.run)
    check_largest_side(options.largest_side)
    if not 0 < options.port < 65536:
        raise UserError(f"--port must be between 1 and 65535, got {options.port}")
    model, classes, config = load_model(folder / MODEL, choose_device(options.device))
    page = build_page(model, classes, with_overrides(config, options.overrides), folder.name, options.largest_side)
    say("model", f"{folder}: {len(classes)} classes")
    try:
        _, address, _ = page.launch(
            server_name=options.host, server_port=options.port, quiet=True, prevent_thread_lock=True, footer_links=[]
        )
    except OSError as error:
        raise UserError(f"can't open port {options.port} on {options.host} ({error}); choose another --port") from error
    say("page", f"{address} (stop with Ctrl-C)")
    page.block_thread()
