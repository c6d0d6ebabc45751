"""Checks that the library built here works with an older torch than the one it was built with.

    python tools/abi_check.py                        # create an environment with torch 2.13.0 in build/, then check
    python tools/abi_check.py --torch 2.10.0         # another version
    python tools/abi_check.py --python /path/to/python   # an existing environment (with torch and numpy)
    python tools/abi_check.py --wheel dist/X.whl     # the library in a wheel, in place of the one in afa_ext/
    python tools/abi_check.py --library X.so         # another library, such as the one of tools/arm_check.py

The package is copied with its library or installed from the wheel, without a rebuild and without a compiler. The other
interpreter computes the recorded cases of tests/golden once for each SIMD level of the processor. It must have the same
Python version.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

CHECK = r"""
import sys
from pathlib import Path

import numpy
import torch

import afa_ext

folder, built_with = Path(sys.argv[1]), afa_ext.build_info()["torch_headers"]
assert Path(afa_ext.__file__).is_relative_to(sys.argv[2]), f"another afa_ext was imported: {afa_ext.__file__}"


def close(name, actual, expected):
    error = float((actual.detach() - expected).abs().max() / expected.abs().max())
    assert error <= 1e-4, f"{name}: relative error {error:.3g}"
    return error


worst = 0.0
cases = 0
for path in sorted(folder.glob("*.npz")):
    g = {k: v.item() if v.ndim == 0 else torch.from_numpy(v) for k, v in numpy.load(path).items()}
    if path.stem.startswith("par_"):
        masks = g["masks"].requires_grad_()
        out = afa_ext.par_refine(g["images"], masks, dilations=g["dilations"].tolist(), num_iter=g["num_iter"])
        (out * g["grad_out"]).sum().backward()
        errors = close(path.stem, out, g["out"]), close(path.stem, masks.grad, g["grad_masks"])
    elif path.stem.startswith("walk_"):
        cams, grid, radius = g["cams"], tuple(g["cams"].shape[2:]), g["radius"]
        walked = afa_ext.random_walk(cams, g["affinity"], grid=grid, radius=radius)
        labeled = afa_ext.propagate_cams(
            cams, g["affinity"], g["cls_labels"], radius=radius, background=g["bkg_score"]
        )
        errors = close(path.stem, walked, g["plain_windowed"]), close(path.stem, labeled, g["with_bkg"])
    elif path.stem == "affinity":
        leaves = [g[name].requires_grad_() for name in ("attn", "weight", "bias")]
        affinity = afa_ext.affinity_from_attention(*leaves)
        afa_ext.affinity_loss(affinity, afa_ext.affinity_labels(g["label_map"], radius=g["radius"])).backward()
        errors = close(path.stem, affinity, g["affinity"]), close(path.stem, leaves[0].grad, g["grad_attn"])
    else:
        continue
    worst, cases = max(worst, *errors), cases + 1
assert cases, f"no recorded case in {folder}"
try:
    torch.ops.afa_ext.par_affinity(torch.rand(3, 8, 8), [1], 0.3, 0.01)
except RuntimeError as error:
    assert "images must have shape" in str(error), error
else:
    raise AssertionError("a wrong shape was accepted")
print(f"built with torch {built_with}, running under torch {torch.__version__}, {afa_ext.build_info()['simd']}: "
      f"{cases} recorded cases, largest relative error {worst:.1e}")
"""


def make_environment(version: str, pip_arguments: list[str]) -> Path:
    """A virtual environment in build/ with this torch and numpy, kept for the next run."""
    folder = ROOT / "build" / f"abi-torch-{version}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"creating {folder.relative_to(ROOT)} with torch {version} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q", *pip_arguments]
        subprocess.run([*install, f"torch=={version}", "numpy"], check=True)
        (folder / "ready").touch()
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--torch", default="2.13.0", help="version to check under, at least 2.10")
    parser.add_argument("--python", type=Path, help="interpreter of an existing environment")
    parser.add_argument("--pip-args", default="", help="additional arguments for pip, such as an index of CPU builds")
    package = parser.add_mutually_exclusive_group()
    package.add_argument("--wheel", type=Path, help="wheel to check")
    package.add_argument("--library", type=Path, help="library to check, in place of the one in afa_ext/")
    options = parser.parse_args()

    libraries = [options.library] if options.library else sorted((ROOT / "afa_ext").glob("_C.*.so"))
    if options.wheel is None and not libraries:
        sys.exit("afa_ext/_C*.so does not exist; build it first with `pip install -e .`")
    python = (
        options.python.absolute() if options.python else make_environment(options.torch, shlex.split(options.pip_args))
    )
    with tempfile.TemporaryDirectory() as folder:
        if options.wheel is None:
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / "afa_ext", Path(folder) / "afa_ext", ignore=ignored)
            for library in libraries:
                shutil.copy(library, Path(folder) / "afa_ext")
        else:
            options_of_pip = ["-q", "--no-deps", "--only-binary=:all:", "--target", folder]
            install = [str(python), "-m", "pip", "install", *options_of_pip, str(options.wheel.resolve())]
            subprocess.run(install, check=True, env={**os.environ, "PATH": ""})
        command = [str(python), "-c", CHECK, str(ROOT / "tests" / "golden"), str(Path(folder).resolve())]
        for level in ("baseline", "avx2", "avx512"):
            env = {**os.environ, "PYTHONPATH": folder, "AFA_EXT_SIMD": level}
            result = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
            if result.returncode == 0:
                print(result.stdout.strip(), flush=True)
            elif "this processor lacks" in result.stderr or "this build does not contain" in result.stderr:
                print(f"{level}: not available on this machine")
            else:
                sys.exit(f"the library does not work under {python}:\n{result.stderr.strip()}")
    print("abi-check passed")


if __name__ == "__main__":
    main()
