"""Normalisation of the residual stream before each sub-layer and before the head."""

from typing import Literal

from pydantic import Field

from modelspec.schema.base import Positive, Strict, Tensors, TensorSpec


class RMSNorm(Strict):
    """y = x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467)."""

    type: Literal["rmsnorm"] = Field(description="kind of normalisation")
    eps: Positive = Field(description="added to the mean square before the root; no unit", examples=[1.0e-6])

    def tensors(self, dim: int) -> Tensors:
        """The weight of a norm over vectors of `dim` elements."""
        return {"weight": TensorSpec((dim,))}


Norm = RMSNorm
