"""Rotary position embedding (arXiv 2104.09864) and its extension to longer contexts.

Position is told to attention by rotating pairs of query and key elements by an angle of position x frequency.
Frequencies fall geometrically from 1 to 1/theta. A scaling stretches them beyond the trained length.
"""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from modelspec.schema.base import NonNegative, Position, Positive, Strict


class Yarn(Strict):
    """YaRN (arXiv 2309.00071): slow frequencies are divided by `factor`, fast ones kept, a ramp between.

    With g(m) = 0.1 m ln(factor) + 1, cos and sin are multiplied by g(mscale) / g(mscale_all_dim) and the softmax
    scale by g(mscale_all_dim)^2.
    """

    type: Literal["yarn"] = Field(description="kind of scaling")
    factor: Annotated[float, Field(ge=1)] = Field(
        description="how many times the trained length; no unit", examples=[40]
    )
    original_max_position: Position = Field(description="the length trained without scaling; tokens", examples=[4096])
    beta_fast: Positive = Field(
        description="pairs that turn more often than this over the original length are kept; turns"
    )
    beta_slow: Positive = Field(description="pairs that turn less often than this are divided by factor; turns")
    mscale: NonNegative = Field(description="m of the numerator of the scale on cos and sin; no unit")
    mscale_all_dim: NonNegative = Field(
        description="m of the softmax scale, and of the denominator on cos and sin; no unit"
    )
    truncate: bool = Field(default=True, description="round the ends of the ramp outwards to whole pairs")


class Llama3(Strict):
    """The scaling of Llama 3.1 (arXiv 2407.21783): by wavelength, kept, divided by `factor`, or a ramp between.

    A pair whose wavelength is below original_max_position / high_freq_factor is kept, one above
    original_max_position / low_freq_factor is divided.
    """

    type: Literal["llama3"] = Field(description="kind of scaling")
    factor: Annotated[float, Field(ge=1)] = Field(description="divisor of the slow frequencies; no unit", examples=[8])
    original_max_position: Position = Field(description="the length trained without scaling; tokens", examples=[8192])
    low_freq_factor: Positive = Field(description="turns over the original length below which a pair is divided; turns")
    high_freq_factor: Positive = Field(description="turns over the original length above which a pair is kept; turns")


RopeScaling = Annotated[Yarn | Llama3, Discriminator("type")]


class Rope(Strict):
    """Rotary embedding of the dims that an attention type sets aside for position."""

    theta: Positive = Field(description="base of the frequencies; no unit", examples=[10000])
    layout: Literal["interleaved", "half_split"] = Field(
        description="which elements form a pair: (0, 1), (2, 3), ... or (0, n/2), (1, n/2 + 1), ..."
    )
    scaling: RopeScaling | None = Field(default=None, description="stretching to longer contexts; left out: none")


def _rope_tag(value: object) -> str:
    return "none" if isinstance(value, str) else "rope"


RopeOrNone = Annotated[
    Annotated[Rope, Tag("rope")] | Annotated[Literal["none"], Tag("none")],
    Discriminator(_rope_tag),
]
