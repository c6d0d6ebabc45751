"""tools/: the parsers of compiler output, and the parts of the GPU tools that need neither a compiler nor a GPU."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timing import Limits, limits

from afa.data import TaggedDataset
from tools import blocks, cutout_tree, gpu_check, kernel_report
from tools.kernel_report import GPUS, TARGETS, Instructions, Kernel, Usage, estimate

ROOT = Path(__file__).resolve().parents[2]

# As nvcc 13.0 prints it: a kernel that spills, one that calls a function with its own stack, and a valid one.
PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5spillv' for 'sm_80'
ptxas info    : Function properties for _Z5spillv
    24 bytes stack frame, 48 bytes spill stores, 72 bytes spill loads
ptxas info    : Used 56 registers, used 0 barriers, 24 bytes cumulative stack size, 3032 bytes cmem[0]
ptxas info    : Compile time = 1177.670 ms
ptxas info    : Compiling entry function '_Z5callsv' for 'sm_80'
ptxas info    : Function properties for _Z5callsv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 75 registers, used 0 barriers, 32 bytes cumulative stack size, 2544 bytes cmem[0]
ptxas info    : Compile time = 206.1 ms
ptxas info    : Function properties for __internal_accurate_pow
    16 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Compiling entry function '_Z5cleanv' for 'sm_80'
ptxas info    : Function properties for _Z5cleanv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 4224 bytes smem, 480 bytes cmem[0]
"""

PTX = """\
.visible .entry _Z5cleanv(
	.param .align 8 .b8 _Z5cleanv_param_0[2224]
)
.maxntid 128
.minnctapersm 8
{
.weak .entry _Z5spillv(
	.param .u64 _Z5spillv_param_0
)
.maxntid 32, 8, 1
{
"""

# Shortened from cuobjdump -sass: an outer loop around one of two loads, a store and four multiply-adds.
SASS = """\

	code for sm_90
		Function : _Z5cleanv
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x00000a00ff017b82 */
                                                                             /* 0x000fe20000000800 */
        /*0010*/              @!P5 LDG.E.U8 R10, desc[UR12][R6.64] ;         /* 0x0000000c060a5981 */
        /*0020*/                   LDG.E.64 R48, desc[UR12][R48.64] ;        /* 0x0000000c30301981 */
        /*0030*/                   LDG.E.128.CONSTANT R4, desc[UR12][R2.64+0x10] ;
        /*0040*/               @P0 FFMA R9, R41, R40, R9 ;
        /*0050*/                   FFMA R8, R41.reuse, R34, R8 ;
        /*0060*/               @P5 BRA 0x40 ;
        /*0068*/                   STG.E desc[UR12][R2.64], R8 ;
        /*0070*/               @P6 BRA 0x20 ;
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0090*/              @!P4 BRA 0x10 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0;
        /*00c0*/                   NOP;
		Function : _Z5spillv
        /*0000*/                   STL.64 [R1], R2 ;
        /*0010*/                   LDL.LU.64 R2, [R1] ;
        /*0020*/                   DFMA R2, R2, R4, R6 ;
        /*0030*/                   STG.E.64 desc[UR4][R8.64], R2 ;
        /*0040*/                   EXIT ;
"""


def kernel(usage: Usage, instructions: Instructions | None = None) -> Kernel:
    return Kernel("par/par_cuda.cu", "some_kernel<float>", "90", 128, usage, instructions)


def test_usage_is_read():
    assert kernel_report.parse_usage(PTXAS) == {
        "_Z5spillv": Usage(56, 24, 48, 72, 0),
        "_Z5callsv": Usage(75, 32, 0, 0, 0),
        "_Z5cleanv": Usage(64, 0, 0, 0, 4224),
    }


def test_threads_are_read():
    assert kernel_report.parse_threads(PTX) == {"_Z5cleanv": 128, "_Z5spillv": 256}


