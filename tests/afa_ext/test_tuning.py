from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from afa_ext import _native, tuning

C = _native._C
ROOT = Path(__file__).resolve().parents[2]
KERNEL = max(C.launch_plans(), key=lambda entry: len(entry["variants"]))
NAME, VARIANTS = KERNEL["kernel"], KERNEL["variants"]


@pytest.fixture(autouse=True)
def _plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AFA_EXT_TUNING", "off")
    tuning.reset()
    yield
    monkeypatch.undo()
    tuning.reset()


def table(**changed: object) -> dict[str, object]:
    plan = {"kernel": NAME, "dtype": "float16", "max_items": C.size_classes()[1], "variant": VARIANTS[-1]}
    given = {"gpu": "some GPU", "torch": "2.10", "cuda": "13", "commit": "abc", "date": "2026-01-01", "plans": [plan]}
    return {"format": 1, "architecture": 80, "measured": True, **given, **changed}


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)


def chosen(items: int, dtype: str = "float16", arch: int = 0) -> tuple[str, bool]:
    """The variant in force, and whether it is the default."""
    (entry,) = (entry for entry in C.launch_plans(arch) if entry["kernel"] == NAME)
    limits = C.size_classes()
    limit = next((limit for limit in limits if limit is not None and items <= limit), None)
    (plan,) = (plan for plan in entry["plans"] if plan["dtype"] == dtype and plan["max_items"] == limit)
    assert C.launch_plan(NAME, dtype, items, arch) == plan["variant"] or plan["default"]
    return plan["variant"], plan["default"]


def test_every_kernel_has_a_default_for_every_type_and_size():
    for entry in C.launch_plans():
        assert len(set(entry["variants"])) == len(entry["variants"]) > 0
        assert len(entry["plans"]) == 4 * len(C.size_classes())
        for plan in entry["plans"]:
            assert plan["default"]
            for items in (0, 1, *(limit for limit in C.size_classes() if limit), 1 << 40):
                assert C.launch_plan(entry["kernel"], plan["dtype"], items) in entry["variants"]
    assert len({entry["kernel"] for entry in C.launch_plans()}) == len(C.launch_plans())


def test_a_plan_is_for_one_type_size_class_and_architecture():
    small, second, *_ = C.size_classes()
    C.set_launch_plan(NAME, VARIANTS[-1], "float16", second, 80)
    for items in (small + 1, second):
        assert chosen(items, arch=80) == (VARIANTS[-1], False)
    for other in (
        chosen(small, arch=80),
        chosen(second + 1, arch=80),
        chosen(second, "bfloat16", 80),
        chosen(second, arch=75),
        chosen(second),
    ):
        assert other[1]
    C.set_launch_plan(NAME, None, "float16", second, 80)
    assert chosen(second, arch=80)[1]


def test_the_nearest_older_architecture_is_taken():
    C.set_launch_plan(NAME, VARIANTS[0], arch=90)
    C.set_launch_plan(NAME, VARIANTS[-1], arch=80)
    for arch, expected in ((80, -1), (86, -1), (89, -1), (90, 0), (120, 0)):
        assert chosen(5, arch=arch) == (VARIANTS[expected], False)
    assert chosen(5, arch=75)[1]
    C.set_launch_plan(NAME, None, "float16", 5, 90)  # for this class the older one is left
    assert chosen(5, arch=120) == (VARIANTS[-1], False)
    assert chosen(1 << 30, arch=120) == (VARIANTS[0], False)


