"""Relations between number formats and the model. One check is one function; its docstring says what must hold."""

from collections.abc import Iterator
from typing import Final

from modelspec.checks.finding import Finding
from modelspec.checks.model import layer_names_exist
from modelspec.layout import attention_of, tensor_cut
from modelspec.schema import ModelSpec, TensorSpec, fp8_weights, in_fp8

Findings = Iterator[Finding]

_BLOCKS: Final = {"activation_block": (1, 128), "weight_block": (128, 128)}
# What whole blocks may add to the work before it is worth a word.
_ADDED: Final = 0.05
_SHOWN: Final = 4


def fp8_blocks_have_kernels(spec: ModelSpec) -> Findings:
    """FP8 blocks are those that kernels exist for: 1 x 128 in activations, 128 x 128 in weights."""
    if spec.precision.fp8 is None or not _has_tensors(spec):
        return
    for key, block in _BLOCKS.items():
        has = getattr(spec.precision.fp8, key)
        if has != block:
            yield Finding(
                ("precision", "fp8", key),
                f"there are no kernels for blocks of {has[0]} x {has[1]}; {fp8_weights(spec.tensors())} would need "
                "them, so that building or training the model is refused",
                f"only {block[0]} x {block[1]} is computed; weights with other blocks can be imported with a dtype",
                severity="warning",
            )


def _has_tensors(spec: ModelSpec) -> bool:
    # Layers of unknown variants have none, and another check tells them.
    return not any(layer_names_exist(spec))


def fp8_products_are_not_fp64(spec: ModelSpec) -> Findings:
    """FP8 products give BF16 or FP32: a model with `precision.fp8` does not compute in FP64."""
    if spec.precision.fp8 is not None and spec.precision.compute == "float64":
        which = fp8_weights(spec.tensors()) if _has_tensors(spec) else "linear layers and experts"
        yield Finding(
            ("precision", "compute"),
            f"FP8 products give BF16 or FP32, not FP64, in {which}",
            "legal values: bfloat16, float32; or set precision.fp8=null",
            ((("precision", "fp8"), "FP8 products"),),
        )


def fp8_blocks_are_filled(spec: ModelSpec) -> Findings:
    """The sides of weights in FP8, on each tensor rank, are about multiples of the blocks, which are computed whole."""
    fp8, ranks = spec.precision.fp8, spec.parallelism.tensor
    if fp8 is None or not _has_tensors(spec):
        return
    done = padded = 0.0
    worst: dict[str, tuple[float, str]] = {}
    for name, tensor in spec.tensors().items():
        if in_fp8(name):
            rows, columns = _local(spec, name, tensor)
            whole = _up(rows, fp8.weight_block[0]) * _up(columns, fp8.weight_block[1])
            times = _per_token(tensor, ranks)
            done, padded = done + times * rows * columns, padded + times * whole
            kind = name.removesuffix(".weight").rpartition(".")[2]
            worst[f"{kind} ({rows} x {columns})"] = (whole / rows / columns - 1, kind)
    if not done or padded / done - 1 < _ADDED:
        return
    off = sorted(((added, text) for text, (added, _) in worst.items() if added), reverse=True)
    more = f" and {len(off) - _SHOWN} more" if len(off) > _SHOWN else ""
    named = ", ".join(f"{text} +{added:.0%}" for added, text in off[:_SHOWN])
    block = f"{fp8.weight_block[0]} x {fp8.weight_block[1]}"
    where = f" on each of {ranks} tensor ranks" if ranks > 1 else ""
    yield Finding(
        ("precision", "fp8", "weight_block"),
        f"blocks of {block} that are part empty add {padded / done - 1:.0%} to the work in FP8{where}: {named}{more}; "
        "the numbers are right, and whole blocks are computed",
        "sides that are multiples of 128 fill them" + (f", where ranks cut them of {128 * ranks}" if ranks > 1 else ""),
        ((("parallelism", "tensor"), f"tensor {ranks}"),) if ranks > 1 else (),
        severity="info",
    )


def _local(spec: ModelSpec, name: str, tensor: TensorSpec) -> tuple[int, int]:
    """Rows and columns of a weight, or of each expert's, on one tensor rank."""
    sides, ranks = list(tensor.shape[-2:]), spec.parallelism.tensor
    cut = tensor_cut(name, ranks, attention_of(name, spec.model)) if ranks > 1 else None
    if cut is not None:
        sides[cut] = -(-sides[cut] // ranks)
    return sides[0], sides[1]


def _up(size: int, block: int) -> int:
    return -(-size // block) * block


def _per_token(tensor: TensorSpec, ranks: int) -> float:
    """How many of a tensor's matrices a token is multiplied with on a tensor rank, which routes its share of tokens."""
    return 1.0 if tensor.experts_per_token is None else tensor.experts_per_token / ranks
