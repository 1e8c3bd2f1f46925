"""How far real training stays behind a device's peaks: rates by kind of work, and how much slower a software is.

The kinds are those that `plan` counts. A rate is how many times longer work takes than at the peak that bounds it, so
1 is the peak itself; for transfers it is also the share that computation does not hide. All rates are those of the
reference: a stack's `slowdown` and a device's multiply them.
"""

from typing import Annotated

from pydantic import Field

from modelspec.schema.base import Positive, Strict

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$")]
Text = Annotated[str, Field(min_length=1, max_length=400)]


class Rates(Strict):
    """Times longer than ideal, by kind of work; of the last two seconds for each layer and pass."""

    fp8_products: Positive = Field(description="FP8 matrix products, against the peak rate of FP8; times")
    products: Positive = Field(description="other matrix products, against the peak rate of their format; times")
    expert_rows: Positive = Field(
        description="rows of one expert's product at which it takes twice as long as without end; rows"
    )
    attention: Positive = Field(description="the core of attention, against the peak rate of its format; times")
    residual: Positive = Field(
        description="norms, additions and casts: passes over the residual stream, at the memory's bandwidth; times"
    )
    heads: Positive = Field(
        description="rotation, layout and casts: passes over queries, keys, values and outputs; times"
    )
    experts: Positive = Field(
        description="permutation and activation: passes over the experts' inputs and outputs; times"
    )
    quantize: Positive = Field(description="passes that FP8 adds over what products read; times")
    layer: Positive = Field(description="launches, gaps and waiting in each layer and pass; seconds")
    moe_layer: Positive = Field(description="the same, in addition where there are experts; seconds")
    node: Positive = Field(description="exchange of tokens inside a node, as far as it is not hidden; times")
    network: Positive = Field(description="exchange of tokens between nodes, as far as it is not hidden; times")
    tensor: Positive = Field(description="exchange between ranks of tensor or context parallelism; times")
    data: Positive = Field(description="exchange of gradients and weights once per step; times")
    optimizer: Positive = Field(description="the update of the weights, at the memory's bandwidth; times")


class Stack(Strict):
    """A release of a training software, and how it compares."""

    software: Text = Field(description="name of the software")
    release: Text = Field(description="release or date that was measured")
    slowdown: Positive = Field(description="how many times longer everything takes than at the reference rates")
    experts: Positive = Field(
        description="how many times longer, in addition, what experts bring: small products, permutation, exchange"
    )
    rows: Annotated[int, Field(ge=0)] = Field(description="published rows that it was calibrated on")
    error: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="median error of a row predicted from all others; share. Left out: too few rows"
    )


class Calibration(Strict):
    """What the published rows say."""

    summary: Text = Field(description="where it comes from")
    rates: Rates = Field(description="the reference")
    stacks: dict[Name, Stack] = Field(min_length=1, description="software by name")
    devices: dict[Name, Positive] = Field(
        description="how many times longer computation takes on a device than its peaks and the rates say"
    )
