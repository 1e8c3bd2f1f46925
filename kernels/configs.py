"""The shipped table: which configuration a kernel has, by architecture and shape. Nothing is tuned while it runs.

    config = block_scaled_mm_config(architecture(x.device), rows)

Each architecture has a few configurations by name. "large" and "small" are chosen by the number of rows; the others
are candidates that benchmarks compare with those. All are compiled by the tests.
"""

import os
from collections.abc import Mapping

import torch

from modelspec.kernels.variant import Arch, Config

# How a kernel brings tiles of its operands in: by pointers; through the tensor memory accelerator (TMA), with
# descriptors that the launcher makes; or with ones that the kernel makes, and warps that do nothing but load.
POINTERS, DESCRIPTORS, SPECIALIZED = 0, 1, 2


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def architecture(device: torch.device) -> Arch:
    """The architecture whose configurations a device gets: its own or the nearest one's. CPU passes for Hopper."""
    if device.type != "cuda" or interpreted():
        return "sm_90"
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return "gfx942" if name.startswith("gfx94") else "gfx950"
    return "sm_100" if torch.cuda.get_device_capability(device) >= (10, 0) else "sm_90"


def multiprocessors(device: torch.device) -> int:
    """How many programs a device runs side by side; few on CPU, so that each of them does several tiles."""
    if device.type != "cuda" or interpreted():
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def tiles(
    m: int, n: int, num_warps: int, num_stages: int, loads: int = DESCRIPTORS, programs: int = 1, group: int = 16
) -> Config:
    """A configuration of a product with output tiles of m rows and n columns, whose bands are `group` tiles high."""
    constants = {"BLOCK_M": m, "BLOCK_N": n, "GROUP_M": group, "LOADS": loads}
    return Config(constants, num_warps, num_stages, programs)


# Tiles of 64 rows leave room for two programs on a multiprocessor, one of which multiplies while the other adds up.
BLOCK_SCALED_MM: Mapping[Arch, Mapping[str, Config]] = {
    "sm_90": {
        "large": tiles(64, 128, 4, 3, programs=2),
        "deep": tiles(64, 128, 4, 4, programs=2),
        "square": tiles(128, 128, 8, 4, group=8),
        "specialized": tiles(128, 128, 4, 4, SPECIALIZED, group=8),
        "small": tiles(64, 64, 4, 4, programs=3),
    },
    "sm_100": {
        "large": tiles(128, 128, 8, 4, group=8),
        "small": tiles(64, 64, 4, 4, programs=3),
    },
    "gfx942": {
        "large": tiles(128, 128, 8, 2, POINTERS, group=8),
        "small": tiles(16, 128, 4, 2, POINTERS, programs=2),
    },
    "gfx950": {
        "large": tiles(128, 128, 8, 2, POINTERS, group=8),
        "small": tiles(16, 128, 4, 2, POINTERS, programs=2),
    },
}

# Two vectors of scales cost registers: tiles of 128 by 128 fit on Hopper alone, and barely.
BLOCK_SCALED_WGRAD: Mapping[Arch, Mapping[str, Config]] = {
    "sm_90": {
        "large": tiles(64, 128, 4, 3, programs=2),
        "square": tiles(128, 128, 8, 4, group=8),
        "specialized": tiles(128, 128, 4, 3, SPECIALIZED, group=8),
    },
    "sm_100": {"large": tiles(128, 64, 8, 4)},
    "gfx942": {"large": tiles(64, 128, 8, 2, POINTERS)},
    "gfx950": {"large": tiles(64, 128, 8, 2, POINTERS)},
}

SMALL = 64


def block_scaled_mm_config(arch: Arch, rows: int) -> Config:
    """For a product with so many rows: with few, only reading the weight counts, and small tiles read it wider."""
    return BLOCK_SCALED_MM[arch]["small" if rows <= SMALL else "large"]


def block_scaled_wgrad_config(arch: Arch) -> Config:
    """For a weight's gradient."""
    return BLOCK_SCALED_WGRAD[arch]["large"]
