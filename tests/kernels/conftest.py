"""Kernels run in Triton's interpreter here (tests/conftest.py sets TRITON_INTERPRET), with its casts repaired.

The interpreter of triton 3.6 to 3.9 adds the rounding bit of a cast to FP8 by OR, so that a carry is lost and 2 % of
values come out at half their size; ties go away from zero, subnormals are cut, nothing saturates, and BF16 is cut
instead of rounded. torch casts as the hardware does. `test_interpreter.py` compares the two wherever they may differ,
and says when the repair is no longer needed.

What compilers for GPUs make of the kernels is read in test_compiled.py, from a process of its own.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH: dict[Any, torch.dtype] = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
}
BITS = {8: (torch.uint8, np.uint8), 16: (torch.int16, np.int16), 32: (torch.int32, np.int32)}


class Repaired:
    """The interpreter's cast between floating formats, bits in and bits out, as torch does it."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(self, data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source not in TORCH or target not in TORCH:
            result: np.ndarray = self.original(data, source, target, rounding)
            return result
        taken, given = BITS[source.primitive_bitwidth], BITS[target.primitive_bitwidth]
        raw = torch.from_numpy(np.frombuffer(data.tobytes(), dtype=taken[1]).copy())
        cast = raw.view(TORCH[source]).to(TORCH[target]).view(given[0]).numpy()
        return cast.view(f"uint{target.primitive_bitwidth}").reshape(data.shape)


def with_index(original: Any) -> Any:
    """Patching of tensors whose scalars, arrays of one element here, can also be the bound of a loop."""

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch


interpreter._convert_float = Repaired(interpreter._convert_float)
# Triton 3.6 asks NumPy for int(array), which takes no array of one element since NumPy 2.4.
interpreter._patch_lang_tensor = with_index(interpreter._patch_lang_tensor)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that an operation takes without writing it holds NaN (0x7F in FP8 is NaN, too)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def rounded() -> Callable[..., torch.Tensor]:
    """rounded(x, height, width, power_of_two=False): the values, in FP32, that x [rows, columns] has in E4M3 with a
    scale for each block of height x width.

    Written out once more in plain torch, and sharing no code with the package: a product of matrices rounded like this
    is the emulation that layers in FP8 are held to.
    """

    def values(x: torch.Tensor, height: int, width: int, power_of_two: bool = False) -> torch.Tensor:
        result = torch.empty_like(x, dtype=torch.float32)
        for top in range(0, x.shape[0], height):
            for left in range(0, x.shape[1], width):
                block = x[top : top + height, left : left + width].float()
                amax = block.abs().max().clamp(min=1e-12)
                # A number over a tensor would be a product with the tensor's reciprocal.
                scale, inverse = amax / torch.tensor(448.0), torch.tensor(448.0) / amax
                if power_of_two:
                    scale = torch.exp2(torch.log2(scale.double()).ceil()).float()
                    inverse = 1 / scale
                codes = (block * inverse).to(torch.float8_e4m3fn)
                result[top : top + height, left : left + width] = codes.float() * scale
        return result

    return values
