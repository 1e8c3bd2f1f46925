"""Changes that a spec makes on purpose, so that a check for breaking ones lets them pass."""

from typing import Annotated, Literal

from pydantic import Field

from modelspec.schema.base import Strict


class Waiver(Strict):
    """One kind of change from the spec before that `diff --breaking` does not count, and why."""

    rule: Literal["checkpoint-breaking"] = Field(description="class of the change")
    path: Annotated[str, Field(min_length=1, max_length=200)] = Field(
        description="keys that may change, like model.vocab_size; * stands for any text", examples=["model.ffn.*"]
    )
    reason: Annotated[str, Field(pattern=r"\S", max_length=1000)] = Field(description="why, for the reader")
