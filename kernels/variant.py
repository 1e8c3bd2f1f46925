"""What a kernel is compiled to: its types, its constants, how many warps run it and how deep its loads are pipelined.

Launchers choose a variant from the shipped table (`configs.py`) by architecture and shape, never by trying: autotuning
takes minutes, and ranks that tune by themselves end with different bits. The tests compile the same variants ahead of
time, for GPUs that are not there, and read what the compilers made of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Arch = Literal["sm_90", "sm_100", "gfx942", "gfx950"]


@dataclass(frozen=True, slots=True)
class Config:
    """Constants of a kernel that change its speed and not its result, and the options of its launch.

    `programs` is how many programs of a persistent kernel a multiprocessor holds at a time.
    """

    constants: Mapping[str, int]
    num_warps: int
    num_stages: int = 1
    programs: int = 1

    def options(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True, slots=True)
class Variant:
    """One compilation of a kernel.

    `signature` gives the type of every argument that is no constant, as Triton spells it ("*fp8e4nv", "i32"), in order;
    `aligned` names those that are divisible by 16 or point to an address that is. `promises` is what the tests hold the
    result to, for example {"registers": 168, "spills": 0, "shared": 113_000}.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    config: Config
    aligned: tuple[str, ...] = ()
    promises: Mapping[str, Any] = field(default_factory=dict)


def fp8_type(arch: Arch) -> str:
    """E4M3 as an architecture has it: AMD's CDNA 3 knows only the variant without infinities and negative zero."""
    return "fp8e4b8" if arch == "gfx942" else "fp8e4nv"
