"""The versions of docs/par_from_scratch.md: their results, the benchmark, and the page's excerpts and links."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from par_from_scratch import run
from par_kernel import ITERATIONS, inputs

from afa_ext import reference

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "par_from_scratch.md"
HAS_COMPILER = shutil.which(shlex.split(os.environ.get("CXX", "g++"))[0]) is not None
CPP = [name for name in run.CHANGES if (run.FOLDER / f"{name}.cpp").exists()]


@pytest.fixture(autouse=True)
def _two_threads():
    """So that v9's loops are distributed."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def version(name, folder) -> run.Version:
    if name in CPP and not HAS_COMPILER:
        pytest.skip("there is no C++ compiler")
    (built,) = run.build([name], folder)
    return built


@pytest.mark.parametrize("name", run.CHANGES)
def test_result_is_that_of_the_reference(name, tmp_path):
    # Two blocks of classes in the tiles, a last vector that overlaps the one before, dilations beyond the image.
    size = (1, 2, 9, 17) if name == "v1" else (2, 8, 18, 37)
    images, masks = inputs(size, run.CPU, torch.float32)
    built = version(name, tmp_path)
    torch.testing.assert_close(built.affinity(images), reference.par_affinity(images), rtol=1e-4, atol=1e-6)
    assert run.check(built, images, masks, reference.par_refine(images, masks, num_iter=ITERATIONS)) < 1e-5


def test_a_flat_image_and_one_of_one_vector(tmp_path):
    built = version("v8", tmp_path)
    for size in ((1, 7, 3, 150), (1, 1, 40, run.MIN_WIDTH)):
        images, masks = inputs(size, run.CPU, torch.float32)
        run.check(built, images, masks, reference.par_refine(images, masks, num_iter=ITERATIONS))


def test_any_number_of_threads_gives_the_same_result(tmp_path):
    images, masks = inputs((1, 5, 23, 40), run.CPU, torch.float32)
    built = version("v9", tmp_path)
    weights = built.affinity(images)
    refined = built.propagate(weights, masks)
    torch.set_num_threads(1)
    assert torch.equal(built.affinity(images), weights)
    assert torch.equal(built.propagate(weights, masks), refined)


def test_a_narrow_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^v4 needs images at least 16 pixels wide, got shape \(1, 3, 20, 15\)$"):
        version("v4", tmp_path).affinity(torch.rand(1, 3, 20, 15))


def test_a_wrong_version_is_not_timed():
    images, masks = inputs((1, 2, 9, 17), run.CPU, torch.float32)
    wrong = run.Version("v0", reference.par_affinity, lambda weights, masks: masks)
    with pytest.raises(SystemExit, match=r"^v0 is wrong: .*; nothing was timed$"):
        run.check(wrong, images, masks, reference.par_refine(images, masks))


def test_the_benchmark_writes_its_results(monkeypatch, tmp_path, capsys):
    arguments = ["--size", "1x2x8x20", "--threads", "2", "--seconds", "0.001", "--out", str(tmp_path)]
    names = ["v2", "v3", "afa_ext"]
    for name in names:
        arguments += ["--version", name]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    run.main()
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("par_from_scratch-")
    content = json.loads(file.read_text())
    assert content["machine"]["threads"] == 2
    rows = content["rows"]
    runs = [(run.SMALL, 1, name) for name in names] + [("1x2x8x20", 1, name) for name in names]
    runs.append(("1x2x8x20", 2, "afa_ext"))
    assert [(row["size"], row["threads"], row["candidate"]) for row in rows] == runs
    assert all(row["median_ms"] == row["affinity_ms"] + row["iterations_ms"] for row in rows)
    assert "afa_ext: the kernel of this package" in capsys.readouterr().out


def code_blocks() -> list[str]:
    return re.findall(r"^```(?:cpp|py)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_excerpts_of_the_page_are_in_the_files():
    files = [path.read_text(encoding="utf-8") for path in run.FOLDER.iterdir() if path.is_file()]

    def lines(text: str) -> str:  # without indentation and empty lines
        return "\n".join(line.strip() for line in text.splitlines() if line.strip())

    blocks = code_blocks()
    assert len(blocks) >= len(run.CHANGES) - 1
    for block in blocks:
        assert any(lines(block) in lines(file) for file in files), block


def test_the_page_has_a_section_for_every_version_and_valid_links():
    page = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^## Version (\d):", page, re.MULTILINE) == [name[1:] for name in run.CHANGES if name[0] == "v"]
    for link in re.findall(r"\]\(([^)#]+)", page):
        assert "://" in link or (PAGE.parent / link).exists(), link