def test_instructions_are_counted():
    counts = kernel_report.parse_instructions(SASS)
    assert counts["_Z5cleanv"] == Instructions(
        total=14,
        fma=2,
        loads=3,
        wide_64=1,
        wide_128=1,
        stores=1,
        barriers=1,
        local=0,
        loop_total=7,  # only the inner loop, neither the outer loop nor the loop without an access
        loop_accesses=3,
    )
    assert counts["_Z5cleanv"].for_an_access() == pytest.approx(7 / 3)
    assert counts["_Z5spillv"].local == 2
    assert counts["_Z5spillv"].for_an_access() == 5  # no loop: of the whole kernel


def test_faults_are_found():
    usage, counts = kernel_report.parse_usage(PTXAS), kernel_report.parse_instructions(SASS)
    assert kernel_report.faults([kernel(usage["_Z5cleanv"], counts["_Z5cleanv"])]) == []
    (line,) = kernel_report.faults([kernel(usage["_Z5spillv"])])
    assert "some_kernel<float> on sm_90 (par/par_cuda.cu): 24 bytes of stack, 48" in line
    (line,) = kernel_report.faults([kernel(usage["_Z5callsv"])])
    assert "32 bytes of stack, 0 of spill stores" in line
    (line,) = kernel_report.faults([kernel(usage["_Z5cleanv"], counts["_Z5spillv"])])
    assert "2 local loads and stores" in line


def test_broken_claims_are_found():
    usage, counts = kernel_report.parse_usage(PTXAS), kernel_report.parse_instructions(SASS)
    kernels = [kernel(usage["_Z5cleanv"], counts["_Z5cleanv"]), kernel(usage["_Z5cleanv"])]
    wide = kernel_report.Claim(r"some_kernel<\w+>", loads_128=1)
    assert kernel_report.broken_claims(kernels, [wide]) == []
    (line,) = kernel_report.broken_claims(kernels, [kernel_report.Claim(wide.kernels, loads_128=2)])
    assert line.startswith("some_kernel<float> on sm_90 (par/par_cuda.cu): 1 loads, 0 stores and 0 copies of 128 bits")
    (line,) = kernel_report.broken_claims(kernels, [kernel_report.Claim(wide.kernels, stores_128=1)])
    assert "expected at least 0, 1 and 0" in line
    (line,) = kernel_report.broken_claims(kernels, [kernel_report.Claim(wide.kernels, copies_128=1)])
    assert "expected at least 0, 0 and 1" in line
    (line,) = kernel_report.broken_claims(kernels, [kernel_report.Claim("other_kernel", loads_128=1)])
    assert "no kernel matches other_kernel" in line


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "expected"),
    [
        ("90", 128, 32, 0, 1.0),  # 16 blocks of 4 warps
        ("90", 128, 64, 0, 0.5),  # by registers: 8 warps a partition
        ("90", 128, 65, 0, 28 / 64),  # rounded up to 72 a thread: 7 warps a partition
        ("80", 256, 80, 4224, 24 / 64),  # 6 warps a partition, 3 blocks of 8
        ("90", 256, 32, 100 << 10, 16 / 64),  # by shared memory: 2 blocks, each with 1 KiB of the system's
        ("80", 32, 16, 0, 32 / 64),  # by the number of blocks
        ("121", 256, 40, 0, 1.0),  # 48 warps
    ],
)
def test_occupancy(architecture, threads, registers, shared, expected):
    assert kernel_report.occupancy(architecture, threads, registers, shared) == expected


def test_occupancy_of_an_unknown_architecture():
    assert kernel_report.occupancy("999", 128, 32, 0) is None


def test_flags_are_those_of_the_build():
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    options = " ".join(re.findall(r"target_compile_options\(afa_cuda PRIVATE ([^)]*)\)", text)).split()
    assert options and set(options) <= set(kernel_report.FLAGS)
    assert f"-std=c++{re.findall(r'CUDA_STANDARD ([0-9]+)', text)[0]}" in kernel_report.FLAGS


