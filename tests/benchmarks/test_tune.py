"""The tuner without a GPU: its logic on made-up kernels, and all of it on the stand-in GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import tune
from torch import Tensor

from afa_ext import _native, tuning
from tests.cuda import build
from tests.cuda import run as stand_in

CPU = torch.device("cpu")


class FakePlans:
    """One kernel that adds 1, in variants of which some are wrong."""

    VARIANTS: Mapping[str, Callable[[Tensor], Tensor]] = {
        "slow": lambda x: x + 1,
        "fast": lambda x: 1 + x,
        "wrong": lambda x: x + 1.001,
        "nan": lambda x: x / 0 * 0,
        "unsteady": lambda x: x + 1 + 1e-7 * torch.rand_like(x),
        "short": lambda x: x[:, 1:] + 1,
    }

    def __init__(self) -> None:
        self.variant: str | None = None
        self.count = self.items = 0

    def kernel(self, x: Tensor) -> Tensor:
        self.count, self.items = self.count + 1, x.numel()
        if self.variant == "fails":
            raise RuntimeError("the CUDA kernel could not be launched: too many resources\nmore")
        return self.VARIANTS[self.variant or "slow"](x)

    def launch_plans(self, arch: int) -> list[dict[str, Any]]:
        names = [*self.VARIANTS, "fails"]
        return [{"kernel": "add", "variants": names, "times_chosen": self.count, "last_items": self.items}]

    def launch_plan(self, kernel: str, dtype: str, items: int, arch: int) -> str:
        return "slow"

    def set_launch_plan(self, kernel: str, variant: str | None) -> None:
        self.variant = variant

    def size_classes(self) -> list[int | None]:
        return [100, None]


class FakeBench:
    """A clock by which each candidate takes what `times` says, 1 ms where it says nothing."""

    device, architecture = CPU, 90

    def __init__(self, times: Mapping[str, float]) -> None:
        self.times, self.timed = times, []

    def time(self, candidates: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
        for run in candidates.values():
            run()
        self.timed.append(sorted(candidates))
        return {name: self.times.get(name, 1.0) for name in candidates}


FASTER_IF_WRONG = {"wrong": 0.1, "nan": 0.1, "unsteady": 0.1, "short": 0.1, "fails": 0.1, "fast": 0.5}


def run_sweep(plans: FakePlans, **changed: Any) -> tuple[list[tune.Row], FakeBench]:
    case = tune.Case(
        [(2, 5), (3, 50)], lambda size, device: [torch.rand(*size, device=device)], plans.kernel, lambda x: x + 1
    )
    bench = FakeBench(FASTER_IF_WRONG)
    reported: list[tune.Row] = []
    cases = {"add": dataclasses.replace(case, **changed)}
    rows = tune.sweep(cases, ["float32"], bench, plans, 0.1, reported.append)
    assert reported == rows
    return rows, bench


def test_a_wrong_variant_is_never_timed_nor_chosen_and_the_fastest_right_one_is():
    rows, bench = run_sweep(FakePlans())
    assert [(row.size, row.max_items, row.variant, row.present) for row in rows] == [
        ((2, 5), 100, "fast", "slow"),
        ((3, 50), None, "fast", "slow"),
    ]
    assert bench.timed == [["fast", "slow"]] * 2
    for row in rows:
        assert row.milliseconds == {"slow": 1.0, "fast": 0.5}
        assert set(row.wrong) == {"wrong", "nan", "unsteady", "short", "fails"}
        assert row.wrong["wrong"].startswith("relative error 0.0")
        assert row.wrong["nan"] == "values that are not finite"
        assert row.wrong["unsteady"] == "two runs differ"
        assert row.wrong["short"].startswith("shape [")
        assert row.wrong["fails"] == "the CUDA kernel could not be launched: too many resources"


def test_without_a_right_variant_there_is_no_plan(capsys):
    rows, bench = run_sweep(FakePlans(), reference=lambda x: x + 2)
    assert [row.variant for row in rows] == [None, None]
    assert bench.timed == []
    tune.print_row(rows[0])
    assert "WRONG: relative error" in capsys.readouterr().out
    about = {"device": "some GPU", "torch": "2.10", "cuda": "13", "commit": "abc"}
    assert tune.table_of(rows, about, 90, None)["plans"] == []


def test_a_case_that_never_launches_its_kernel_is_refused():
    with pytest.raises(SystemExit, match=r"the case of add in benchmarks/tune\.py never launches it"):
        run_sweep(FakePlans(), run=lambda x: x + 1)


@pytest.mark.parametrize("sizes", [[(2, 500), (3, 50)], [(2, 5), (2, 5)]], ids=["too large", "too small"])
def test_a_case_of_another_size_class_is_refused(sizes):
    with pytest.raises(SystemExit, match=r"add at \(2, .*\): \d+ work items are not in the size class up to"):
        run_sweep(FakePlans(), sizes=sizes)


def test_a_row_is_shown(capsys):
    times = {"slow": 1.0, "fast": 0.5}
    tune.print_row(tune.Row("add", "float32", (2, 5), 100, "slow", times, {"bad": "two runs differ"}))
    title, _, *lines = capsys.readouterr().out.strip().splitlines()
    assert title == "add, 2x5 float32"
    assert [line.split() for line in lines] == [
        ["fast", "0.5000", "chosen"],
        ["slow", "1.0000", "present", "plan"],
        ["bad", "WRONG:", "two", "runs", "differ"],
    ]


def test_every_tuned_kernel_has_a_case():
    assert set(tune.CASES) == {entry["kernel"] for entry in _native._C.launch_plans()}
    for case in tune.CASES.values():
        assert len(case.sizes) == len(_native._C.size_classes())


def real_table(**changed: Any) -> dict[str, Any]:
    """One that tune.table_of makes of one row of a real kernel."""
    entry = _native._C.launch_plans()[0]
    given = {"dtype": "float32", "max_items": None, "size": (9, 9), "present": entry["variants"][0]}
    times = {name: 0.25 + i for i, name in enumerate(entry["variants"])}
    row = tune.Row(**{"kernel": entry["kernel"], "milliseconds": times, "wrong": {}, **given, **changed})
    about = {"device": "some GPU", "torch": "2.10", "cuda": "13", "commit": "abc"}
    return tune.table_of([row], about, 90, None)


def test_a_table_is_written_whole_and_read_back(tmp_path):
    table = real_table()
    assert tune.write_table(table, tmp_path) == tmp_path / "sm_90.json"
    assert [file.name for file in tmp_path.iterdir()] == ["sm_90.json"]
    assert tuning.read_table(tmp_path / "sm_90.json") == table
    assert table["measured"] and table["gpu"] == "some GPU"
    with pytest.raises(ValueError, match="variant must be one of"):
        tune.write_table({**table, "plans": [{**table["plans"][0], "variant": "none"}]}, tmp_path)
    assert tuning.read_table(tmp_path / "sm_90.json") == table


def test_plans_of_what_was_not_measured_are_kept_if_the_gpu_is_the_same():
    before = real_table(dtype="float16")
    (kept,) = before["plans"]
    about = {"device": "some GPU", "torch": "2.11", "cuda": "13", "commit": "def"}
    row = tune.Row(kept["kernel"], "float32", (9, 9), None, kept["variant"], {kept["variant"]: 3.0}, {})
    again = dataclasses.replace(row, dtype="float16")
    for rows, gpu, expected in (
        ([row], "some GPU", [("float16", 0.25), ("float32", 3.0)]),
        ([again], "some GPU", [("float16", 3.0)]),
        ([row], "another", [("float32", 3.0)]),
    ):
        plans = tune.table_of(rows, {**about, "device": gpu}, 90, before)["plans"]
        assert [(plan["dtype"], plan["ms"][kept["variant"]]) for plan in plans] == expected


def test_without_a_gpu_it_says_so_in_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^torch .* finds no GPU on this machine, so nothing was tuned\.$"):
        tune.main([])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "build_info", lambda: {"cuda": None})
    with pytest.raises(SystemExit, match=r"^afa_ext was built without CUDA, so nothing was tuned; "):
        tune.main([])


ON_STAND_IN = """
import dataclasses, json, os, pathlib, sys
import torch
from tests.cuda import device
device.attach(pathlib.Path(os.environ["AFA_STAND_IN_BRIDGE"]))
from afa_ext import _native
import tune

