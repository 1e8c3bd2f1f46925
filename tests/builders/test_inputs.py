"""What a model refuses to take, in the caller's words, and where it does not look."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from modelspec.builders import build
from modelspec.builders.inputs import require_inputs
from modelspec.schema import ModelSpec

Tiny = Callable[..., ModelSpec]

TOKENS = torch.arange(6).view(2, 3)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS[0], r"tokens must be an int64 tensor \[batch, sequence\], got the shape \[3\]: tokens\[None\]"),
        (TOKENS[None], r"got the shape \[1, 2, 3\]: leave the other dims out"),
        (TOKENS.float(), r"got torch.float32: pass tokens.long\(\)"),
        (TOKENS.int(), r"got torch.int32: pass tokens.long\(\)"),
        (TOKENS.tolist(), r"got list: pass torch.tensor\(...\)"),
        (TOKENS + 56, r"tokens hold 61, and model.vocab_size is 61: ids are 0 to 60; is it the tokenizer"),
        (TOKENS - 1, r"tokens hold -1, .*ids are 0 to 60"),
        (torch.zeros(1, 257, dtype=torch.int64), r"tokens are 257 long and model.max_position is 256: pass a shorter"),
    ],
    ids=["one-dim", "three-dims", "floats", "int32", "list", "above", "below", "long"],
)
def test_tokens_that_the_model_cannot_take_are_a_clear_error(tokens: Any, message: str, tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=message):
        build(tiny())(tokens)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            TOKENS[:, :2],
            r"targets \[2, 2\] must have the shape of tokens, \[2, 3\]: targets\[b, t\] is the token after",
        ),
        (TOKENS[0], r"targets must be an int64 tensor \[batch, sequence\], got the shape \[3\]"),
        (TOKENS + 56, r"targets hold 61, .*ids are 0 to 60, or -100 for none"),
        (TOKENS - 1, r"targets hold -1, "),
    ],
    ids=["shape", "one-dim", "above", "below"],
)
def test_targets_that_the_model_cannot_take_are_a_clear_error(targets: Any, message: str, tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=message):
        build(tiny())(TOKENS, targets=targets)


def test_the_longest_window_every_id_and_ignored_targets_are_taken(tiny: Tiny) -> None:
    model = build(tiny(model={"max_position": 61}))
    tokens = torch.arange(61)[None]
    assert model(tokens).logits.isfinite().all()
    assert model(tokens, targets=torch.full_like(tokens, -100)).loss == 0


def test_ids_are_not_read_where_that_costs_or_cannot_be_done(tiny: Tiny) -> None:
    model = tiny().model
    foreign = TOKENS + 1000
    require_inputs(foreign.to("meta"), None, model)
    with FakeTensorMode() as mode:
        require_inputs(mode.from_tensor(foreign), None, model)
    torch.compile(require_inputs, fullgraph=True, backend="eager")(foreign, foreign, model)
    with pytest.raises(ValueError, match="tokens hold 1000"):
        require_inputs(foreign, None, model)