def test_every_kernel_has_its_formulas():
    names = set()
    for source in (ROOT / "csrc").rglob("*.cu"):
        text = source.read_text(encoding="utf-8")
        names |= set(re.findall(r"__global__ void\s+__launch_bounds__\(.*?\)\s+(\w+)\(", text, re.DOTALL))
        assert text.count("__global__") == len(re.findall(r"__global__ void\s+__launch_bounds__", text))
    # Those that add up a launch's few partial sums are not worth a formula.
    assert names - {"add_partials_kernel", "add_losses_kernel"} == {w.partition(",")[0] for w in kernel_report.WORK}


def test_formulas_are_readable():
    assert kernel_report.readable("5*B*N*K*ceil(C/4)") == "5·B·N·K·⌈C/4⌉"
    assert kernel_report.readable("B*ceil(N/32)*(ceil(N/32)+1)/2") == "B·⌈N/32⌉·(⌈N/32⌉+1)/2"
    assert kernel_report.readable("B*ceil(N/32)**2") == "B·⌈N/32⌉²"


def test_path_points():
    # By hand, radius 2: the node alone; four steps of one, their two ends; four diagonals, all four corners of the box.
    assert kernel_report.path_points(2) == pytest.approx((1 + 4 * 2 + 4 * 4) / 9)


def test_estimate():
    gpu = kernel_report.Gpu("one", bandwidth=1e12, operations=1e13, multiprocessors=100, clock=1e9)
    sizes = {"B": 1, "C": 4, "N": 12800, "K": 10, "s": 4}
    stage = kernel_report.Stage("stencil_kernel", "f", 2)
    # 100 blocks, so that every SM has one. A launch: 921,600 bytes, 1,024,000 operations, 256,000 accesses.
    e = kernel_report.estimate(kernel_report.Target("", sizes, [stage]), gpu, {"f": 10})
    assert e.by_bytes == pytest.approx(2 * 0.9216e-6)
    assert e.by_operations == pytest.approx(2 * 0.1024e-6)
    assert e.predicted == pytest.approx(2 * (3e-6 + 0.9216e-6))
    assert e.why == "launches"
    e = kernel_report.estimate(kernel_report.Target("", sizes, [stage]), gpu, {"f": 200})
    assert e.predicted == pytest.approx(2 * (3e-6 + 2.56e5 * 200 / (100 * 128 * 1e9)))
    assert e.why == "instructions"
    # Half the blocks leave half the SMs idle: half the accesses take as long.
    half = kernel_report.Target("", {**sizes, "N": 6400}, [stage])
    assert kernel_report.estimate(half, gpu, {"f": 200}).predicted == pytest.approx(e.predicted)
    # One cooperative launch, whose blocks meet once.
    stage = kernel_report.Stage("stencil_kernel", "f", 2, resident=True)
    meeting = kernel_report.estimate(kernel_report.Target("", sizes, [stage]), gpu, {"f": 200})
    assert meeting.predicted == pytest.approx(e.predicted - 1.5e-6)


def test_estimate_of_blocks_that_fill_an_sm():
    gpu = kernel_report.Gpu("one", bandwidth=1e15, operations=1e16, multiprocessors=100, clock=1e9)
    stages = [kernel_report.Stage("ring_kernel", "f")]
    # A thousand pixels a block: 150 blocks take two rounds of the 100 SMs, as 200 do, and the weights come first.
    times = []
    for count in (150, 200):
        sizes = {"B": 1, "C": 4, "N": 1024 * count, "K": 48, "s": 4}
        predicted = kernel_report.estimate(kernel_report.Target("", sizes, stages), gpu, {"f": 5}).predicted
        times.append(predicted - 3e-6 - sizes["N"] * 48 * 4 / 1e15)
    assert times[0] == pytest.approx(times[1])
    assert times[0] == pytest.approx(1024 * 200 * (160 * 4 + 270) / (100 * 128 * 1e9))


