"""Rules for listing a folder: hidden files, loops of links, output of earlier commands, masks without an image."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from afa.commands.cli import main
from afa.data.listing import IMAGE_SUFFIXES, PictureFinder, visible_files
from afa.data.mask_notes import mask_notes
from afa.data.readers.own import read_own_folder
from afa.files import mark_output


def _picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (90, 120, 40)).save(path)


def _listed(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in visible_files(root, IMAGE_SUFFIXES)]


def test_listed_files(tmp_path: Path) -> None:
    for name in ("b.jpg", "a/1.PNG", "a/.hidden.jpg", ".trash/2.jpg", "out/masks/3.png", "predictions/masks/4.png"):
        _picture(tmp_path / name)
    (tmp_path / "a/notes.txt").write_text("")
    mark_output(tmp_path / "out/masks")
    assert _listed(tmp_path) == ["b.jpg", "a/1.PNG"]
    assert _listed(tmp_path / "nowhere") == []


def test_loops_of_links_end(tmp_path: Path) -> None:
    _picture(tmp_path / "a/1.jpg")
    (tmp_path / "a/up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "a/self").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "twice").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "dead.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert _listed(tmp_path) == ["a/1.jpg", "twice/1.jpg"]


def test_names_in_lists(tmp_path: Path) -> None:
    finder = PictureFinder({"sub/a": tmp_path / "sub/a.jpg", "b c": tmp_path / "b c.png", "o/a": tmp_path / "o/a.jpg"})
    assert finder.find("sub\\a.jpg") == ["sub/a"]
    assert finder.find("./b c.png") == finder.find("b c") == ["b c"]
    assert finder.find("a.jpg") == ["sub/a", "o/a"]
    assert finder.find("d") == []


@pytest.mark.parametrize("name", [b"caf\xe9.jpg", b"a\x1b[2Jb.jpg", b"line\nbreak.jpg", b"x" * 251 + b".jpg"])
def test_any_bytes_in_a_file_name(tmp_path: Path, name: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(6):
        _picture(tmp_path / f"cat/{number}.jpg")
    os.rename(tmp_path / "cat/0.jpg", os.fsencode(tmp_path / "cat") + b"/" + name)
    assert main(["prepare", "own", str(tmp_path), "--quiet"]) == 0
    victim = os.fsencode(tmp_path / "cat") + b"/" + name
    with open(victim, "wb") as file:
        file.write(b"no picture")
    assert main(["prepare", "own", str(tmp_path), "--quiet"]) == 2
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("masks/cat/0.bmp", "are not .png and are not used as masks: 1 .bmp"),
        ("masks/cat/0_mask.png", "1 mask files in {root}/masks match no image (cat/0_mask)"),
        ("Masks/cat/0.png", "1 mask files in {root}/Masks"),
    ],
)
def test_masks_elsewhere_are_reported(
    tmp_path: Path, name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        _picture(tmp_path / f"cat/{number}.png")
    (tmp_path / name).parent.mkdir(parents=True)
    Image.fromarray(np.ones((16, 20), np.uint8)).save(tmp_path / name)
    assert main(["prepare", "own", str(tmp_path), "--quiet"]) == 0
    assert words.format(root=tmp_path) in capsys.readouterr().out
    assert read_own_folder(tmp_path).classes == ["cat"]


def test_output_is_not_used_as_masks(tmp_path: Path) -> None:
    _picture(tmp_path / "cat/1.png")
    _picture(tmp_path / "masks/cat/1.png")
    mark_output(tmp_path / "masks")
    folder = read_own_folder(tmp_path)
    assert folder.classes == ["cat"] and not folder.masks


def test_mask_notes() -> None:
    assert mask_notes([90, 10, 10], 0, ["a", "b"]) == []
    assert mask_notes([0, 0, 0], 0, ["a", "b"]) == []
    (note,) = mask_notes([90, 0, 0], 10, ["a", "b"])
    assert "background only" in note and "10% of the pixels are 255" in note and "use the class index (1)" in note
    (note,) = mask_notes([90, 0, 0], 0, ["a", "b"])
    assert "255" not in note
    assert mask_notes([90, 5, 0], 5, ["a", "b"]) == ["no mask contains b: the scores leave it out"]
    assert mask_notes([9, 5, 5], 81, ["a", "b"])[0].startswith("81% of the mask pixels")
