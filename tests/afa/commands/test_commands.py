"""Commands shown in the help and in docs/evaluation.md are commands, with settings that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from afa.commands.cli import _parsers
from afa.config import Config, with_overrides

PAGE = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
PARSERS = _parsers()[1]


def _commands(text: str) -> list[str]:
    lines = re.findall(r"^ *(?:torchrun --nproc-per-node 4 -m )?(afa .*)$", text, re.MULTILINE)
    return [re.split(r" +#|  +", line)[0] for line in lines]


SHOWN = sorted(
    {
        *_commands("\n".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL))),
        *(
            line
            for name in ("evaluate", "predict", "pseudo-labels", "report")
            for line in _commands(PARSERS[name].description or "")
        ),
    }
)


def test_there_are_commands() -> None:
    assert {line.split()[1] for line in SHOWN} == {"app", "evaluate", "predict", "pseudo-labels", "report"}
    assert len(SHOWN) > 12


@pytest.mark.parametrize("line", SHOWN)
def test_command(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    options = PARSERS[name].parse_intermixed_args(arguments)
    with_overrides(Config(), getattr(options, "overrides", []))


def test_settings_of_the_page_exist() -> None:
    settings = set(re.findall(r"`((?:eval|labels|data)\.\w+)(?:=\w+)?`", PAGE)) - {"labels.json"}
    assert len(settings) > 8
    for setting in settings:
        section, name = setting.split(".")
        assert hasattr(getattr(Config(), section), name), setting
