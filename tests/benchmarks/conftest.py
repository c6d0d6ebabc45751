"""The benchmarks' tests run on the tiny data set of tests/afa."""

from __future__ import annotations

from tests.afa.conftest import make_voc_tree, voc_root

__all__ = ["make_voc_tree", "voc_root"]
