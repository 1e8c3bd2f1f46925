"""A kind of device and the machine around it, as a plan needs to know it: what its vendor promises, never what it does.

All figures are of one device: what one process runs on. Rates are peaks without sparsity, bandwidths of one direction.
What software makes of them is the business of a stack.
"""

from typing import Annotated, Literal

from pydantic import Field

from modelspec.schema.base import AsInteger, AsTuple, Count, Strict

# Wide enough for a laptop and for what comes next, and narrow enough to find gigabytes written as bytes.
Bytes = Annotated[int, Field(ge=2**28, le=2**50), AsInteger]
BytesPerSecond = Annotated[float, Field(ge=1e6, le=1e15)]
FlopPerSecond = Annotated[float, Field(ge=1e8, le=1e18)]
# What a rack of the future may take and cost, and what is slower than any emulation: beyond is a slip.
Watts = Annotated[float, Field(gt=0, le=1e5)]
DollarsPerHour = Annotated[float, Field(ge=0, le=1e5)]
Slowdown = Annotated[float, Field(ge=0.01, le=1e4)]
Date = Annotated[str, Field(pattern=r"^20[0-9]{2}-(0[1-9]|1[0-2])(-(0[1-9]|[12][0-9]|3[01]))?$")]
Text = Annotated[str, Field(min_length=1, max_length=1000)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class PeakFlops(Strict):
    """Dense matrix products by the format of their operands; left out: the device has no unit for it."""

    float64: FlopPerSecond | None = Field(default=None, description="rate in FP64; FLOP/s")
    float32: FlopPerSecond = Field(description="rate in FP32 as it is by default, without TF32; FLOP/s")
    tf32: FlopPerSecond | None = Field(default=None, description="rate of FP32 operands rounded to TF32; FLOP/s")
    bfloat16: FlopPerSecond = Field(description="rate in BF16; FLOP/s")
    fp8: FlopPerSecond | None = Field(default=None, description="rate in FP8; FLOP/s")


class Price(Strict):
    """What one device costs for an hour, host and network included, as somebody says in public."""

    usd_per_hour: DollarsPerHour = Field(description="price of one device; US dollars per hour")
    source: Text = Field(description="who asks this price, and where that is written")
    date: Date = Field(description="when that was so, like 2026-08 or 2026-08-22")


class Reference(Strict):
    """Where figures come from."""

    fields: Annotated[tuple[str, ...], Field(min_length=1), AsTuple] = Field(
        description="keys of this file that it speaks of, like peak_flops.fp8"
    )
    text: Text = Field(description="title and address, and what has been derived from it")
    date: Date = Field(description="when it was published or read")


class Hardware(Strict):
    """One kind of device in the machine that it is sold in. Frozen."""

    name: Name = Field(description="what `--hardware` calls it", examples=["my-cluster"])
    summary: Text = Field(description="one sentence for people")
    vendor: Text = Field(description="who makes the device", examples=["NVIDIA"])
    kind: Literal["gpu", "cpu"] = Field(
        default="gpu", description="whose kernels run: those of a GPU, or those of a machine without one"
    )
    memory: Bytes = Field(description="memory that a program can use; bytes", examples=["80e9"])
    memory_bandwidth: BytesPerSecond = Field(description="between memory and processor; bytes/s")
    peak_flops: PeakFlops = Field(description="peak rates of dense matrix products, without sparsity")
    gpus_per_node: Count = Field(description="devices in one node, under one operating system", examples=[8])
    fast_domain: Count = Field(description="devices that reach one another at `node_bandwidth`", examples=[8])
    node_bandwidth: BytesPerSecond = Field(description="one device to others of its domain, one direction; bytes/s")
    network_bandwidth: BytesPerSecond = Field(description="one device to others outside, one direction; bytes/s")
    power: Watts = Field(description="power of one device at full load, without its host; watts")
    price: Price | None = Field(default=None, description="hourly price; left out: a plan has costs only by --price")
    stack: Name | None = Field(
        default=None, description="calibrated software that a plan takes where none is named; left out: none"
    )
    slowdown: Slowdown | None = Field(
        default=None,
        description="how many times longer computation takes than the rates of a stack say, as measured here; "
        "left out: as calibrated on published figures, or 1",
    )
    sources: Annotated[tuple[Reference, ...], AsTuple] = Field(default=(), description="where the figures come from")
