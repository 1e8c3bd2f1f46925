"""The table of docs/hardware.md: what Triton's compilers made of each kernel, for four architectures.

    python tests/kernels/hardware_table.py          # compiles, and writes the table anew

Registers are rounded up to the eight that hardware gives out at a time, shared memory to whole KB.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "hardware.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
ARCHES = ("sm_90", "sm_100", "gfx942", "gfx950")
# Of each module, the variants that stand for it.
VARIANTS = {
    "block_scaled_mm": ("block_scaled_mm_large", "block_scaled_mm_small", "block_scaled_mm_specialized"),
    "block_scaled_wgrad": ("block_scaled_wgrad_large",),
    "grouped_scaled_mm": ("grouped_scaled_mm_large",),
    "grouped_scaled_wgrad": ("grouped_scaled_wgrad",),
    "quantize": ("quantize-bf16-fp32", "quantize_both-bf16-fp32"),
    "quantize_weight": ("quantize_weight-bf16-fp32",),
    "quantize_grouped": ("quantize_grouped_transposed-fp32",),
    "swiglu_quantize": ("swiglu_quantize_both",),
    "rms_norm_quantize": ("rms_norm_quantize-8192",),
    "permute": ("permute_bf16", "unpermute_bf16_weighted"),
    "sort_by_expert": ("sort_by_expert_place",),
}
# {arch: {variant: what came out}}
Found = dict[str, dict[str, dict[str, Any]]]


def cell(result: dict[str, Any] | None) -> str:
    """Registers of a thread, and KB of shared memory."""
    if result is None:
        return "none"
    registers = -(-result["registers"] // 8) * 8
    spilled = f", {result['spills']} spilled" if result["spills"] else ""
    return f"{registers}, {-(-result['shared'] // 1024)} KB{spilled}"


def table(compiled: Callable[[str], Found]) -> str:
    """Markdown; `compiled(module)` gives what came out of a module."""
    lines = [f"| triton {triton.__version__} | " + " | ".join(ARCHES) + " |", "|---|" + "---:|" * len(ARCHES)]
    for module, names in VARIANTS.items():
        found = compiled(module)
        for name in names:
            cells = [cell(found[arch].get(name)) for arch in ARCHES]
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def shown() -> str:
    """The table as the page has it."""
    return PAGE.read_text().split(BEGIN)[1].split(END)[0]


def main() -> None:
    """Compiles every module and writes the page."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "TRITON_INTERPRET": "0",
            "TRITON_DEFAULT_FP_FUSION": "1",
            "TRITON_CACHE_DIR": folder,
        }

        command = [sys.executable, "-m", "tests.kernels.compile_kernels", ",".join(ARCHES), *VARIANTS]
        done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, check=True)
        found = json.loads(done.stdout)
        before, rest = PAGE.read_text().split(BEGIN)
        written = table(lambda module: {arch: found[arch][module] for arch in ARCHES})
        PAGE.write_text(before + BEGIN + written + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