def test_blocks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("head\n<!-- one: written by tools/t.py -->\n<!-- end of one -->\ntail\n")
    assert blocks.block_of(page, "t.py", "one") == ""
    assert blocks.stale_blocks(page, "t.py", {"one": "a\\1\nb"}) == ["one"]
    blocks.write_blocks(page, "t.py", {"one": "a\\1\nb"})
    expected = "head\n<!-- one: written by tools/t.py -->\na\\1\nb\n<!-- end of one -->\ntail\n"
    assert page.read_text() == expected
    assert blocks.block_of(page, "t.py", "one") == "a\\1\nb"
    assert blocks.stale_blocks(page, "t.py", {"one": "a\\1\nb"}) == []
    with pytest.raises(SystemExit, match=r"page\.md has no block between '<!-- two: written by tools/t\.py -->'"):
        blocks.write_blocks(page, "t.py", {"two": ""})
    assert page.read_text() == expected


def test_gpu_check_fits_its_time():
    assert sum(stage.limit for stage in gpu_check.STAGES) < 8 * 60


def test_gpu_check_lists_its_stages(capsys):
    assert gpu_check.main(["--list", "--skip", "build", "--skip", "memcheck"]) == 0
    listed = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [s.name for s in gpu_check.STAGES if s.name not in ("build", "memcheck")]
    assert gpu_check.main(["--list", "--only", "tests"]) == 0
    assert capsys.readouterr().out == "tests: at most 150 s\n"
    assert gpu_check.main(["--list", "--only", "par_kernel", "--compile"]) == 0
    assert capsys.readouterr().out == "par_kernel: at most 400 s\n"


def test_gpu_check_rejects_an_unknown_stage(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err


def test_gpu_check_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "run_stage", lambda *_: pytest.fail("a stage was run"))
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main([])
    # A text as the exit's code is printed, and the status is 1.
    assert stopped.value.code == f"torch {torch.__version__} finds no GPU on this machine, so nothing was run."


@pytest.mark.parametrize(
    ("code", "limit", "result", "failed"),
    [
        ("pass", 60, "passed", False),
        ("import sys; sys.exit(3)", 60, "failed with status 3", True),
        ("import time; time.sleep(60)", 0.5, "stopped at its limit of 0 s", True),
    ],
)
def test_gpu_check_runs_a_stage(code, limit, result, failed):
    begin = time.monotonic()
    outcome = gpu_check.run_stage(gpu_check.Stage("one", [sys.executable, "-S", "-c", code], limit), {})
    assert (outcome.result, outcome.failed) == (result, failed)
    assert time.monotonic() - begin < 30


def test_gpu_check_skips_stages_that_need_a_missing_program(tmp_path):
    stage = gpu_check.Stage("one", ["nothing"], 60, "compute-sanitizer")
    outcome = gpu_check.run_stage(stage, {"PATH": str(tmp_path)})
    assert outcome.result == "skipped: compute-sanitizer is not on PATH"
    assert not outcome.failed
    assert gpu_check.run_stage(gpu_check.Stage("one", [str(tmp_path / "absent")], 60), {}).failed


