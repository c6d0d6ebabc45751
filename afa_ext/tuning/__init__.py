"""Launch plans of the CUDA kernels: which compiled variant is launched, by type, size and GPU.

``python benchmarks/tune.py`` measures them and writes ``sm_<architecture>.json`` into this folder. All tables here are
read when :mod:`afa_ext` is imported, which doesn't touch the GPU; a call on a GPU takes the plan for its architecture,
else for the nearest older one that has one, else the kernel's built-in rule. Results differ between variants within
rounding only.

The environment variable ``AFA_EXT_TUNING`` names another file to read in place of these, or is ``off``: the built-in
rules alone. A table says where it comes from: ``measured``, ``gpu``, ``torch``, ``cuda``, ``commit`` and ``date``.
``default.json`` holds no plan: it shows the format.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._native import _C

FOLDER = Path(__file__).parent
FORMAT = 1
_KEYS = {"format", "architecture", "measured", "gpu", "torch", "cuda", "commit", "date", "plans"}
_PLAN_KEYS = {"kernel", "dtype", "max_items", "variant"}  # and "ms": milliseconds by variant


def read_table(path: str | Path) -> dict[str, Any]:
    """The table in this file.

    Raises ValueError, naming the file and the entry, unless it is a table of this version's kernels.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as a table of launch plans: {error}") from error
    check_table(table, str(path))
    return dict(table)


def check_table(table: object, name: str) -> None:
    """Raises ValueError unless this is a table that :func:`apply_table` can apply."""
    if not isinstance(table, dict) or set(table) != _KEYS:
        keys = sorted(table) if isinstance(table, dict) else type(table).__name__
        raise ValueError(f"{name} must be an object with the keys {sorted(_KEYS)}, got {keys}")
    if table["format"] != FORMAT:
        raise ValueError(f"{name}: format must be {FORMAT}, got {table['format']!r}")
    architecture = table["architecture"]
    if not isinstance(architecture, int) or isinstance(architecture, bool) or architecture < 0:
        raise ValueError(f"{name}: architecture must be a compute capability as 90 for 9.0, got {architecture!r}")
    if not isinstance(table["measured"], bool):
        raise ValueError(f"{name}: measured must be true or false, got {table['measured']!r}")
    if not isinstance(table["plans"], list):
        raise ValueError(f"{name}: plans must be a list, got {table['plans']!r}")
    if table["plans"] and table["measured"] and not all(table[key] for key in ("gpu", "torch", "date")):
        raise ValueError(f"{name}: a measured table must name gpu, torch and date")
    variants = {entry["kernel"]: entry["variants"] for entry in _C.launch_plans()}
    dtypes = {plan["dtype"] for entry in _C.launch_plans() for plan in entry["plans"]}
    for i, plan in enumerate(table["plans"]):
        where = f"{name}: plans[{i}]"
        if not isinstance(plan, dict) or not _PLAN_KEYS <= set(plan) <= _PLAN_KEYS | {"ms"}:
            raise ValueError(f"{where} must be an object with the keys {sorted(_PLAN_KEYS)}, got {plan!r}")
        for key, known in (("kernel", list(variants)), ("dtype", sorted(dtypes)), ("max_items", _C.size_classes())):
            if plan[key] not in known:
                raise ValueError(f"{where}.{key} must be one of {known}, got {plan[key]!r}")
        if plan["variant"] not in variants[plan["kernel"]]:
            known = variants[plan["kernel"]]
            raise ValueError(f"{where}.variant must be one of {known} for {plan['kernel']}, got {plan['variant']!r}")


def apply_table(table: Mapping[str, Any]) -> None:
    """Puts a checked table in force for its architecture and the later ones that have none."""
    for plan in table["plans"]:
        limit = plan["max_items"]
        items = limit if limit is not None else _C.size_classes()[-2] + 1
        _C.set_launch_plan(plan["kernel"], plan["variant"], plan["dtype"], items, table["architecture"])


def reset() -> None:
    """Puts in force what AFA_EXT_TUNING asks for, and nothing else."""
    choice = os.environ.get("AFA_EXT_TUNING", "")
    _C.reset_launch_plans()
    if choice == "off":
        return
    if choice:
        try:
            tables = [read_table(choice)]
        except ValueError as error:
            raise ValueError(f"AFA_EXT_TUNING must be the path of a table, or off: {error}") from error
    else:
        tables = []
        for path in sorted(FOLDER.glob("*.json")):
            try:
                tables.append(read_table(path))
            except ValueError as error:  # of another version: no reason to do without all the rest
                warnings.warn(f"{error}; its launch plans are not used", stacklevel=2)
    for table in tables:
        apply_table(table)


def launch_plans(architecture: int | None = None) -> list[dict[str, Any]]:
    """Every tuned CUDA kernel: ``kernel``, ``variants``, ``times_chosen`` (in this process), ``last_items`` (of the
    last call) and ``plans``: the ``variant`` now in force for each ``dtype`` and size class (``max_items``, None for
    the last), and whether it is the ``default``.

    ``architecture`` is a compute capability, 90 for 9.0; by default the current GPU's, or 0 where there is none.
    """
    if architecture is None:
        import torch

        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
        architecture = 10 * capability[0] + capability[1]
    plans: list[dict[str, Any]] = _C.launch_plans(architecture)
    return plans


reset()
