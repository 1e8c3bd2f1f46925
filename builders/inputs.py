"""What a forward pass takes: a mistake is told in the caller's words, not by the operation that trips over it.

Kinds and shapes are always checked. Ids are read only where that costs nothing: from a plain tensor in the CPU's own
memory. Elsewhere it would wait for the device, or break a graph that is being compiled.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from modelspec import schema
from modelspec.kernels.linear_cross_entropy import IGNORE


class Window(NamedTuple):
    """Ids of a microbatch, int64 [batch, sequence], and the position of each place in its window, [sequence].

    `ahead` has for each depth of multi-token prediction the tokens and the targets that are so many places further on.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor | None = None
    ahead: tuple[tuple[Tensor, Tensor], ...] = ()


def whole_window(tokens: Tensor, targets: Tensor | None, depth: int) -> Window:
    """All that a forward pass reads of whole windows; targets without a token are IGNORE."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    if targets is None:
        return Window(tokens, positions)
    ahead = tuple((roll_tokens(tokens, by), roll_targets(targets, by)) for by in range(1, depth + 1))
    return Window(tokens, positions, targets, ahead)


def roll_tokens(tokens: Tensor, by: int) -> Tensor:
    """The token `by` places on, [batch, sequence]; the window's tail wraps and must be masked."""
    return tokens.roll(-by, dims=1)


def roll_targets(targets: Tensor, by: int) -> Tensor:
    """The target `by` places on, [batch, sequence], IGNORE where the window has none."""
    rolled = targets.roll(-by, dims=1)
    rolled[:, max(targets.shape[1] - by, 0) :] = IGNORE
    return rolled


def require_inputs(tokens: Tensor, targets: Tensor | None, model: schema.Model) -> None:
    """Raises ValueError for tokens or targets that the model cannot take."""
    _require_kind("tokens", tokens)
    if tokens.shape[1] > model.max_position:
        raise ValueError(
            f"tokens are {tokens.shape[1]:,} long and model.max_position is {model.max_position:,}: "
            "pass a shorter window, or set a larger model.max_position"
        )
    _require_ids("tokens", tokens, model.vocab_size)
    if targets is None:
        return
    _require_kind("targets", targets)
    if targets.shape != tokens.shape:
        raise ValueError(
            f"targets {list(targets.shape)} must have the shape of tokens, {list(tokens.shape)}: "
            "targets[b, t] is the token after tokens[b, t]"
        )
    _require_ids("targets", targets, model.vocab_size, ignored=IGNORE)


def _require_kind(name: str, ids: Tensor) -> None:
    contract = f"{name} must be an int64 tensor [batch, sequence]"
    if not isinstance(ids, Tensor):
        raise ValueError(f"{contract}, got {type(ids).__name__}: pass torch.tensor(...)")
    if ids.ndim != 2:
        remedy = f"{name}[None] is a batch of one" if ids.ndim == 1 else "leave the other dims out"
        raise ValueError(f"{contract}, got the shape {list(ids.shape)}: {remedy}")
    if ids.dtype != torch.int64:
        raise ValueError(f"{contract}, got {ids.dtype}: pass {name}.long()")


def _require_ids(name: str, ids: Tensor, vocab_size: int, ignored: int | None = None) -> None:
    if not _is_at_hand(ids):
        return
    foreign = ids[(ids < 0) | (ids >= vocab_size)]
    if ignored is not None:
        foreign = foreign[foreign != ignored]
    if foreign.numel():
        also = "" if ignored is None else f", or {ignored} for none"
        raise ValueError(
            f"{name} hold {int(foreign[0])}, and model.vocab_size is {vocab_size:,}: "
            f"ids are 0 to {vocab_size - 1}{also}; is it the tokenizer of this model?"
        )


def _is_at_hand(ids: Tensor) -> bool:
    """Whether reading values is free: not while compiling, of a tensor without values, or from another device."""
    return not torch.compiler.is_compiling() and type(ids) is Tensor and ids.device.type == "cpu"
