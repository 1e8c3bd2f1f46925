"""The two ceilings of a device: how fast it copies, and how fast it multiplies matrices of random BF16 numbers.

Everything else is judged by what its bytes and FLOPs would take at these rates. The copy counts bytes read and written.
FP8 is taken to multiply at twice the rate of BF16, as the vendor's sheet has it.
"""

from collections.abc import Iterator

from torch import Tensor

from benchmarks.gpu.timing import Case, Place, Side, distance


def cases(place: Place) -> Iterator[Case]:
    """The copy and the product."""
    rows = 16 if place.dry else 2**17
    copied = Side("torch", Tensor.clone, distance, 0.0, bytes=4 * rows * 8192, format="bf16", ours=False)
    yield Case("copy", f"{rows}x8192", place.matrices(rows, 8192), lambda x: x, [copied])
    size = 64 if place.dry else 8192

    def make(seed: int) -> tuple[Tensor, Tensor]:
        return place.randn(size, size, seed=seed), place.randn(size, size, seed=seed + 100)

    def product(pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] @ pair[1].T

    multiplied = Side("torch", product, distance, 1e-2, 6 * size**2, 2 * size**3, "bf16", ours=False)
    yield Case(
        "BF16 product", f"{size}x{size}x{size}", make, lambda pair: pair[0].float() @ pair[1].float().T, [multiplied]
    )
