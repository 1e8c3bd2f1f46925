"""What compilers for GPUs make of the kernels: registers, spills, shared memory, and the instructions that matter.

A kernel that is right and slow for a reason that its machine code shows fails here, without a GPU. Every module is
compiled for four architectures, and those that sum products once more for NVIDIA's without the compiler's own fusing of
a product and a sum, which is a setting there.
"""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import triton

HERE = Path(__file__).parent
QUANTISERS = ("quantize", "quantize_weight", "quantize_grouped", "swiglu_quantize", "rms_norm_quantize")
PRODUCTS = ("block_scaled_mm", "block_scaled_wgrad", "grouped_scaled_mm", "grouped_scaled_wgrad")
MOVES = ("permute", "sort_by_expert", "swiglu_backward")
# Modules of modelspec.kernels that have `variants(arch)`.
MODULES = (*QUANTISERS, *PRODUCTS, *MOVES)
NVIDIA, AMD = ("sm_90", "sm_100"), ("gfx942", "gfx950")
ALL = (*NVIDIA, *AMD)
# TRITON_DEFAULT_FP_FUSION.
Fusion = Literal["0", "1"]
FUSIONS: dict[Fusion, tuple[tuple[str, ...], tuple[str, ...]]] = {"1": (ALL, MODULES), "0": (NVIDIA, PRODUCTS)}
# {arch: {variant: what came out}}
Found = dict[str, dict[str, dict[str, Any]]]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Fusion], Found]:
    """compiled(module, fusion): what came out of a module. All modules are compiled together, once."""
    folder = tmp_path_factory.mktemp("triton")

    @cache
    def run(fusion: Fusion) -> dict[str, Found]:
        arches, modules = FUSIONS[fusion]
        return compiled_modules(arches, modules, folder, fusion)

    return lambda module, fusion: run(fusion)[module]


def compiled_modules(
    arches: tuple[str, ...], modules: tuple[str, ...], folder: Path, fusion: Fusion = "1"
) -> dict[str, Found]:
    """{module: {arch: {variant: what came out}}}, compiled in another process with its cache in a folder."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder),
        "TRITON_DEFAULT_FP_FUSION": fusion,
    }
    command = [sys.executable, "-m", "tests.kernels.compile_kernels", ",".join(arches), *modules]
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {module: {arch: found[arch][module] for arch in arches} for module in modules}


def each(found: Found, *arches: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every variant's "arch variant" and what came out of it, of these architectures."""
    for arch in arches:
        assert found[arch], arch
        yield from ((f"{arch} {name}", result) for name, result in found[arch].items())


@pytest.mark.parametrize(
    ("module", "fusion"), [(module, fusion) for fusion, (_, modules) in FUSIONS.items() for module in modules]
)
def test_variants_stay_within_what_they_promise(
    compiled: Callable[[str, Fusion], Found], module: str, fusion: Fusion
) -> None:
    """Registers per thread, bytes spilled and bytes of shared memory, where a variant says how many at most."""
    for name, result in each(compiled(module, fusion), *FUSIONS[fusion][0]):
        for what in ("registers", "spills", "shared"):
            most = result["promises"].get(what)
            assert most is None or result[what] <= most, (name, what, result)


@pytest.mark.parametrize("module", MODULES)
def test_offsets_of_rows_have_64_bits(compiled: Callable[[str, Fusion], Found], module: str) -> None:
    """See offsets.py."""
    for name, result in each(compiled(module, "1"), *ALL):
        # Parts of K, times the blocks of 128 in each.
        found = [line for line in result["narrow_products"] if "%first" not in line]
        assert not found, (name, found)


def test_offsets_that_would_overflow_are_found(tmp_path: Path) -> None:
    found = compiled_modules(("sm_90",), ("tests.kernels.wrong_offsets",), tmp_path)
    for name, result in each(found["tests.kernels.wrong_offsets"], "sm_90"):
        assert (not result["narrow_products"]) == name.endswith("right"), (name, result["narrow_products"])


@pytest.mark.parametrize("module", QUANTISERS)
def test_quantisers_cast_in_hardware_and_store_wide(compiled: Callable[[str, Fusion], Found], module: str) -> None:
    found = compiled(module, "1")
    for name, result in each(found, *ALL):
        assert (result["fp8_casts"] > 0) == result["promises"].get("casts", False), name
    for name, result in each(found, *NVIDIA):
        # Beside transposed stores of FP8 these have been miscompiled.
        assert result["nan_aware_min_max"] == 0, name
        # Scales may go one by one; codes and values may not.
        assert "st.global.v4.b32" in result["stores"], (name, result["stores"])
        assert not [store for store in result["stores"] if store.endswith((".b8", ".b16"))], (name, result["stores"])


@pytest.mark.parametrize("fusion", ["0", "1"])
@pytest.mark.parametrize("module", PRODUCTS)
def test_products_use_fp8_tensor_cores_and_one_fma_to_promote(
    compiled: Callable[[str, Fusion], Found], module: str, fusion: Fusion
) -> None:
    found = compiled(module, fusion)
    for name, result in each(found, *NVIDIA):
        promises, sass = result["promises"], result["sass"]
        # A product and a sum apart would take twice the time of tensor cores' half.
        assert sass["FFMA"] >= promises["fma"], (name, sass)
        assert sass["FADD"] == promises["add"], (name, sass)
        assert result["mma_sync"] == 0, name
        # Triton drops warp specialisation without a word.
        assert result["setmaxnreg"] == promises["specialized"], name
    for name, result in each(found, "sm_90"):
        # At least the four steps of 32 that make 128, and nothing that widened FP8 to half precision before.
        assert result["sass"]["QGMMA"] >= 4, name
        assert result["sass"]["HGMMA"] == 0, name
        assert all(kind.endswith("k32.f32.e4m3.e4m3") for kind in result["wgmma"]), (name, result["wgmma"])
    for name, result in each(found, "sm_100"):
        assert result["tcgen05"] == ["tcgen05.mma.cta_group::1.kind::f8f6f4"], (name, result["tcgen05"])


@pytest.mark.parametrize("module", PRODUCTS)
def test_products_use_fp8_matrix_cores_of_amd(compiled: Callable[[str, Fusion], Found], module: str) -> None:
    """Both would run at half the rate, in half precision, without a word."""
    for arch, ending in (("gfx942", "_fp8_fp8"), ("gfx950", "_f8f6f4")):
        for name, result in each(compiled(module, "1"), arch):
            assert result["mfma"], name
            assert all(kind.endswith(ending) for kind in result["mfma"]), (name, result["mfma"])


@pytest.mark.parametrize("module", MOVES)
def test_moves_of_tokens_have_no_atomics_and_store_rows_wide(
    compiled: Callable[[str, Fusion], Found], module: str
) -> None:
    found = compiled(module, "1")
    for name, result in each(found, *ALL):
        assert result["atomics"] == 0, name
    for name, result in each(found, *NVIDIA):
        if "permute_bf16" in name or "permute_fp8" in name:
            assert set(result["stores"]) <= {"st.global.v4.b32", "st.global.v2.b32"}, (name, result["stores"])


def test_the_hardware_page_shows_what_came_out(compiled: Callable[[str, Fusion], Found]) -> None:
    """Written anew by `python tests/kernels/hardware_table.py`."""
    page: dict[str, Any] = runpy.run_path(str(HERE / "hardware_table.py"))
    shown = page["shown"]()
    if f"triton {triton.__version__} " not in shown:
        pytest.skip("the page is of another triton")
    assert shown == page["table"](lambda module: compiled(module, "1"))
