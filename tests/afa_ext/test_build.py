from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import afa_ext

PACKAGE = Path(afa_ext.__file__).parent
LIBRARY = Path(str(afa_ext._native._C.__file__))
ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd="/", check=False)


def test_build_info():
    info = afa_ext.build_info()
    assert set(info) == {
        "compiler",
        "build_type",
        "torch_headers",
        "cuda",
        "cuda_architectures",
        "simd_levels",
        "simd",
    }
    assert re.match(r"\w+ \d+\.\d+", info["compiler"])
    assert re.match(r"\d+\.\d+\.\d+", info["torch_headers"])
    assert info["simd_levels"][0] == "baseline"
    assert info["simd"] in info["simd_levels"]
    if info["cuda"] is None:
        assert info["cuda_architectures"] == ""
    else:
        assert re.match(r"\d+\.\d+", info["cuda"])
        assert re.search(r"\d\d", info["cuda_architectures"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where CUDA can't be used")
def test_cuda_kernels_are_built_wherever_nvcc_is_found():
    if os.environ.get("AFA_EXT_CUDA", "auto") in ("off", "0"):
        pytest.skip("AFA_EXT_CUDA turns them off")
    if shutil.which("nvcc") is None:
        assert afa_ext.build_info()["cuda"] is None
    else:
        assert afa_ext.build_info()["cuda"] is not None


def test_metadata():
    assert importlib.metadata.version("afa-ext") == afa_ext.__version__
    required = [r for r in importlib.metadata.requires("afa-ext") or [] if "extra ==" not in r]
    assert sorted(re.split(r"[<>=! ]", r)[0] for r in required) == ["numpy", "torch"]
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) is not installed")
def test_library_binds_to_no_particular_torch():
    dynamic = subprocess.run(["readelf", "-d", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    needed = set(re.findall(r"Shared library: \[(.*?)\]", dynamic))
    system = r"lib(stdc\+\+|m|gcc_s|c|pthread|dl|rt)\.so.*|ld-linux.*"
    torch_libraries = {name for name in needed if not re.fullmatch(system, name)}
    # libtorch.so loads libtorch_cuda.so if torch is a CUDA build.
    assert torch_libraries == {"libtorch.so", "libtorch_cpu.so", "libc10.so"}
    symbols = subprocess.run(["nm", "-DC", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    foreign = [line for line in symbols.splitlines() if re.search(r" U (at|c10|torch)::", line)]
    assert not foreign, "symbols outside torch's stable ABI"


@pytest.mark.skipif(torch.version.cuda is None, reason="a CPU build of torch has no CUDA streams")
@pytest.mark.slow
def test_library_finds_the_current_stream_of_a_cuda_build_of_torch():
    """The symbol is weak: unresolved, every CUDA call would fail with "this torch has no CUDA support"."""
    code = (
        "import ctypes, afa_ext; "
        "library = ctypes.CDLL(afa_ext._native._C.__file__); "
        "print(bool(library.aoti_torch_get_current_cuda_stream))"
    )
    assert run_python(code).stdout.strip() == "True"


ARCHITECTURES = ROOT / "csrc" / "cuda_architectures.cmake"
NVCC_13 = "75;80;86;87;88;89;90;100;103;110;120;121"
USUAL = "80-real;86-real;89-real;90-real;100;120"


@pytest.mark.parametrize(
    ("requested", "known", "visible", "expected", "message"),
    [
        ("", NVCC_13, "", USUAL, ""),
        ("", "75;80;86;87;89;90", "", "80-real;86-real;89-real;90", ""),
        ("", NVCC_13, "90;90", "90-real", ""),
        ("", NVCC_13, "75;86", "86-real", "capability 75 can't run the kernels"),
        ("", "75;80;86;87;89;90", "120", "90", ""),
        ("8.0;9.0a 12.0+PTX", NVCC_13, "86", "80-real;90a-real;120", ""),
        ("Ampere,Hopper", NVCC_13, "", "80-real;86;90", ""),
        ("7.0 7.5 8.6", NVCC_13, "", "86-real", "7.5 is ignored"),
        ("Volta", NVCC_13, "", USUAL, "7.0+PTX is ignored"),
    ],
)
def test_cuda_architectures(tmp_path, requested, known, visible, expected, message):
    returned, output = run_architectures(tmp_path, requested, known, visible)
    assert returned == 0, output
    assert f"result: {expected}\n" in output
    assert message in " ".join(output.split())


@pytest.mark.parametrize("requested", ["Amper", "80", "8.0+SASS"])
def test_invalid_cuda_architecture(tmp_path, requested):
    returned, output = run_architectures(tmp_path, requested, NVCC_13, "")
    assert returned != 0
    assert f"got '{requested}'" in " ".join(output.split())


def run_architectures(folder: Path, requested: str, known: str, visible: str) -> tuple[int, str]:
    script = folder / "script.cmake"
    script.write_text(
        f'include("{ARCHITECTURES}")\n'
        f'afa_cuda_architectures(result "{requested}" "{known}" "{visible}")\n'
        'message("result: ${result}")\n'
    )
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert cmake is not None, "cmake is a requirement of the build"
    result = subprocess.run([cmake, "-P", str(script)], capture_output=True, text=True, check=False)
    return result.returncode, result.stdout + result.stderr


def copy_package(folder: Path, library: bytes | None) -> Path:
    shutil.copytree(PACKAGE, folder / "afa_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if library is not None:
        (folder / "afa_ext" / LIBRARY.name).write_bytes(library)
    return folder


# The finder of an editable install precedes sys.path, so the copy must be the only place to search.
IMPORT_COPY = (
    "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]; "
    "sys.path.insert(0, {folder!r}); import afa_ext"
)


@pytest.mark.slow
def test_missing_library_is_its_own_error(tmp_path):
    result = run_python(IMPORT_COPY.format(folder=str(copy_package(tmp_path, None))))
    assert result.returncode != 0
    assert "ImportError: afa_ext's native library is missing" in result.stderr
    assert "pip install ." in result.stderr


@pytest.mark.slow
def test_broken_library_shows_the_original_error(tmp_path):
    result = run_python(IMPORT_COPY.format(folder=str(copy_package(tmp_path, b"not a library"))))
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "exists but can't be loaded" in last
    assert re.search(r"file too short|invalid ELF header", last)


COMPUTE = """
import sys, numpy, torch, afa_ext
folder, want = sys.argv[1] if len(sys.argv) > 1 else {golden!r}, {level!r}
assert afa_ext.build_info()["simd"] == want
def relative(a, b):
    return float((a - torch.from_numpy(b)).abs().max() / abs(b).max())
for name in ("par_same_size", "par_small", "par_flat"):
    g = numpy.load(f"{{folder}}/{{name}}.npz")
    masks = torch.from_numpy(g["masks"]).requires_grad_()
    out = afa_ext.par_refine(torch.from_numpy(g["images"]), masks, dilations=g["dilations"].tolist())
    (out * torch.from_numpy(g["grad_out"])).sum().backward()
    assert relative(out.detach(), g["out"]) < 1e-4
    assert relative(masks.grad, g["grad_masks"]) < 1e-4
for name in ("walk_square", "walk_train"):
    g = numpy.load(f"{{folder}}/{{name}}.npz")
    cams = torch.from_numpy(g["cams"])
    out = afa_ext.random_walk(cams, torch.from_numpy(g["affinity"]), grid=cams.shape[2:], radius=int(g["radius"]))
    assert relative(out, g["plain_windowed"]) < 1e-4
g = numpy.load(f"{{folder}}/affinity.npz")
leaves = [torch.from_numpy(g[name]).requires_grad_() for name in ("attn", "weight", "bias")]
labels = afa_ext.affinity_labels(torch.from_numpy(g["label_map"]), radius=int(g["radius"]))
afa_ext.affinity_loss(afa_ext.affinity_from_attention(*leaves), labels).backward()
for leaf, name in zip(leaves, ("grad_attn", "grad_weight", "grad_bias"), strict=True):
    assert relative(leaf.grad, g[name]) < 1e-4
print("computed")
"""


@pytest.mark.parametrize("level", afa_ext.build_info()["simd_levels"])
@pytest.mark.slow
def test_every_simd_level_computes_the_golden_cases(level):
    result = run_python(COMPUTE.format(golden=str(GOLDEN), level=level), AFA_EXT_SIMD=level)
    if "this processor lacks these instructions" in result.stderr:
        pytest.skip(f"this processor has no {level}")
    assert result.stdout.strip() == "computed", result.stderr


@pytest.mark.slow
def test_unknown_simd_level_is_refused():
    code = "import afa_ext; afa_ext.build_info()"
    result = run_python(code, AFA_EXT_SIMD="mmx")
    assert "AFA_EXT_SIMD must be baseline, avx2 or avx512, got 'mmx'" in result.stderr


@pytest.mark.skipif(afa_ext.build_info()["cuda"] is not None, reason="this build has CUDA kernels")
@pytest.mark.cuda
def test_cpu_build_rejects_gpu_tensors():
    with pytest.raises(RuntimeError, match="built without CUDA"):
        afa_ext.par_affinity(torch.rand(1, 3, 8, 8, device="cuda"))
