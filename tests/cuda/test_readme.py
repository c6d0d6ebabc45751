"""tests/cuda/README.md lists all planted faults and all tests that need a real GPU."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
TEXT = (HERE / "README.md").read_text(encoding="utf-8")


def test_every_planted_fault_is_listed():
    source = (HERE / "test_faults.py").read_text(encoding="utf-8")
    planted = re.findall(r"^def (\w+)\(planted: Any, wrong: bool\)", source, re.MULTILINE)
    assert planted
    assert planted == re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)


def test_every_test_that_needs_a_real_gpu_is_listed():
    marked = set[str]()
    for path in HERE.parent.rglob("test_*.py"):
        marked |= set(re.findall(r"mark\.real_gpu\(.*\)\n(?:@.*\n)*def (\w+)", path.read_text(encoding="utf-8")))
    section = TEXT.partition("## What needs a real GPU")[2]
    assert marked
    assert marked == set(re.findall(r"`(test_\w+)`", section))