def test_gpu_check_runs_every_stage_and_fails_if_one_did(monkeypatch, capsys, tmp_path):
    stages = [
        gpu_check.Stage(name, [sys.executable, "-S", "-c", f"raise SystemExit({status})"], 60)
        for name, status in [("first", 1), ("second", 0)]
    ]
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_check, "gpu", lambda: ("some GPU", "9.0"))
    assert gpu_check.main([]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^first +[\d.]+ s  failed with status 1$", out, re.MULTILINE)
    assert re.search(r"^second +[\d.]+ s  passed$", out, re.MULTILINE)
    assert gpu_check.main(["--only", "second"]) == 0


def benchmark_row(**changed):
    """A row as the benchmarks write it."""
    given = {"candidate": "ours", "size": "1x2", "dtype": "float32", "median_ms": 0.25, "times_ours": 1.0}
    return {**given, "share_of_limit": 0.5, **changed}


def write_benchmark(folder, name, *rows, device="NVIDIA H200"):
    file = folder / f"{name}-nvidia-h200.json"
    machine = {"device": device, "torch": "2.10", "cuda": "13"}
    file.write_text(json.dumps({"benchmark": name, "machine": machine, "rows": rows}))
    return file


PAR_ROWS = [
    benchmark_row(candidate="afa_ext.par_refine", size="8x21x320x320", median_ms=1.5),
    benchmark_row(candidate="plain PyTorch", size="8x21x320x320", median_ms=60.0, times_ours=40.0, share_of_limit=0.01),
    benchmark_row(candidate="its affinity", size="8x21x320x320", median_ms=0.125, times_ours=None, share_of_limit=None),
]


def test_gpu_check_sums_up_the_benchmarks(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "prediction", lambda name, device: 3.0)
    rows = gpu_check.collected([write_benchmark(tmp_path, "par_kernel", *PAR_ROWS)])
    lines = gpu_check.summary([gpu_check.Outcome("tests", "passed", 2.5, False)], rows).splitlines()
    assert lines[:8] == [
        "tests     2.5 s  passed",
        "par_kernel:",
        "  afa_ext.par_refine, 8x21x320x320 float32: 1.500 ms, 1.0 times ours, 50% of the limit, "
        "predicted 3.000 ms, 0.50 times that",
        "  plain PyTorch, 8x21x320x320 float32: 60.000 ms, 40.0 times ours, 1% of the limit",
        "  its affinity, 8x21x320x320 float32: 0.125 ms",
        "targets for an H200:",
        "  par_kernel 8x21x320x320, afa_ext.par_refine: median_ms at most 2: met, 1.5",
        "  par_kernel 8x21x320x320, plain PyTorch: times_ours at least 50: MISSED, 40",
    ]
    assert len(lines) == 6 + len(gpu_check.TARGETS)
    assert all(line.endswith(": not measured") for line in lines[8:])
    assert gpu_check.summary([], []) == ""


def test_gpu_check_knows_its_targets_and_predictions():
    targets = {target.name for target in TARGETS}
    assert set(gpu_check.PREDICTED.values()) <= targets
    benchmarks = {stage.name: stage.command for stage in gpu_check.STAGES}
    for benchmark, size, _ in [*gpu_check.PREDICTED, *((t.benchmark, t.size, "") for t in gpu_check.TARGETS)]:
        assert benchmark == "random_walk" or size in benchmarks[benchmark], "a row that no stage measures"
    for name in gpu_check.PREDICTED.values():
        assert gpu_check.prediction(name, "an unknown GPU") is None
    (name,) = {target.name for target in TARGETS if target.name.startswith("PAR 8×21")}
    counts = dict.fromkeys((stage.code for target in TARGETS for stage in target.stages), 10.0)
    (target,) = (target for target in TARGETS if target.name == name)
    expected = estimate(target, next(gpu for gpu in GPUS if gpu.name == "H200"), counts).predicted * 1e3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check.kernel_report, "recorded_for_an_access", lambda page: counts)
        assert gpu_check.prediction(name, "NVIDIA H200") == pytest.approx(expected)
        patch.setattr(gpu_check.kernel_report, "recorded_for_an_access", lambda page: {})
        assert gpu_check.prediction(name, "NVIDIA H200") is None


def test_gpu_check_writes_one_report(tmp_path, monkeypatch, capsys):
    write_benchmark(tmp_path, "affinity", benchmark_row())
    os.utime(tmp_path / "affinity-nvidia-h200.json", (0, 0))  # of an earlier run
    code = (
        f"import pathlib; pathlib.Path({str(tmp_path / 'par_kernel-nvidia-h200.json')!r}).write_text("
        f"{write_benchmark(tmp_path, 'par_kernel', *PAR_ROWS).read_text()!r})"
    )
    os.utime(tmp_path / "par_kernel-nvidia-h200.json", (0, 0))
    stages = [
        gpu_check.Stage("par_kernel", [sys.executable, "-S", "-c", code], 60),
        gpu_check.Stage("affinity", [sys.executable, "-S", "-c", "pass"], 60),
    ]
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    monkeypatch.setattr(gpu_check, "BENCHMARKS", ["par_kernel", "affinity"])
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_check, "gpu", lambda: ("NVIDIA H200", "9.0"))
    assert gpu_check.main([]) == 0
    report = json.loads((tmp_path / "nvidia-h200.json").read_text())
    assert report["machine"]["device"] == "NVIDIA H200"
    assert [stage["stage"] for stage in report["stages"]] == ["par_kernel", "affinity"]
    assert [row["candidate"] for row in report["rows"]] == [row["candidate"] for row in PAR_ROWS]
    assert {row["benchmark"] for row in report["rows"]} == {"par_kernel"}
    assert [target["met"] for target in report["targets"]][:3] == [True, False, None]
    assert f"written to {tmp_path / 'nvidia-h200.json'}" in capsys.readouterr().out


