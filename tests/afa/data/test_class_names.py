"""The one check of class names, at every source of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from afa.data import TaggedDataset
from afa.data.class_names import check_class_list, class_name, difference, is_background
from afa.data.readers.own import read_own_folder
from afa.data.readers.tags import xml_labels
from afa.errors import UserError


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("cat", "cat"),
        (" traffic  light ", "traffic light"),
        ("traffic\u00a0light", "traffic light"),
        ("cafe\u0301", "caf\u00e9"),
        ("bull's eye", "bull's eye"),
        ("bat (animal)", "bat (animal)"),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"),
        ("train", "train"),
    ],
)
def test_good_names(text: str, name: str) -> None:
    assert class_name(text, "here") == name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat,dog", "a comma"),
        ("cat|dog", "a vertical bar"),
        ("['cat'", "a bracket"),
        ('dog"', "a double quote"),
        ("'cat'", "a quote"),
        ("\u201ccat\u201d", "a quote"),
        ("cat\u200b", r"invisible character U\+200B \(ZERO WIDTH SPACE\)"),
        ("\ufeffcat", r"U\+FEFF"),
        ("c\u00adat", r"SOFT HYPHEN"),
        ("cat\u200d", r"U\+200D"),
        ("a\x1b[31mb", "a bracket"),
        ("nan", "missing value"),
        ("<NA>", "missing value"),
        ("None", "missing value"),
        (" ", "empty"),
        ("caf\udce9", "not UTF-8"),
    ],
)
def test_bad_names(text: str, words: str) -> None:
    with pytest.raises(UserError, match=f"^line 3 of tags.csv: .*{words}"):
        class_name(text, "line 3 of tags.csv")


def test_background_in_any_form() -> None:
    assert all(map(is_background, ("background", "Background", "BACKGROUND", "_background_", "__Background__")))
    assert not is_background("background noise")


def test_lists() -> None:
    assert check_class_list(["cat", "dog"], "x") == ["cat", "dog"]
    for names, words in (
        (["cat", "_background_"], "background is always class 0"),
        (["cat", "cat"], "'cat' twice"),
        (["cat", "Cat"], "differ only in case"),
        (["cat", "\uff43\uff41\uff54"], "differ only in case or Unicode form"),
        ([], "got 0"),
        ([f"c{i}" for i in range(255)], "got 255"),
    ):
        with pytest.raises(UserError, match=words):
            check_class_list(names, "x")


def test_difference() -> None:
    assert difference(["a", "b"], ["a", "b"]) is None
    assert difference(["a", "b"], ["b", "a"]) == "the order was a, b and is now b, a"
    assert difference(["box", "round"], ["apple", "box"]) == "the data now lacks round and adds apple"


def _picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (90, 120, 40)).save(path)


@pytest.fixture
def table(tmp_path: Path) -> Callable[[str], Path]:
    """table(rows) -> a folder with 0.jpg to 2.jpg and that tags.csv."""

    def make(rows: str) -> Path:
        for number in range(3):
            _picture(tmp_path / f"{number}.jpg")
        (tmp_path / "tags.csv").write_text(rows, encoding="utf-8")
        return tmp_path

    return make


@pytest.mark.parametrize("cell", ['"cat,dog"', "cat|dog", "\"['cat', 'dog']\"", 'dog"', "cat\u200b", "nan", '"cat'])
def test_invalid_cells_are_reported_with_their_line(table: Callable[[str], Path], cell: str) -> None:
    with pytest.raises(UserError, match=r"^line 4 of .*tags\.csv"):
        read_own_folder(table(f"image,labels\n0.jpg,cat\n1.jpg,dog\n2.jpg,{cell}\n"))


def test_good_cells(table: Callable[[str], Path]) -> None:
    folder = read_own_folder(table('filename,label\n0.jpg, "cat"\n1.jpg,background\n2.jpg,Background cat\n'))
    assert folder.classes == ["cat"]
    assert [picture.labels for picture in folder.pictures] == [("cat",), (), ("cat",)]


def test_unicode_forms_of_names_are_one(tmp_path: Path) -> None:
    for number, form in enumerate(("caf\u00e9", "cafe\u0301")):
        _picture(tmp_path / form / f"{number}.jpg")
    assert read_own_folder(tmp_path).classes == ["caf\u00e9"]
    (tmp_path / "tags.csv").write_text("caf\u00e9/0.jpg,a\ncaf\u00e9/1.jpg,b\n", encoding="utf-8")
    assert [picture.labels for picture in read_own_folder(tmp_path).pictures] == [("a",), ("b",)]


@pytest.mark.parametrize("bad", ["cat,dog", "cat\u200b", "[cat]", "nan"])
def test_every_source_is_checked(tmp_path: Path, voc_root: Path, bad: str) -> None:
    _picture(tmp_path / "own" / bad / "1.jpg")
    with pytest.raises(UserError, match=r"the folder .*own"):
        read_own_folder(tmp_path / "own")
    (voc_root / "Annotations/x.xml").write_text(
        f"<annotation><object><name>{bad}</name></object></annotation>", encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"an object of .*x\.xml"):
        xml_labels(voc_root / "Annotations/x.xml")
    (voc_root / "classes.txt").write_text(f"square\n{bad}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"classes\.txt: "):
        TaggedDataset(voc_root, "train", train=False, with_mask=False)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("<annotation><object><name/></object></annotation>", "empty"),
        ("<annotation><object/></annotation>", "empty"),
        ("<html/>", "got <html>"),
        ('<?xml version="1.0" encoding="no-such-code"?><annotation/>', "can't be read as XML"),
        ("", "can't be read as XML"),
    ],
)
def test_annotation_oddities(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "a.xml").write_text(content)
    with pytest.raises(UserError, match=words):
        xml_labels(tmp_path / "a.xml")


def test_annotation_without_objects_or_with_background(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text("<annotation><object><name> Background </name></object></annotation>")
    assert xml_labels(tmp_path / "a.xml") == []


@pytest.mark.parametrize(
    ("places", "train", "val", "how"),
    [
        (("train", "valid", "test"), "train", "valid", r"train and valid \(test is ignored\)"),
        (("Train", "Validation"), "Train", "Validation", "Train and Validation"),
        (("training", "testing"), "training", "testing", "testing and training"),
    ],
)
def test_folders_of_splits(tmp_path: Path, places: tuple[str, ...], train: str, val: str, how: str) -> None:
    for place in places:
        for name in ("cat", "dog"):
            _picture(tmp_path / place / name / "1.jpg")
    folder = read_own_folder(tmp_path)
    assert folder.classes == ["cat", "dog"]
    assert {picture.name.partition("/")[0] for picture in folder.split("train")} == {train}
    assert {picture.name.partition("/")[0] for picture in folder.split("val")} == {val}
    assert how.replace("\\", "") in folder.how_split()
    if "test" in places:
        assert {picture.name.partition("/")[0] for picture in folder.split("test")} == {"test"}


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for place in ("train/1.jpg", "bus/1.jpg"):
        _picture(tmp_path / place)
    assert read_own_folder(tmp_path).classes == ["bus", "train"]
    _picture(tmp_path / "val/bus/2.jpg")
    with pytest.raises(UserError, match="split folders train, val and other images"):
        read_own_folder(tmp_path)


def test_a_folder_train_on_its_own(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        _picture(tmp_path / "train" / name / "1.jpg")
    folder = read_own_folder(tmp_path)
    assert folder.classes == ["cat", "dog"]
    assert len(folder.split("train")) == len(folder.split("val")) == 1
