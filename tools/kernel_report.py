"""Reports the cost of the CUDA kernels without a GPU: the tables of docs/kernels.md, from compiler output and formulas.

    python -m tools.kernel_report              # compile, check, write the tables of docs/kernels.md
    python -m tools.kernel_report --check      # compile and check; fail if docs/kernels.md is out of date
    python -m tools.kernel_report --formulas   # only the tables that need no compiler; also with --check

Every csrc/**/*.cu is compiled for sm_80, sm_90 and the newest target that nvcc knows. A kernel must not spill, use the
stack or any local memory. Registers depend on nvcc's version, so the tables are compared only if they were generated
with the same version. Instructions are counted with cuobjdump (CUDA toolkit, or the copy in the Python package triton).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tools.blocks import block_of, stale_blocks, write_blocks

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TOOL, PAGE = "kernel_report.py", ROOT / "docs" / "kernels.md"
ARCHITECTURES = ["80", "90"]
"""The newest architecture is added to these."""
COUNTED = "90"
"""The architecture whose instructions are counted."""
FLAGS = [
    *("-std=c++17", "-O3", "-DNDEBUG", "-Icsrc", "-Xcompiler=-fPIC", "-Xcompiler=-Wall", "-Xcompiler=-Werror"),
    *("--extended-lambda", "-lineinfo", "-Werror=all-warnings"),
]
"""The flags that CMakeLists.txt uses for a release build with AFA_EXT_WERROR."""

# ---- compiler output --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """Resources of a kernel from ptxas: registers per thread, bytes per thread, static shared memory per block."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


def parse_usage(text: str) -> dict[str, Usage]:
    """Usage by mangled name, from the output of ptxas -v for one architecture."""
    usage: dict[str, Usage] = {}
    entry = function = ""
    frame = (0, 0, 0)
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)'", line):
            entry, frame = found[1], (0, 0, 0)
        elif found := re.search(r"Function properties for (\S+)", line):
            function = found[1]
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if function == entry:
                frame = (int(found[1]), int(found[2]), int(found[3]))
        elif found := re.search(r"Used (\d+) registers", line):
            # The stack of the kernel and of all functions it calls, if any.
            deepest = re.search(r"(\d+) bytes cumulative stack size", line)
            shared = re.search(r"(\d+)(?:\+\d+)? bytes smem", line)
            stack = max(frame[0], int(deepest[1]) if deepest else 0)
            usage[entry] = Usage(int(found[1]), stack, frame[1], frame[2], int(shared[1]) if shared else 0)
    return usage


def parse_threads(ptx: str) -> dict[str, int]:
    """Maximum threads per block (__launch_bounds__) by mangled name."""
    found = re.findall(r"\.entry\s+(\w+)\s*\([^)]*\)\s*\.maxntid\s+(\d+)(?:\s*,\s*(\d+)\s*,\s*(\d+))?", ptx)
    return {name: int(x) * int(y or 1) * int(z or 1) for name, x, y, z in found}


@dataclass(frozen=True)
class Instructions:
    """Counts from a kernel's machine code; `loop_*`: in its innermost loops that access global memory."""

    total: int
    fma: int
    loads: int
    wide_64: int
    wide_128: int
    stores: int
    barriers: int
    local: int
    loop_total: int
    loop_accesses: int
    stores_128: int = 0
    copies_128: int = 0  # asynchronous copies from global to shared memory

    def for_an_access(self) -> float:
        """Instructions issued per load from or store to global memory, in the part that takes the most time."""
        if self.loop_accesses:
            return self.loop_total / self.loop_accesses
        return self.total / max(1, self.loads + self.stores)


def parse_instructions(sass: str) -> dict[str, Instructions]:
    """Counts by mangled name, from the output of cuobjdump -sass for one architecture."""
    counts = {}
    for part in re.split(r"^\s*Function : ", sass, flags=re.MULTILINE)[1:]:
        line = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
        code = [(int(m[1], 16), m[2].split("."), m[3]) for m in line.finditer(part)]
        counts[part.split()[0]] = _count(code)
    return counts


def _count(code: Sequence[tuple[int, list[str], str]]) -> Instructions:
    def number(*names: str, modifier: str | None = None) -> int:
        return sum(op[0] in names and (modifier is None or modifier in op[1:]) for _, op, _ in code)

    # First and last address, instructions and accesses of every backward branch; a branch to itself is only padding.
    loops = []
    for at, op, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if op[0] == "BRA" and target and int(target[1], 16) < at:
            body = [name[0] for place, name, _ in code if int(target[1], 16) <= place <= at]
            loops.append((int(target[1], 16), at, len(body), body.count("LDG") + body.count("STG")))
    loops = [loop for loop in loops if loop[3]]
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return Instructions(
        total=len(code),
        fma=number("FFMA", "FFMA2", "DFMA", "HFMA2"),
        loads=number("LDG"),
        wide_64=number("LDG", modifier="64"),
        wide_128=number("LDG", modifier="128"),
        stores=number("STG"),
        barriers=number("BAR"),
        local=number("LDL", "STL"),
        loop_total=sum(loop[2] for loop in inner),
        loop_accesses=sum(loop[3] for loop in inner),
        stores_128=number("STG", modifier="128"),
        copies_128=number("LDGSTS", modifier="128"),
    )