def test_what_is_set_for_any_architecture_goes_first():
    C.set_launch_plan(NAME, VARIANTS[0], arch=90)
    C.set_launch_plan(NAME, VARIANTS[-1], "float16")
    for arch in (0, 80, 90):
        assert chosen(5, arch=arch) == (VARIANTS[-1], False)
        assert chosen(1 << 40, arch=arch) == (VARIANTS[-1], False)
    assert chosen(5, "float32", 90) == (VARIANTS[0], False)
    C.reset_launch_plans()
    assert all(plan["default"] for entry in C.launch_plans(90) for plan in entry["plans"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none", "a"), "kernel must be one of .*stencil_step.*, got 'none'"),
        ((NAME, "none"), f"variant must be one of .*{VARIANTS[0]}.* for {NAME}, got 'none'"),
        ((NAME, VARIANTS[0], "int8"), "dtype must be one of float32, float64, float16, bfloat16, got 'int8'"),
        ((NAME, VARIANTS[0], "float32", -1), "items must be at least 0, got -1"),
        ((NAME, VARIANTS[0], "float32", 1, -80), "arch must be a compute capability, 90 for 9.0, or 0, got -80"),
    ],
    ids=str,
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        C.set_launch_plan(*arguments)
    if len(arguments) > 2:
        name, _, dtype, *rest = arguments
        with pytest.raises(ValueError, match=message):
            C.launch_plan(name, dtype, *(rest or [1]))


def test_too_many_architectures():
    for arch in range(1000, 1032):
        C.set_launch_plan(NAME, VARIANTS[0], arch=arch)
    with pytest.raises(ValueError, match="too many architectures"):
        C.set_launch_plan(NAME, VARIANTS[0], arch=1032)
    C.reset_launch_plans()
    C.set_launch_plan(NAME, VARIANTS[-1], arch=80)
    assert chosen(5, arch=80) == (VARIANTS[-1], False)


def test_a_file_is_put_in_force(tmp_path, monkeypatch):
    file = tmp_path / "sm_80.json"
    file.write_text(json.dumps(table()))
    monkeypatch.setenv("AFA_EXT_TUNING", str(file))
    tuning.reset()
    assert chosen(C.size_classes()[1], arch=89) == (VARIANTS[-1], False)
    assert chosen(C.size_classes()[1], arch=75)[1]
    largest = {**table()["plans"][0], "max_items": None}
    tuning.apply_table(table(architecture=90, plans=[largest]))
    assert chosen(1 << 40, arch=90) == (VARIANTS[-1], False)
    assert chosen(C.size_classes()[-2], arch=90)[1]


def plan(**changed: object) -> list[dict[str, object]]:
    return [{**table()["plans"][0], **changed}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must be an object with the keys .*got list"),
        ({"format": 1}, "must be an object with the keys .*got \\['format'\\]"),
        (table(format=2), "format must be 1, got 2"),
        (table(architecture="sm_80"), "architecture must be a compute capability as 90 for 9.0, got 'sm_80'"),
        (table(measured=None), "measured must be true or false, got None"),
        (table(gpu=None), "a measured table must name gpu, torch and date"),
        (table(plans=5), "plans must be a list, got 5"),
        (table(plans=[5]), r"plans\[0\] must be an object with the keys .*, got 5"),
        (table(plans=plan(kernel="k")), r"plans\[0\].kernel must be one of .*, got 'k'"),
        (table(plans=plan(dtype="int8")), r"plans\[0\].dtype must be one of .*float16.*, got 'int8'"),
        (table(plans=plan(max_items=7)), r"plans\[0\].max_items must be one of .*None\], got 7"),
        (table(plans=plan(variant="v")), rf"plans\[0\].variant must be one of .* for {NAME}, got 'v'"),
    ],
    ids=str,
)
def test_a_wrong_file_is_refused_by_name(content, message, tmp_path, monkeypatch):
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"wrong.json:? .*{message}|wrong.json: {message}"):
        tuning.read_table(file)
    monkeypatch.setenv("AFA_EXT_TUNING", str(file))
    with pytest.raises(ValueError, match=r"AFA_EXT_TUNING must be the path of a table, or off: .*wrong\.json"):
        tuning.reset()


def test_a_table_of_another_version_in_the_package_is_left_out_with_a_warning(tmp_path, monkeypatch):
    (tmp_path / "sm_80.json").write_text(json.dumps(table(plans=plan(variant="of_old"))))
    (tmp_path / "sm_90.json").write_text(json.dumps(table(architecture=90)))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.delenv("AFA_EXT_TUNING")
    with pytest.warns(UserWarning, match=r"sm_80\.json.*got 'of_old'; its launch plans are not used"):
        tuning.reset()
    assert chosen(C.size_classes()[1], arch=80)[1]
    assert chosen(C.size_classes()[1], arch=90) == (VARIANTS[-1], False)


def test_import_reads_the_variable_and_leaves_the_gpu_alone(tmp_path):
    file = tmp_path / "sm_80.json"
    file.write_text(json.dumps(table()))
    code = f"""
import torch, afa_ext
from afa_ext import tuning
assert not torch.cuda.is_initialized()
print([p["default"] for e in tuning.launch_plans(80) if e["kernel"] == {NAME!r} for p in e["plans"]].count(False))
"""
    for choice, count in ((str(file), "1"), ("off", "0")):
        result = run_python(code, AFA_EXT_TUNING=choice)
        assert result.stdout.strip() == count, result.stderr
    result = run_python("import afa_ext", AFA_EXT_TUNING=str(tmp_path / "missing.json"))
    assert "AFA_EXT_TUNING must be the path of a table, or off" in result.stderr.splitlines()[-1]


def test_shipped_tables_are_right_and_say_where_they_come_from():
    files = sorted(tuning.FOLDER.glob("*.json"))
    assert "default.json" in [file.name for file in files]
    for file in files:
        content = tuning.read_table(file)
        if file.name == "default.json":
            assert content["plans"] == [] and not content["measured"]
        else:
            assert file.name == f"sm_{content['architecture']}.json"
            assert content["measured"], f"{file.name} holds plans that nobody measured"


def test_the_package_holds_the_tables(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    built = {file.name for file in (tmp_path / "afa_ext" / "tuning").glob("*.json")}
    assert built == {file.name for file in tuning.FOLDER.glob("*.json")}
