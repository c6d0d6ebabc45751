"""`afa config`: print a configuration, or the JSON schema of all of them."""

from __future__ import annotations

import argparse

from afa.config import json_schema, load_config, to_yaml
from afa.errors import UserError, did_you_mean

ACTIONS = ("show", "schema")


def run(options: argparse.Namespace) -> None:
    """Run `afa config` with its parsed options."""
    if options.action not in ACTIONS:
        hint = did_you_mean(options.action, ACTIONS)
        raise UserError(f"unknown action '{options.action}' of afa config; expected {' or '.join(ACTIONS)}{hint}")
    if options.action == "schema":
        if options.config is not None:
            raise UserError(f"afa config schema takes no configuration, got '{options.config}'")
        print(json_schema())
        return
    if options.config is None:
        raise UserError("afa config show needs a configuration: a name such as voc, a YAML file or a run's folder")
    print(to_yaml(load_config(options.config, options.overrides)), end="")