class Bench:
    device, architecture = torch.device("cuda", 0), 90
    def time(self, candidates, seconds):
        names = list(candidates)
        return {name: float(len(names) - i) for i, name in enumerate(names)}  # the last is the fastest

def smaller(case):
    shrunk = tuple(max(1, n // 4) if n > 8 else n for n in case.sizes[0])
    return dataclasses.replace(case, sizes=[shrunk])

assert _native._C.build_info()["build_type"] == "test", "not the kernels on the stand-in"
tune.need_gpu = lambda: None
tune.Gpu = Bench
tune.CASES = {kernel: smaller(case) for kernel, case in tune.CASES.items()}
sys.exit(tune.main(["--dtype", "float32", "--dtype", "float16", *sys.argv[1:]]))
"""


@pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
def test_the_cuda_kernels_are_swept_on_the_stand_in(tmp_path):
    env = {**stand_in.environment(), "AFA_EXT_TUNING": "off"}
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], os.path.dirname(tune.__file__)])

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-c", ON_STAND_IN, "--out", str(tmp_path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)

    dry = run("--dry-run", "--kernel", next(iter(tune.CASES)))
    assert dry.returncode == 0, dry.stdout + dry.stderr
    assert list(tmp_path.iterdir()) == []
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WRONG" not in done.stdout
    table = json.loads((tmp_path / "sm_90.json").read_text())
    fastest = {entry["kernel"]: entry["variants"][-1] for entry in _native._C.launch_plans()}
    plans = {(plan["kernel"], plan["dtype"]): plan["variant"] for plan in table["plans"]}
    assert plans == {(kernel, dtype): fastest[kernel] for kernel in fastest for dtype in ("float32", "float16")}
