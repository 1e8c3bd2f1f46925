"""Normalisation of the residual stream before each sub-layer and before the head."""

from typing import Literal

from pydantic import Field

from modelspec.schema.base import Positive, Strict, Tensors, TensorSpec


class RMSNorm(Strict):
    """y = x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467); (1 + weight) where it is zero-centred."""

    type: Literal["rmsnorm"] = Field(description="kind of normalisation")
    eps: Positive = Field(description="added to the mean square before the root; no unit", examples=[1.0e-6])
    zero_centered: bool = Field(
        default=False, description="keep the weight's distance from 1, so that a weight of 0 changes nothing"
    )

    def tensors(self, dim: int) -> Tensors:
        """The weight of a norm over vectors of `dim` elements."""
        return {"weight": TensorSpec((dim,), initial="zeros" if self.zero_centered else "ones")}


Norm = RMSNorm
