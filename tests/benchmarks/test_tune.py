"""The sweep of variants without a GPU: its logic with fake kernels, and the full sweep on the stand-in GPU."""

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

from afa_ext import _native
from tests.cuda import build
from tests.cuda import run as stand_in

CPU = torch.device("cpu")


class FakeLibrary:
    """One kernel that adds 1, with some incorrect variants."""

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
        self.count = 0

    def kernel(self, x: Tensor) -> Tensor:
        self.count += 1
        if self.variant == "fails":
            raise RuntimeError("the CUDA kernel could not be launched: too many resources\nmore")
        return self.VARIANTS[self.variant or "slow"](x)

    def kernel_variants(self) -> list[dict[str, Any]]:
        names = [*self.VARIANTS, "fails"]
        return [{"kernel": "add", "variants": names, "times_picked": self.count, "last_picked": "slow"}]

    def force_variant(self, kernel: str, variant: str | None) -> None:
        self.variant = variant


class FakeBench:
    """A clock that reports the times in `times`, and 1 ms for all other candidates."""

    device = CPU

    def __init__(self, times: Mapping[str, float]) -> None:
        self.times = times
        self.timed: list[list[str]] = []

    def time(self, candidates: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
        for run in candidates.values():
            run()
        self.timed.append(sorted(candidates))
        return {name: self.times.get(name, 1.0) for name in candidates}


FASTER_IF_WRONG = {"wrong": 0.1, "nan": 0.1, "unsteady": 0.1, "short": 0.1, "fails": 0.1, "fast": 0.5}


def run_sweep(library: FakeLibrary, **changed: Any) -> tuple[list[tune.Row], FakeBench]:
    case = tune.Case(
        [(2, 5), (3, 50)], lambda size, device: [torch.rand(*size, device=device)], library.kernel, lambda x: x + 1
    )
    bench = FakeBench(FASTER_IF_WRONG)
    reported: list[tune.Row] = []
    cases = {"add": dataclasses.replace(case, **changed)}
    rows = tune.sweep(cases, ["float32"], bench, library, 0.1, reported.append)
    assert reported == rows
    return rows, bench


def test_a_wrong_variant_is_reported_and_not_timed():
    rows, bench = run_sweep(FakeLibrary())
    assert [(row.size, row.fastest, row.by_rule) for row in rows] == [
        ((2, 5), "fast", "slow"),
        ((3, 50), "fast", "slow"),
    ]
    assert bench.timed == [["fast", "slow"]] * 2
    for row in rows:
        assert row.milliseconds == {"slow": 1.0, "fast": 0.5}
        assert set(row.wrong) == {"wrong", "nan", "unsteady", "short", "fails"}
        assert row.wrong["wrong"].startswith("relative error 0.0")
        assert row.wrong["nan"] == "non-finite values"
        assert row.wrong["unsteady"] == "two runs gave different results"
        assert row.wrong["short"].startswith("shape [")
        assert row.wrong["fails"] == "the CUDA kernel could not be launched: too many resources"
    assert (
        tune.summary(rows) == "2 sizes; the rule's variant is the fastest in 0; slowest choice: 2.00 times the fastest"
    )


def test_without_a_right_variant_nothing_is_timed(capsys):
    rows, bench = run_sweep(FakeLibrary(), reference=lambda x: x + 2)
    assert [row.fastest for row in rows] == [None, None]
    assert bench.timed == []
    tune.print_row(rows[0])
    assert "WRONG: relative error" in capsys.readouterr().out
    assert tune.summary(rows) == "2 sizes; the rule's variant is the fastest in 0"


def test_a_case_that_never_launches_its_kernel_is_refused():
    with pytest.raises(SystemExit, match=r"the case for add in benchmarks/tune\.py does not launch it"):
        run_sweep(FakeLibrary(), run=lambda x: x + 1)


def test_a_row_is_shown(capsys):
    times = {"slow": 1.0, "fast": 0.5}
    tune.print_row(tune.Row("add", "float32", (2, 5), "slow", times, {"bad": "two runs gave different results"}))
    title, _, *lines = capsys.readouterr().out.strip().splitlines()
    assert title == "add, 2x5 float32"
    assert [line.split() for line in lines] == [
        ["fast", "0.5000"],
        ["slow", "1.0000", "by", "the", "rule"],
        ["bad", "WRONG:", "two", "runs", "gave", "different", "results"],
    ]


def test_every_kernel_with_variants_has_a_case():
    assert set(tune.CASES) == {entry["kernel"] for entry in _native._C.kernel_variants()}


def test_without_a_gpu_it_exits_with_a_message(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^torch .* finds no GPU on this machine, so nothing was timed\.$"):
        tune.main([])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "build_info", lambda: {"cuda": None})
    with pytest.raises(SystemExit, match=r"^afa_ext was built without CUDA, so nothing was timed; "):
        tune.main([])


ON_STAND_IN = """
import dataclasses, json, os, pathlib, sys
import torch
from tests.cuda import device
device.attach(pathlib.Path(os.environ["AFA_STAND_IN_BRIDGE"]))
from afa_ext import _native
import tune

class Bench:
    device = torch.device("cuda", 0)
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
    env = stand_in.environment()
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], os.path.dirname(tune.__file__)])
    command = [sys.executable, "-P", "-c", ON_STAND_IN, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WRONG" not in done.stdout
    (file,) = tmp_path.iterdir()
    rows = json.loads(file.read_text())["rows"]
    variants = {entry["kernel"]: entry["variants"] for entry in _native._C.kernel_variants()}
    assert {(row["kernel"], row["dtype"]) for row in rows} == {(k, d) for k in variants for d in ("float32", "float16")}
    for row in rows:
        assert list(row["milliseconds"]) == variants[row["kernel"]]
        assert row["by_rule"] in variants[row["kernel"]]