@dataclass(frozen=True)
class Kernel:
    """One template instance for one architecture; without instructions if there is no disassembler."""

    file: str
    name: str
    architecture: str
    threads: int
    usage: Usage
    instructions: Instructions | None


def find_cuobjdump() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    for folder in (triton.submodule_search_locations or []) if triton else []:
        found = shutil.which("cuobjdump", path=str(Path(folder) / "backends" / "nvidia" / "bin"))
        if found:
            return found
    return None


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\bV(\d+\.\d+\.\d+)", text)
    if found is None:
        sys.exit(f"{nvcc} --version prints no version:\n{text}")
    return found[1]


def targets(nvcc: str) -> list[str]:
    """The target architectures of this report."""
    text = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = sorted(set(re.findall(r"compute_(\d+)\b", text)), key=int)
    return sorted({*(a for a in ARCHITECTURES if a in known), known[-1]}, key=int)


def demangled(names: Sequence[str]) -> list[str]:
    """Names without namespaces, arguments and return type, such as stencil_kernel<float, false>."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [line.replace("afa::(anonymous namespace)::", "").removeprefix("void ") for line in text.splitlines()]
    return [line[: line.rindex("(")] for line in short]


def compile_kernels(nvcc: str, cuobjdump: str | None) -> list[Kernel]:
    def one(job: tuple[Path, str]) -> list[Kernel]:
        source, architecture = job
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "out.cubin"
            keep = ["--keep", "--keep-dir", folder]  # for the PTX, which states the launch bounds
            command = [nvcc, *FLAGS, f"-arch=sm_{architecture}", "-Xptxas", "-v", *keep, "-cubin", str(source)]
            done = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True, cwd=ROOT, check=False)
            if done.returncode:
                sys.exit(f"{done.stdout}{done.stderr}{source.name} does not compile for sm_{architecture}")
            usage = parse_usage(done.stdout + done.stderr)
            threads: dict[str, int] = {}
            for ptx in Path(folder).glob("*.ptx"):
                threads |= parse_threads(ptx.read_text(encoding="utf-8"))
            counts: dict[str, Instructions] = {}
            if cuobjdump:
                listing = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True)
                counts = parse_instructions(listing.stdout)
            names = list(usage)
            file = str(source.relative_to(ROOT / "csrc"))
            return [
                Kernel(file, short, architecture, threads[name], usage[name], counts.get(name))
                for name, short in zip(names, demangled(names), strict=True)
            ]

    sources = sorted((ROOT / "csrc").rglob("*.cu"), key=lambda path: -path.stat().st_size)
    jobs = [(source, architecture) for source in sources for architecture in targets(nvcc)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [kernel for kernels in pool.map(one, jobs) for kernel in kernels]
    return sorted(found, key=lambda k: (k.file, k.name, int(k.architecture)))


@dataclass(frozen=True)
class Claim:
    """Minimum counts of wide accesses in kernels whose full name matches, on every architecture."""

    kernels: str  # a regular expression
    loads_128: int = 0
    stores_128: int = 0
    copies_128: int = 0


CLAIMS = [
    # A walk loads four scores at a time, and four entries unless the compiler splits them into pairs (sm_121).
    Claim(r"walk_step_tiled_kernel<.+>", loads_128=4, stores_128=1),
    # Maps and pairs are moved 16 bytes at a time; if pairs can have any layout (true), only the maps.
    Claim(r"affinity_kernel<(__half|__nv_bfloat16), 8, \d, false>", loads_128=4, stores_128=2),
    Claim(r"affinity_kernel<(__half|__nv_bfloat16), 8, \d, true>", loads_128=4),
    Claim(r"affinity_kernel<(float|double), [42], \d, false>", loads_128=4, stores_128=2),
    Claim(r"affinity_kernel<(float|double), [42], \d, true>", loads_128=4),
    Claim(r"backward_attention_kernel<\w+, [842], (true|false)>", stores_128=2),
    Claim(r"backward_weight_kernel<\w+, [842], false>", loads_128=35),
    Claim(r"backward_weight_kernel<\w+, [842], true>", loads_128=32),
    Claim(r"labels_kernel<\w+, (true|false), 16>", stores_128=1),
    Claim(r"loss_kernel<\w+, [842]>", loads_128=1),
    Claim(r"loss_backward_kernel<\w+, [42]>", stores_128=1),
    Claim(r"shrink_kernel<\w+, unsigned char, true>", stores_128=1),
    Claim(r"shrink_kernel<(float, float|double, double), true>", loads_128=4, stores_128=1),
    # PAR's tiles are copied to shared memory 16 bytes at a time; in the other kernels, one load reads four classes.
    Claim(r"ring_kernel<\w+, \d>", copies_128=4),
    Claim(r"stencil_kernel<(float|__half|__nv_bfloat16), (true|false), \d>", loads_128=10, stores_128=1),
    Claim(r"stencil_kernel<double, (true|false), \d>", loads_128=20, stores_128=2),
    Claim(r"stencil_kept_kernel<(float|__half|__nv_bfloat16)>", loads_128=5, stores_128=1),
    Claim(r"stencil_kept_kernel<double>", loads_128=10, stores_128=2),
    Claim(r"weight_grad_kernel<\w+>", loads_128=9),
    Claim(r"group_kernel<\w+>", stores_128=1),
    # Four channels of a row of the lattice; a splat reads four rows at once, a slice three corners.
    Claim(r"splat_kernel<float, 4>", loads_128=4, stores_128=1),
    Claim(r"blur_kernel<float, 4>", loads_128=3, stores_128=1),
    Claim(r"(field_)?slice_kernel<(float, )?4>", loads_128=3, stores_128=1),
]


def broken_claims(kernels: Sequence[Kernel], claims: Sequence[Claim]) -> list[str]:
    """Kernels with fewer wide accesses than claimed, and claims that match no kernel."""
    lines = []
    for claim in claims:
        named = [k for k in kernels if re.fullmatch(claim.kernels, k.name)]
        if not named:
            lines.append(f"no kernel matches {claim.kernels}, which should have wide accesses")
        for k in named:
            i = k.instructions
            if i is None:
                continue
            found = (i.wide_128, i.stores_128, i.copies_128)
            expected = (claim.loads_128, claim.stores_128, claim.copies_128)
            if any(a < b for a, b in zip(found, expected, strict=True)):
                lines.append(
                    f"{k.name} on sm_{k.architecture} ({k.file}): {found[0]} loads, {found[1]} stores and {found[2]} "
                    f"copies of 128 bits, expected at least {expected[0]}, {expected[1]} and {expected[2]}"
                )
    return lines


def faults(kernels: Sequence[Kernel]) -> list[str]:
    """Kernels that use the stack, spill, or use local memory."""
    lines = []
    for k in kernels:
        u = k.usage
        if u.stack or u.spill_stores or u.spill_loads:
            lines.append(
                f"{k.name} on sm_{k.architecture} ({k.file}): {u.stack} bytes of stack, "
                f"{u.spill_stores} of spill stores, {u.spill_loads} of spill loads"
            )
        elif k.instructions and k.instructions.local:
            lines.append(f"{k.name} on sm_{k.architecture} ({k.file}): {k.instructions.local} local loads and stores")
    return lines


# ---- occupancy --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Multiprocessor:
    warps: int
    blocks: int
    shared: int  # bytes


# "CUDA C++ Programming Guide", table "Technical Specifications per Compute Capability": resident warps, resident
# blocks and shared memory of an SM. All have 65,536 registers in four partitions.
MULTIPROCESSORS = {
    "80": Multiprocessor(64, 32, 164 << 10),
    "86": Multiprocessor(48, 16, 100 << 10),
    "89": Multiprocessor(48, 24, 100 << 10),
    "90": Multiprocessor(64, 32, 228 << 10),
    "100": Multiprocessor(64, 32, 228 << 10),
    "103": Multiprocessor(64, 32, 228 << 10),
    "120": Multiprocessor(48, 24, 100 << 10),
    "121": Multiprocessor(48, 24, 100 << 10),
}
# From the toolkit's cuda_occupancy.h: registers are allocated per warp in units of 256, from the share of its
# partition. Shared memory is allocated per block in units of 128 bytes, plus 1 KiB that the system reserves in each
# block.
REGISTERS, PARTITIONS, REGISTER_UNIT = 65536, 4, 256
SHARED_UNIT, SHARED_RESERVED = 128, 1 << 10
WARP = 32


def occupancy(architecture: str, threads: int, registers: int, shared: int) -> float | None:
    """The share of an SM's warps that can be resident; None for an architecture without listed limits."""
    sm = MULTIPROCESSORS.get(architecture)
    if sm is None:
        return None
    warps = math.ceil(threads / WARP)
    for_warp = math.ceil(registers * WARP / REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // PARTITIONS // for_warp * PARTITIONS // warps
    by_shared = sm.shared // (math.ceil((shared + SHARED_RESERVED) / SHARED_UNIT) * SHARED_UNIT)
    return min(sm.blocks, sm.warps // warps, by_registers, by_shared) * warps / sm.warps


# ---- the work: bytes, operations, accesses ----------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Formulas of one launch, with the symbols in SYMBOLS."""

    kernel: str
    bytes: str  # minimum bytes read and written, each once
    operations: str  # floating-point
    accesses: str  # loads and stores of global memory by all threads together
    blocks: str
    issued: str | None = None
    """Instructions issued by all threads together, from the machine code for sm_90. Needed if they are not proportional
    to the accesses, because most of the time is spent in loops without access to global memory."""
    before: str = "0"  # bytes that a block reads before it can start
    once: str = "0"  # bytes read once by a launch with several steps
    alone: bool = False  # whether only one block at a time fits on an SM


SYMBOLS = {
    "B": "images",
    "C": "maps or classes",
    "D": "channels of the images or features",
    "N": "pixels or nodes (H·W)",
    "G": "pixels of the full image, if N counts those of the downscaled image",
    "K": "neighbors, or offsets of the window",
    "M": "attention maps",
    "P": "pairs of nodes (B·N·N dense, B·N·K windowed)",
    "Q": "background scores",
    "L": "average number of points of a path",
    "E": "corners of a lattice's simplices, D+1",
    "V": "vertices of a lattice",
    "s": "bytes per element",
}
SUM = 4  # bytes of a float32 sum
WORK = {
    work.kernel: work
    for work in [
        Work("par_rings_kernel", "B*N*(D+K)*s", "B*N*K*(8*D+3)", "B*N*K*(D+1)", "B*ceil(N/128)"),
        Work("par_affinity_kernel", "B*N*(D+K)*s", "B*N*K*(8*D+3)", "B*N*K*(4*D+1)", "B*ceil(N/128)"),
        Work(
            "ring_kernel",
            *("B*N*(K*s+8*C)", "2*B*N*K*C", "B*N*(K+3*C)", "B*ceil(N/1024)"),
            issued="B*N*(160*C+270)",
            before="B*N*K*s",
            alone=True,
        ),
        Work("group_kernel", "B*N*C*(s+4)", "0", "B*N*(C+ceil(C/4))", "B*ceil(N/128)*ceil(C/4)"),
        Work(
            "stencil_kernel",
            *("B*N*(K*s+8*C)", "2*B*N*K*C", "B*N*K*(ceil(C/4)+ceil(C/8))", "B*ceil(N/128)*ceil(C/8)"),
        ),
        Work(
            "stencil_kept_kernel",
            *("8*B*N*C", "2*B*N*K*C", "B*N*K*ceil(C/4)", "B*ceil(N/128)*ceil(C/4)"),
            once="B*N*K*s",
        ),
        Work("weight_grad_kernel", "8*B*N*(C+K)", "2*B*N*K*C", "B*N*K*(9*ceil(C/4)/8+2)", "B*ceil(K/8)*ceil(N/128)"),
        Work("walk_transition_kernel", "B*N*K*(s+4)", "5*B*N*K", "4*B*N*K", "B*ceil(N/128)"),
        Work(
            "walk_transition_tiled_kernel",
            *("B*N*K*(s+4)", "5*B*N*K", "B*N*K*(3+5/16)", "B*ceil(N/48)"),
            issued="40*B*N*K",
        ),
        Work("walk_transition_backward_kernel", "B*N*K*(2*s+4)", "10*B*N*K", "5*B*N*K", "B*ceil(N/128)"),
        Work("walk_transpose_kernel", "2*B*N*K*s", "0", "2*B*N*K", "B*ceil(N/128)"),
        Work(
            "walk_step_tiled_kernel",
            *("B*N*(K*s+8*C)", "2*B*N*K*(C+1)", "B*N*K*(2+ceil((C+1)/8))/8", "B*ceil(N/48)"),
            issued="B*N*ceil((C+1)/8)*(10*K+2500)",
        ),
        Work("walk_step_kernel", "B*N*(K*s+8*C)", "2*B*N*K*(C+1)", "9*B*N*K*ceil(C/8)", "B*ceil(N/128)*ceil(C/8)"),
        Work(
            "edge_affinity_kernel",
            *("B*N*(1+K)*s", "B*N*K*L/2", "B*N*K*(L/2+1)", "B*ceil(N/128)*ceil((K+1)/16)"),
            issued="B*N*K*(45+7*L/2)",
        ),
        Work(
            "feature_affinity_kernel",
            *("B*N*(D+K)*s", "3*B*N*K*D/2", "B*N*K*(9*D/16+1)", "B*ceil(N/128)*ceil((K+1)/16)"),
        ),
        Work(
            "feature_affinity_backward_kernel",
            *("2*B*N*(D+K)*s", "6*B*N*K*D", "B*N*K*(D+3*ceil(D/8))", "B*ceil(N/128)*ceil(D/8)"),
        ),
        Work("affinity_kernel", "(B*M*N*N+P)*s", "2*B*M*N*N", "(3*B*M*N*N+2*P)*s/32", "B*ceil(N/32)*(ceil(N/32)+1)/2"),
        Work(
            "backward_attention_kernel",
            *("(B*M*N*N+2*P)*s", "B*M*N*N+5*P", "3*(B*M*N*N+2*P)*s/32", "B*ceil(N/32)*(ceil(N/32)+1)/2"),
        ),
        Work(
            "backward_weight_kernel",
            *("(B*M*N*N+2*P)*s", "2*B*M*N*N+5*P", "(B*M*N*N+3*P)*s/16", "B*ceil(N/32)*(ceil(N/32)+1)/8"),
        ),
        Work("labels_kernel", "8*B*N+P", "0", "35*P/16", "ceil(P/2048)"),
        Work("loss_kernel", "P*(s+1)", "2*P", "P*s/8", "ceil(P/16384)"),
        Work("loss_backward_kernel", "P*(s+1)", "0", "P*s/8", "ceil(P/512)"),
        Work("pack_kernel", "B*C*(1+2*s)", "0", "3*B*C", "B"),
        Work("shrink_kernel", "B*D*(G+N*s)", "10*B*D*N", "3*B*D*N/4", "B*D*ceil(N/512)"),
        Work("score_kernel", "B*C*(G+Q*N)*s", "B*C*N*(18+3*Q)", "B*C*N*(5+Q)", "B*ceil(N/128)"),
        Work("place_kernel", "B*(C+1)*Q*N*s", "40*B*(C+1)*Q*N", "17*B*(C+1)*Q*N", "B*ceil(N/128)"),
        Work("choice_kernel", "B*(C*Q*N*s+8*G)", "11*B*C*Q*G", "B*G*(4*C*Q+1)", "B*ceil(G/128)"),
        Work("simplex_kernel", "N*(4*D+16*E)", "N*(5*E*E+10*E)", "N*(D+3*E)", "ceil(N/128)"),
        Work("sort_count_kernel", "8*N*E", "0", "3*N*E", "ceil(N*E/2048)"),
        Work("scan_kernel", "N*E", "0", "N*E/4", "64"),
        Work("sort_move_kernel", "24*N*E", "0", "13*N*E", "ceil(N*E/2048)"),
        Work("begin_count_kernel", "8*N*E", "0", "2*N*E", "ceil(N*E/2048)"),
        Work("vertex_kernel", "28*N*E+8*V", "0", "9*N*E+V", "ceil(N*E/2048)"),
        Work("neighbor_kernel", "8*V*(E+1)", "0", "40*V*E", "E*ceil(V/128)"),
        Work(
            "splat_kernel",
            *("4*(2*N*E+N*C+V*C)", "2*N*E*C", "(4*N*E+V)*ceil(C/4)", "ceil(N*E*ceil(C/4)/4096)"),
        ),
        Work("splat_heads_kernel", "3*N*E*C/8", "N*E*C/32", "3*N*E*ceil(C/4)/32", "ceil(N*E*ceil(C/4)/4096)"),
        Work("overflow_kernel", "8", "0", "2", "ceil(C/4)"),
        Work("blur_kernel", "8*V*(C+1)", "3*V*C", "6*V*ceil(C/4)", "ceil(V*ceil(C/4)/128)"),
        Work("slice_kernel", "4*(2*N*E+N*C+V*C)", "2*N*E*C", "N*(3*E+2)*ceil(C/4)", "ceil(N*ceil(C/4)/128)"),
        Work("rows_from_planes_kernel", "N*C*(s+4)", "N*C", "N*(C+ceil(C/4))", "ceil(C/4)*ceil(N/128)"),
        Work("planes_from_rows_kernel", "N*C*(s+4)", "0", "N*(C+ceil(C/4))", "ceil(C/4)*ceil(N/128)"),
        Work("logits_kernel", "N*C*(s+4)", "N*C", "2*N*C", "C*ceil(N/128)"),
        Work(
            "field_slice_kernel",
            *("4*(2*N*E+2*N*C+V*C)", "2*N*E*C+4*N*C", "N*(C+(3*E+3)*ceil(C/4))", "ceil(N/16)"),
        ),
        Work("field_softmax_kernel", "8*N*C", "4*N*C", "6*N*C", "ceil(N/16)"),
    ]
}


@dataclass(frozen=True)
class Stage:
    """A kernel that is launched several times in a row; `code` is the template instance whose instructions are used."""

    work: str
    code: str
    launches: int = 1
    sizes: Mapping[str, int] | None = None  # differences from the target's sizes
    resident: bool = False  # one cooperative launch, whose blocks synchronize between repetitions


@dataclass(frozen=True)
class Target:
    name: str
    sizes: Mapping[str, float]
    stages: Sequence[Stage]


def _disc(radius: int) -> list[tuple[int, int]]:
    side = range(-radius, radius + 1)
    return [(y, x) for y in side for x in side if y * y + x * x < radius * radius]


def path_points(radius: int) -> float:
    """Average number of points of a path in the window (see pair_affinity.h)."""

    def points(dy: int, dx: int) -> int:
        ys, xs = range(min(0, dy), max(0, dy) + 1), range(min(0, dx), max(0, dx) + 1)
        return sum((dy * x - dx * y) ** 2 < max(1, dy * dy + dx * dx) for y in ys for x in xs)

    window = _disc(radius)
    return sum(points(dy, dx) for dy, dx in window) / len(window)


def _par(batch: int, classes: int, side: int, resident: bool) -> Target:
    sizes = {"B": batch, "C": classes, "D": 3, "N": side * side, "K": 48, "s": 4}
    stages = [
        Stage("par_rings_kernel", "par_rings_kernel<float, false>"),
        Stage("ring_kernel", "ring_kernel<float, 4>", 10, resident=resident),
    ]
    return Target(f"PAR {batch}×{classes}×{side}×{side}, 10 iterations", sizes, stages)


TARGETS = [
    _par(8, 21, 320, resident=False),
    _par(8, 3, 160, resident=True),
    Target(
        "IRN walk 94×125, 4 maps, 256 steps",
        {"B": 1, "C": 4, "N": 94 * 125, "K": len(_disc(5)), "L": path_points(5), "s": 4},
        [
            Stage("edge_affinity_kernel", "edge_affinity_kernel<float>"),
            Stage("walk_transition_kernel", "walk_transition_kernel<float>"),
            Stage("group_kernel", "group_kernel<float>"),
            Stage("stencil_kept_kernel", "stencil_kept_kernel<float>", 256, resident=True),
        ],
    ),
    Target(
        "AFA walk 48×48, batch 8, 21 maps, radius 8, 1 step",
        {"B": 8, "C": 21, "N": 48 * 48, "K": 17 * 17, "s": 4},
        [Stage("walk_step_tiled_kernel", "walk_step_tiled_kernel<float>")],
    ),
    Target(
        "the transition of this walk: forward, backward, transpose",
        {"B": 8, "N": 48 * 48, "K": 17 * 17, "s": 4},
        [
            Stage("walk_transition_tiled_kernel", "walk_transition_tiled_kernel<float>"),
            Stage("walk_transition_backward_kernel", "walk_transition_backward_kernel<float>"),
            Stage("walk_transpose_kernel", "walk_transpose_kernel<float>"),
        ],
    ),
    Target(
        "affinity_from_attention 8×16 maps, 32×32 tokens, dense",
        {"B": 8, "M": 16, "N": 1024, "P": 8 * 1024 * 1024, "s": 4},
        [Stage("affinity_kernel", "affinity_kernel<float, 4, 2, false>")],
    ),
    Target(
        "the same, backward for maps, weight and bias",
        {"B": 8, "M": 16, "N": 1024, "P": 8 * 1024 * 1024, "s": 4},
        [
            Stage("backward_attention_kernel", "backward_attention_kernel<float, 4, false>"),
            Stage("backward_weight_kernel", "backward_weight_kernel<float, 4, false>"),
        ],
    ),
    Target(
        "affinity_labels and affinity_loss of these pairs, forward and backward",
        {"B": 8, "N": 1024, "P": 8 * 1024 * 1024, "s": 4},
        [
            Stage("labels_kernel", "labels_kernel<int, false, 16>"),
            Stage("loss_kernel", "loss_kernel<float, 4>"),
            Stage("loss_backward_kernel", "loss_backward_kernel<float, 4>"),
        ],
    ),
    Target(
        "pseudo_labels 8×512×512, 2 classes per image, 2 scores",
        {"B": 8, "C": 2, "D": 3, "G": 512 * 512, "N": 256 * 256, "K": 48, "Q": 2, "s": 4},
        [
            Stage("pack_kernel", "pack_kernel"),
            Stage("shrink_kernel", "shrink_kernel<float, unsigned char, true>"),
            Stage("par_rings_kernel", "par_rings_kernel<float, false>"),
            Stage("score_kernel", "score_kernel<float, int>"),
            Stage("ring_kernel", "ring_kernel<float, 4>", 10, {"C": 2 * 2}),
            Stage("choice_kernel", "choice_kernel<float, int>"),
        ],
    ),
]


def _crf(height: int, width: int, classes: int, iterations: int) -> Target:
    """One image; the vertices are those of a photograph, bilateral (64, 5) and Gaussian 3."""
    pixels = height * width
    sizes = {"C": classes, "D": 5, "E": 6, "N": pixels, "V": pixels // 3, "s": 4}
    flat = {"D": 2, "E": 3, "V": pixels // 8}
    both = {"E": sizes["E"] + flat["E"], "V": sizes["V"] + flat["V"]}
    stages = []
    for own, dims, passes in ((flat, 2, 6), ({}, 5, 8)):
        ones = {**own, "C": 1}
        stages += [
            Stage("simplex_kernel", f"simplex_kernel<{dims}>", 1, own),
            Stage("sort_count_kernel", "sort_count_kernel", passes, own),
            Stage("scan_kernel", "scan_kernel", passes + 1, own),
            Stage("sort_move_kernel", "sort_move_kernel", passes, own),
            Stage("begin_count_kernel", "begin_count_kernel", 1, own),
            Stage("vertex_kernel", "vertex_kernel", 1, own),
            Stage("neighbor_kernel", "neighbor_kernel", 1, own),
            Stage("splat_kernel", "splat_kernel<float, 1>", 1, ones),
            Stage("splat_heads_kernel", "splat_heads_kernel<float, 1>", 1, ones),
            Stage("blur_kernel", "blur_kernel<float, 1>", dims + 1, ones),
            Stage("slice_kernel", "slice_kernel<float, 1>", 1, ones),
        ]
    stages += [
        Stage("logits_kernel", "logits_kernel<float>"),
        Stage("field_softmax_kernel", "field_softmax_kernel"),
        Stage("splat_kernel", "splat_kernel<float, 4>", iterations, both),
        Stage("splat_heads_kernel", "splat_heads_kernel<float, 4>", iterations, both),
        Stage("overflow_kernel", "overflow_kernel<4>", iterations),
        Stage("blur_kernel", "blur_kernel<float, 4>", 3 * iterations, both),
        Stage("blur_kernel", "blur_kernel<float, 4>", 3 * iterations),
        Stage("field_slice_kernel", "field_slice_kernel<4>", iterations, both),
    ]
    return Target(f"dense_crf 1×{classes}×{height}×{width}, {iterations} iterations", sizes, stages)


TARGETS.append(_crf(375, 500, 21, 10))


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet: bytes and float32 operations per second, number of SMs, boost clock."""

    name: str
    bandwidth: float
    operations: float
    multiprocessors: int
    clock: float

    def issued(self) -> float:
        """Thread instructions per second: four schedulers per SM, each issues one warp per cycle."""
        return self.multiprocessors * 4 * WARP * self.clock


GPUS = [Gpu("A100", 1.56e12, 19.5e12, 108, 1.41e9), Gpu("H200", 4.8e12, 67e12, 132, 1.98e9)]
LAUNCH = 3e-6
"""Seconds per empty kernel, launched back to back on a stream: a typical value, not measured here."""
MEETING = 1.5e-6
"""Seconds to synchronize all blocks of a cooperative launch: also a typical value."""


def value(formula: str, sizes: Mapping[str, float]) -> float:
    """Evaluates one of this file's formulas for these sizes."""
    return float(eval(formula, {"__builtins__": {}, "ceil": math.ceil}, dict(sizes)))


@dataclass(frozen=True)
class Estimate:
    """Seconds for a target on a GPU: limits by bytes and by operations, and the prediction for the current kernels."""

    by_bytes: float
    by_operations: float
    predicted: float
    why: str  # the limit that dominates the prediction


def bytes_of(stage: Stage, sizes: Mapping[str, float]) -> float:
    """Minimum bytes moved by all launches or steps of the stage."""
    work = WORK[stage.work]
    return stage.launches * value(work.bytes, sizes) + value(work.once, sizes)


def estimate(target: Target, gpu: Gpu, for_an_access: Mapping[str, float]) -> Estimate:
    by_bytes = by_operations = 0.0
    parts = {"launches": 0.0, "bytes": 0.0, "operations": 0.0, "instructions": 0.0}
    for stage in target.stages:
        work, sizes = WORK[stage.work], {**target.sizes, **(stage.sizes or {})}
        moved = bytes_of(stage, sizes) / gpu.bandwidth
        computed = stage.launches * value(work.operations, sizes) / gpu.operations
        by_bytes += moved
        by_operations += computed
        blocks = value(work.blocks, sizes)
        busy = min(1.0, blocks / gpu.multiprocessors)  # share of SMs with a block
        if work.alone:  # the last wave takes a full round, too
            busy = blocks / (gpu.multiprocessors * math.ceil(blocks / gpu.multiprocessors))
        instructions = (
            value(work.issued, sizes) if work.issued else value(work.accesses, sizes) * for_an_access[stage.code]
        )
        issued = stage.launches * instructions / gpu.issued()
        before = stage.launches * value(work.before, sizes) / gpu.bandwidth
        limits = {"bytes": moved - before, "operations": computed / busy, "instructions": issued / busy}
        largest = max(limits, key=lambda name: limits[name])
        parts[largest] += limits[largest]
        parts["bytes"] += before
        parts["launches"] += LAUNCH + (stage.launches - 1) * (MEETING if stage.resident else LAUNCH)
    return Estimate(by_bytes, by_operations, sum(parts.values()), max(parts, key=lambda name: parts[name]))


# ---- tables -----------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    marks = ["---"] * left + ["--:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, marks, *rows])


def by_instance(kernels: Sequence[Kernel]) -> dict[tuple[str, str], list[Kernel]]:
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.file, kernel.name), []).append(kernel)
    return groups


def resources_table(kernels: Sequence[Kernel], version: str) -> str:
    architectures = sorted({k.architecture for k in kernels}, key=int)
    rows = []
    for (file, name), group in by_instance(kernels).items():
        first = group[0]
        if {k.architecture for k in group} != set(architectures):
            sys.exit(f"{name} ({file}) is not compiled for every architecture")
        cells = []
        for k in group:
            share = occupancy(k.architecture, k.threads, k.usage.registers, k.usage.shared)
            cells.append(f"{k.usage.registers} · {'?' if share is None else f'{share:.0%}'}")
        local = "/".join(f"{k.usage.stack}+{k.usage.spill_stores + k.usage.spill_loads}" for k in group)
        local = "0" if not faults(group) else local
        shared = "/".join(dict.fromkeys(str(k.usage.shared) for k in group))
        rows.append([f"`{name}`", Path(file).parts[0], str(first.threads), shared, local, *cells])
    columns = [f"sm_{a}" for a in architectures]
    head = ["kernel", "folder", "threads", "shared, B", "stack + spills, B", *columns]
    return f"nvcc {version}. Columns of architectures: registers per thread · occupancy.\n\n{table(head, rows, 2)}"


def instructions_table(kernels: Sequence[Kernel]) -> str:
    head = ["kernel", "instructions", "FMA", "loads", "64 bits", "128 bits", "stores", "barriers", "per access"]
    rows = []
    for k in kernels:
        if k.architecture == COUNTED and k.instructions:
            i = k.instructions
            counts = [i.total, i.fma, i.loads, i.wide_64, i.wide_128, i.stores, i.barriers]
            rows.append([f"`{k.name}`", *map(str, counts), f"{i.for_an_access():.1f}"])
    return table(head, rows)


def recorded_for_an_access(page: Path) -> dict[str, float]:
    """The last column of the page's instruction table, by kernel."""
    rows = re.findall(r"^\| `([^`]+)` \|.*\| ([\d.]+) \|$", block_of(page, TOOL, "instructions"), re.MULTILINE)
    return {name: float(count) for name, count in rows}


def readable(formula: str) -> str:
    shown = formula.replace("**2", "²").replace("ceil(", "⌈").replace("*", "·")
    return re.sub(r"⌈([^()]*)\)", r"⌈\1⌉", shown)


def work_table() -> str:
    rows = [
        [
            f"`{w.kernel}`",
            readable(w.bytes) + ("" if w.once == "0" else f", and {readable(w.once)} once"),
            readable(w.operations),
            readable(w.accesses),
        ]
        for w in WORK.values()
    ]
    symbols = "; ".join(f"{symbol}: {meaning}" for symbol, meaning in SYMBOLS.items())
    return f"{symbols}.\n\n{table(['kernel', 'bytes', 'operations', 'accesses'], rows, 4)}"


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} µs"


BENCHMARKED = {
    "PAR 8×21×320×320, 10 iterations": ("par_kernel", "8x21x320x320", "afa_ext.par_refine"),
    "PAR 8×3×160×160, 10 iterations": ("par_kernel", "8x3x160x160", "in a CUDA graph"),
    "IRN walk 94×125, 4 maps, 256 steps": ("random_walk", "1x4x94x125", "afa_ext.propagate_to_edge"),
    "AFA walk 48×48, batch 8, 21 maps, radius 8, 1 step": ("random_walk", "8x21x48x48", "afa_ext.random_walk"),
    "affinity_from_attention 8×16 maps, 32×32 tokens, dense": (
        "affinity",
        "8x16x32x32",
        "forward only, in a CUDA graph",
    ),
    "pseudo_labels 8×512×512, 2 classes per image, 2 scores": (
        "pseudo_labels",
        "8x20x512x512",
        "afa_ext.pseudo_labels",
    ),
}
"""Name of a target -> (benchmark, size, candidate) of the row that measures it, in float32."""


def measured(target: Target, gpu: Gpu) -> str:
    """The time in benchmarks/results, which tools/gpu_check.py wrote on this GPU."""
    for file in sorted(RESULTS.glob("nvidia-*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if gpu.name not in content["machine"]["device"]:
            continue
        for row in content["rows"]:
            key = (row["benchmark"], row["size"], row["candidate"])
            if row["dtype"] == "float32" and key == BENCHMARKED.get(target.name):
                return duration(row["median_ms"] / 1e3)
    return "–"


def limits_table(for_an_access: Mapping[str, float]) -> str:
    head = ["target", "GPU", "bytes", "operations", "launches", "limit by bytes", "by operations", "predicted"]
    head.append("measured")
    rows = []
    for target in TARGETS:
        missing = [stage.code for stage in target.stages if stage.code not in for_an_access]
        if missing:
            sys.exit(f"the instruction table lacks {', '.join(missing)}")
        total = {"bytes": 0.0, "operations": 0.0}
        for stage in target.stages:
            sizes = {**target.sizes, **(stage.sizes or {})}
            total["bytes"] += bytes_of(stage, sizes)
            total["operations"] += stage.launches * value(WORK[stage.work].operations, sizes)
        launches = sum(1 if stage.resident else stage.launches for stage in target.stages)
        for gpu in GPUS:
            e = estimate(target, gpu, for_an_access)
            counts = [f"{total['bytes'] / 1e6:,.4g} MB", f"{total['operations'] / 1e9:.3g} G", str(launches)]
            limits = [duration(e.by_bytes), duration(e.by_operations)]
            rows.append(
                [target.name, gpu.name, *counts, *limits, f"{duration(e.predicted)}, {e.why}", measured(target, gpu)]
            )
    return table(head, rows, 2)


# ---- the command ------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if docs/kernels.md differs")
    parser.add_argument("--formulas", action="store_true", help="only the tables that need no compiler")
    options = parser.parse_args()
    nvcc = None if options.formulas else os.environ.get("CUDACXX") or shutil.which("nvcc")
    blocks: dict[str, str] = {}
    wrong: list[str] = []
    if nvcc is None and not options.formulas:
        print("nvcc was not found: nothing is compiled, and only the tables from formulas are generated")
    elif nvcc is not None:
        cuobjdump = find_cuobjdump()
        kernels = compile_kernels(nvcc, cuobjdump)
        wrong = faults(kernels) + broken_claims(kernels, CLAIMS)
        version = nvcc_version(nvcc)
        blocks["resources"] = resources_table(kernels, version)
        if cuobjdump:
            blocks["instructions"] = instructions_table(kernels)
            print(blocks["instructions"])
        else:
            print("cuobjdump was not found: instructions are not counted")
        recorded = re.search(r"nvcc ([\d.]+\d)", block_of(PAGE, TOOL, "resources"))
        if options.check and recorded and recorded[1] != version:
            print(
                f"docs/kernels.md was generated with nvcc {recorded[1]}, this is {version}: its tables are not compared"
            )
            blocks.clear()
        print(f"{len(kernels)} kernels compiled by nvcc {version}; {len(wrong)} with stack, spills or local memory")
    if not options.check:
        write_blocks(PAGE, TOOL, blocks)
    blocks |= {"work": work_table(), "limits": limits_table(recorded_for_an_access(PAGE))}
    if not options.check:
        write_blocks(PAGE, TOOL, blocks)
    elif stale := stale_blocks(PAGE, TOOL, blocks):
        wrong.append(f"docs/kernels.md's {' and '.join(stale)} are out of date; run python -m tools.kernel_report")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
