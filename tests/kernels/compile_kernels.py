"""Compiles variants of kernels for GPUs that are not there, and prints what came out of it as JSON.

    python -m tests.kernels.compile_kernels ARCH,... MODULE...

Each module, of `modelspec.kernels` or with a dot in its name, has `variants(arch)`. This runs in a process of its own,
for Triton decides when a kernel is defined whether it is interpreted or compiled.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modelspec.kernels.variant import Arch, Variant
from tests.kernels.offsets import narrow_products

TARGETS: dict[Arch, GPUTarget] = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(variant: Variant, arch: Arch) -> dict[str, Any]:
    """What one compilation came to: registers, spills, shared memory, and counts of instructions."""
    names = variant.kernel.arg_names
    constants = {**variant.constants, **variant.config.constants}
    signature = {name: "constexpr" if name in constants else variant.signature[name] for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    source = ASTSource(variant.kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": variant.config.num_warps, "num_stages": variant.config.num_stages}
    result = triton.compile(source, target=TARGETS[arch], options=options)
    found = {
        "shared": result.metadata.shared,
        "warps": result.metadata.num_warps,
        "narrow_products": narrow_products(result.asm["ttir"]),
    }
    return found | (_nvidia(result.asm, arch) if arch.startswith("sm") else _amd(result.asm["amdgcn"]))


def _nvidia(asm: dict[str, Any], arch: Arch) -> dict[str, Any]:
    ptx = asm["ptx"]
    assembler = TOOLS / "ptxas-blackwell"
    if not assembler.exists():
        assembler = TOOLS / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        binary = Path(folder) / "kernel.cubin"
        command = [str(assembler), "-v", f"-arch={arch}a", str(file), "-o", str(binary)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        dumped = subprocess.run(
            [str(TOOLS / "cuobjdump"), "-sass", str(binary)], capture_output=True, text=True, check=True
        ).stdout
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told)
    registers = re.search(r"Used (\d+) registers", told)
    assert spills is not None, told
    assert registers is not None, told
    wgmma = re.findall(r"wgmma\.mma_async\S+", ptx)
    return {
        "registers": int(registers[1]),
        "spills": int(spills[1]) + int(spills[2]),
        "wgmma": sorted(set(wgmma)),
        "tcgen05": sorted(set(re.findall(r"tcgen05\.mma\S*", ptx))),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        "mma_sync": len(re.findall(r"mma\.sync", ptx)),
        "nan_aware_min_max": len(re.findall(r"\b(?:max|min)\.NaN", ptx)),
        "fp8_casts": len(re.findall(r"cvt\.rn\.satfinite\.e4m3x2\.f32", ptx)),
        "stores": sorted(set(re.findall(r"\bst\.global\S*", ptx))),
        "setmaxnreg": "setmaxnreg" in ptx,
        "wide_addresses": len(re.findall(r"(?:mul\.wide|mad\.wide|mul\.lo|mad\.lo)\.s64|mul\.wide\.[su]32", ptx)),
        # Blackwell does two at once.
        "sass": {
            name: len(re.findall(rf"\b{name}\b", dumped)) + 2 * len(re.findall(rf"\b{name}2\b", dumped))
            for name in ("FFMA", "FMUL", "FADD", "QGMMA", "HGMMA")
        },
    }


def _amd(text: str) -> dict[str, Any]:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"),
        "atomics": len(re.findall(r"\b\w+_atomic_\w+", text)),
        "mfma": sorted(set(re.findall(r"v_mfma_\w+", text))),
        "fp8_casts": len(re.findall(r"v_cvt_(?:scalef32_)?pk_fp8_f32", text)),
    }


def compiled_all(modules: Sequence[str], arch: Arch) -> dict[str, dict[str, dict[str, Any]]]:
    """{module: {variant: what came out}} of all variants of the modules for one target."""
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in modules}
    for name, results in found.items():
        for variant in _imported(name).variants(arch):
            assert variant.name not in results, variant.name
            results[variant.name] = compiled(variant, arch) | {"promises": dict(variant.promises)}
    return found


def _imported(name: str) -> Any:
    return importlib.import_module(name if "." in name else f"modelspec.kernels.{name}")


def main() -> None:
    """Compiles all variants of the modules for the targets and prints {arch: {module: {variant: what came out}}}."""
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "interpreted kernels cannot be compiled"
    asked, modules = sys.argv[1].split(","), sys.argv[2:]
    arches: list[Arch] = [arch for arch in get_args(Arch) if arch in asked]
    # Before the processes that would each do so.
    for name in modules:
        _imported(name)
    # Each architecture in a process of its own: with triton 3.6 the first of AMD's that a process compiles for decides
    # how all of its casts to FP8 are made.
    with get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        results = pool.map(partial(compiled_all, modules), arches, chunksize=1)
    found = dict(zip(arches, results, strict=True))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
