"""How many parameters a spec stands for, read off its table of tensors.

Selection biases are buffers, but they are part of what a checkpoint of the model holds and count in the total.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from modelspec.schema import ModelSpec, TensorSpec

# The part of the model that a tensor belongs to, by a piece of its name; the first that fits.
_PARTS: Final = (
    ("embed_tokens.", "embedding"),
    ("lm_head.", "head"),
    (".experts.", "routed_experts"),
    (".shared_experts.", "shared_experts"),
    (".shared_gate.", "shared_experts"),
    (".router.selection_bias", "selection_biases"),
    (".router.", "routers"),
    ("norm.weight", "norms"),
    (".attention.", "attention"),
    (".ffn.", "dense_ffn"),
)


@dataclass(frozen=True, slots=True)
class Parameters:
    """Counts of elements.

    `total` is the main model without multi-token prediction. `active` are those that take part in the computation for
    one token, embedding and head included. `mtp` is what multi-token prediction adds, without the shared embedding and
    head. `parts` splits `total`; norms over latents count as norms.
    """

    total: int
    active: int
    mtp: int
    mtp_active: int
    parts: dict[str, int]


def _numel(tensors: Iterable[TensorSpec]) -> int:
    return sum(tensor.numel for tensor in tensors)


def parameters(spec: ModelSpec) -> Parameters:
    """Exact counts, in integers; nothing is allocated."""
    main, mtp = spec.model.main_tensors(), spec.model.mtp_tensors()
    parts = dict.fromkeys((part for _, part in _PARTS), 0)
    for name, tensor in main.items():
        parts[next(part for piece, part in _PARTS if piece in name)] += tensor.numel
    return Parameters(
        total=_numel(main.values()),
        active=sum(tensor.active for tensor in main.values()),
        mtp=_numel(mtp.values()),
        mtp_active=sum(tensor.active for tensor in mtp.values()),
        parts={part: number for part, number in parts.items() if number},
    )
