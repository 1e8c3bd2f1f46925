"""What must hold between the figures of one device: relations that a slip of unit, direction or sparsity breaks.

And what a file names must be there: keys of its own, and calibrated software.
"""

from collections.abc import Iterator
from itertools import pairwise

from modelspec.checks.finding import Finding, did_you_mean
from modelspec.hardware.calibration import calibration
from modelspec.schema.base import Strict
from modelspec.schema.hardware import Hardware

# Formats that one kind of unit multiplies, the widest first. FP64 and FP32 may have units of their own.
_NARROWER = ("float32", "tf32", "bfloat16", "fp8")


def relations(hardware: Hardware) -> Iterator[Finding]:
    """Everything that contradicts itself."""
    yield from _rates(hardware)
    yield from _domains(hardware)
    yield from _bandwidths(hardware)
    yield from _sources(hardware)
    yield from _software(hardware)


def _rates(hardware: Hardware) -> Iterator[Finding]:
    if hardware.kind == "cpu":
        # Measured rates: a processor may have no unit for a narrow format and yet multiply in it.
        return
    rates = {name: rate for name in _NARROWER if (rate := getattr(hardware.peak_flops, name)) is not None}
    for wider, narrower in pairwise(rates):
        if rates[narrower] < rates[wider]:
            yield Finding(
                ("peak_flops", narrower),
                f"{narrower} multiplies at {rates[narrower]:.4g} FLOP/s, slower than {wider} at {rates[wider]:.4g}",
                "give both without sparsity, or leave out a format that the device has no unit for",
                code="MS701",
            )


def _domains(hardware: Hardware) -> Iterator[Finding]:
    domain, node = hardware.fast_domain, hardware.gpus_per_node
    if domain % node:
        below = max(domain // node, 1) * node
        yield Finding(
            ("fast_domain",),
            f"a fast domain of {domain} devices is not made of whole nodes of {node}",
            f"write {below} or {below + node}; it is `gpus_per_node` where nodes are joined by the network alone",
            code="MS702",
        )


def _bandwidths(hardware: Hardware) -> Iterator[Finding]:
    inside, outside = hardware.node_bandwidth, hardware.network_bandwidth
    if outside > inside:
        yield Finding(
            ("network_bandwidth",),
            f"the network at {outside:.4g} bytes/s is faster than the links inside the domain at {inside:.4g}",
            "both are of one device and one direction, in bytes: 400 Gbit/s are 50e9",
            code="MS703",
        )
    if inside > hardware.memory_bandwidth:
        yield Finding(
            ("node_bandwidth",),
            f"links at {inside:.4g} bytes/s are faster than memory at {hardware.memory_bandwidth:.4g}",
            "data sheets add up both directions: take half; and count bytes, not bits",
            code="MS703",
        )


def _sources(hardware: Hardware) -> Iterator[Finding]:
    known = [".".join(path) for path in figures(type(hardware))]
    for at, source in enumerate(hardware.sources):
        for index, field in enumerate(source.fields):
            if field not in known:
                yield Finding(
                    ("sources", at, "fields", index),
                    f"{field!r} is no figure of this file",
                    did_you_mean(field, known),
                    code="MS704",
                )


def _software(hardware: Hardware) -> Iterator[Finding]:
    known = calibration().stacks
    if hardware.stack is not None and hardware.stack not in known:
        yield Finding(
            ("stack",),
            f"no software of the name {hardware.stack!r} is calibrated",
            did_you_mean(hardware.stack, known),
            code="MS706",
        )


def figures(schema: type[Strict]) -> Iterator[tuple[str, ...]]:
    """The paths of what a source may speak of: every key but the texts, and `peak_flops` as a whole, too."""
    for name, field in schema.model_fields.items():
        if name in ("name", "summary", "kind", "sources", "stack", "price"):
            continue
        yield (name,)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Strict):
            yield from ((name, *path) for path in figures(field.annotation))
