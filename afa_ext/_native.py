"""Loads the native library; importing this module registers ``torch.ops.afa_ext.*``.

A missing library and one that can't be loaded raise different errors, as they need different fixes.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # the library takes its torch symbols from the torch already in the process


def _load() -> ModuleType:
    name = f"{__package__}._C"
    if importlib.util.find_spec(name) is None:
        raise ImportError(
            f"afa_ext's native library is missing: there is no {name.rpartition('.')[2]}*.so in "
            f"{Path(__file__).parent}. The package was imported without being built; run `pip install .` in its "
            "source folder (and leave that folder, so that the installed package is the one imported)."
        )
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"afa_ext's native library exists but can't be loaded with torch {torch.__version__}: {error}. "
            "It needs the Python version it was built for and at least the torch version in its dependencies; "
            "reinstall it with `pip install --force-reinstall --no-deps .`"
        ) from error


_C = _load()


def build_info() -> dict[str, Any]:
    """Build settings of the native library.

    Keys: ``compiler``, ``build_type``, ``torch_headers`` (version), ``cuda`` (version, or None for a CPU build),
    ``cuda_architectures``, ``simd_levels`` (compiled) and ``simd`` (in use; AFA_EXT_SIMD=baseline|avx2|avx512
    forces one, read when the library is first used).
    """
    info: dict[str, Any] = _C.build_info()
    return info
