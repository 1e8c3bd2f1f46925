"""How many parameters a spec stands for, read off its table of tensors.

Selection biases are buffers, but they are part of what a checkpoint of the model holds and count in the total.
"""

from dataclasses import dataclass
from typing import Final

from modelspec.plan.runs import main_tensors, mtp_tensors
from modelspec.schema import ModelSpec

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


def parameters(spec: ModelSpec) -> Parameters:
    """Exact counts, in integers; nothing is allocated."""
    main, mtp = list(main_tensors(spec.model)), list(mtp_tensors(spec.model))
    parts = dict.fromkeys((part for _, part in _PARTS), 0)
    for name, tensor, times in main:
        parts[next(part for piece, part in _PARTS if piece in name)] += times * tensor.numel
    return Parameters(
        total=sum(times * tensor.numel for _, tensor, times in main),
        active=sum(times * tensor.active for _, tensor, times in main),
        mtp=sum(times * tensor.numel for _, tensor, times in mtp),
        mtp_active=sum(times * tensor.active for _, tensor, times in mtp),
        parts={part: number for part, number in parts.items() if number},
    )