def test_gpu_check_tunes_between_tests_and_benchmarks_on_request(capsys):
    assert gpu_check.main(["--list", "--tune"]) == 0
    listed = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert listed.index("racecheck") + 1 == listed.index("tune") == listed.index("par_kernel") - 1
    assert gpu_check.main(["--list", "--tune", "--only", "affinity"]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["tune", "affinity"]


def test_limits_of_a_device():
    best = limits(torch.device("cpu"), values=1 << 16, side=64)
    assert best.bytes_per_s > 0 and best.multiply_adds_per_s > 0
    assert torch.get_float32_matmul_precision() == "highest"
    best = Limits(2e9, 1e12)
    assert best.milliseconds(4e6) == pytest.approx(2.0)
    assert best.milliseconds(4e6, 5e9) == pytest.approx(5.0)


def test_cutout_tree_keeps_the_splits_apart(tmp_path):
    """Masks are the objects' alpha, tags are what is to be seen, and validation shows no object of training."""
    rng = np.random.default_rng(0)
    for kind, color in (("red", 0), ("blue", 2)):
        (tmp_path / kind / "more").mkdir(parents=True)
        for number in range(4):
            pixels = np.zeros((40, 50, 4), np.uint8)
            pixels[8:32, 10:40, color] = 200 + 10 * number  # only the fourth has a value of 230
            pixels[8:32, 10:40, 3] = 255
            Image.fromarray(pixels).save(tmp_path / kind / "more" / f"{number}.png")
    (tmp_path / "scenes").mkdir()
    for number in range(4):
        Image.fromarray(rng.integers(90, 110, (200, 300, 3), np.uint8)).save(tmp_path / "scenes" / f"{number}.jpg")
    out = tmp_path / "tree"
    command = [str(out), "--objects", f"red={tmp_path / 'red'}", "--objects", f"blue={tmp_path / 'blue'}"]
    cutout_tree.main([*command, "--backgrounds", str(tmp_path / "scenes"), "--train", "8", "--val", "6"])

    splits = {"train": TaggedDataset(out, "train", train=False, with_mask=False)}
    splits["val"] = TaggedDataset(out, "val", train=False, with_mask=True)
    assert [len(data) for data in splits.values()] == [8, 6] and splits["val"].classes == ["red", "blue"]
    for name, data in splits.items():
        for sample in (data[index] for index in range(len(data))):
            image = sample["image"].float()
            seen = [bool((image[2 * kind] > 170).sum() > 0.004 * image[0].numel()) for kind in range(2)]
            assert seen == [bool(tag) for tag in sample["tags"]], "tags are the classes that can be seen"
            if name == "val":
                mask = sample["mask"]
                assert set(mask.unique().tolist()) <= {0, 1, 2}
                for number in range(2):
                    inside = image[2 * number][mask == number + 1]
                    assert inside.numel() == 0 or float(inside.median()) == pytest.approx(230, abs=4)
                    assert float(image[2 * number][mask == 0].median()) < 120
            else:
                for number in range(2):
                    object_pixels = image[2 * number][image[2 * number] > 170]
                    assert object_pixels.numel() == 0 or float(object_pixels.median()) < 227
    with pytest.raises(SystemExit):
        cutout_tree.main([*command, "--backgrounds", str(tmp_path / "scenes")])
