"""What a checkpoint's tensors take on disk, exactly, in each form that weights are written in.

Ours: weights in `precision.master_weights`, selection biases in FP32 at least, and beside them two moments and a step
count for every parameter that the optimizer updates; an indexer gets no gradient and has none. Hugging Face's: BF16, or
projections in FP8 with an FP32 scale for every block; selection biases in FP32; embedding and head a second time for
each module of multi-token prediction. Headers and text files come on top.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from modelspec.hf_config import HFError, config_from_spec, family_of
from modelspec.plan.runs import Counted, main_tensors, mtp_tensors
from modelspec.schema import Dtype, ModelSpec

ITEM_BYTES: Final[Mapping[Dtype, int]] = MappingProxyType({"float64": 8, "float32": 4, "bfloat16": 2})
# Rows and columns that share a scale, as export writes them.
_BLOCK: Final = (128, 128)


@dataclass(frozen=True, slots=True)
class CheckpointBytes:
    """Bytes of tensors: of our `weights` and `optimizer`, and of Hugging Face's files, multi-token prediction included.

    None where no family of Hugging Face has the model.
    """

    weights: int
    optimizer: int
    hugging_face_bf16: int | None
    hugging_face_fp8: int | None


def checkpoint_bytes(spec: ModelSpec) -> CheckpointBytes:
    """Every form of a checkpoint of a spec."""
    tensors = [*main_tensors(spec.model), *mtp_tensors(spec.model)]
    family = _family(spec)
    return CheckpointBytes(
        weights=sum(each.times * _ours(spec, each) for each in tensors),
        optimizer=sum(each.times * _moments(spec, each) for each in tensors),
        hugging_face_bf16=None if family is None else _duplicates(spec) + sum(map(bf16_bytes, tensors)),
        hugging_face_fp8=None if family is None else _duplicates(spec) + sum(_fp8(each, family) for each in tensors),
    )


def _family(spec: ModelSpec) -> str | None:
    try:
        config_from_spec(spec, "bfloat16")
    except HFError:
        return None
    return family_of(spec.model)


def _ours(spec: ModelSpec, each: Counted) -> int:
    item = ITEM_BYTES[spec.precision.master_weights]
    return each.tensor.numel * (item if each.tensor.kind == "parameter" else max(item, ITEM_BYTES["float32"]))


def _moments(spec: ModelSpec, each: Counted) -> int:
    if each.tensor.kind == "buffer" or ".indexer." in each.name:
        return 0
    return 2 * each.tensor.numel * ITEM_BYTES[spec.precision.optimizer_states] + ITEM_BYTES["float32"]


def bf16_bytes(each: Counted) -> int:
    """Bytes of all layers of a tensor in BF16; selection biases stay in FP32."""
    return each.times * each.tensor.numel * ITEM_BYTES["bfloat16" if each.tensor.kind == "parameter" else "float32"]


def fp8_bytes(each: Counted) -> int:
    """Bytes of all layers of a tensor where projections are in FP8 with an FP32 scale for every block."""
    if not in_fp8(each.name):
        return bf16_bytes(each)
    *stacked, rows, columns = each.tensor.shape
    # Gate and up are matrices of their own in the files.
    parts = 2 if each.name.endswith(".gate_up_proj") else 1
    matrices = parts * (stacked[0] if stacked else 1)
    blocks = -(-rows // parts // _BLOCK[0]) * -(-columns // _BLOCK[1])
    return each.times * (each.tensor.numel + matrices * blocks * ITEM_BYTES["float32"])


def in_fp8(name: str) -> bool:
    """Whether a tensor is one of those that FP8 is for: projections of attention and networks, and experts."""
    inner = ".attention." in name or ".ffn." in name
    projection = name.endswith("_proj.weight") and not name.endswith(".weights_proj.weight")
    return inner and (projection or _experts(name))


def _experts(name: str) -> bool:
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def _fp8(each: Counted, family: str) -> int:
    """As Hugging Face has it: one family keeps its experts in BF16."""
    return bf16_bytes(each) if family == "gpt_oss" and _experts(each.name) else fp8_bytes(each)


def _duplicates(spec: ModelSpec) -> int:
    """Embedding and head, again for each module of multi-token prediction, in BF16."""
    depth = spec.model.mtp.depth if spec.model.mtp else 0
    return depth * 2 * spec.model.vocab_size * spec.model.hidden_size * ITEM_BYTES["bfloat16"]
