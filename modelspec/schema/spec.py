"""The root of the language."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from modelspec.schema.base import AsTuple, Strict, Tensors
from modelspec.schema.data import Data
from modelspec.schema.model import Model
from modelspec.schema.parallelism import Parallelism
from modelspec.schema.precision import Precision
from modelspec.schema.training import Training
from modelspec.schema.waiver import Waiver


def _only_integers(value: Any) -> Any:
    """1.0 and true equal 1, and a Literal would take them."""
    return value if type(value) is int else str(value)


Version = Annotated[Literal[1], BeforeValidator(_only_integers)]


class ModelSpec(Strict):
    """One model: its architecture, and optionally precision, layout, recipe and data. Frozen."""

    spec_version: Version = Field(description="version of the language")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = Field(
        description="name of the model and of its runs", examples=["my-model"]
    )
    summary: Annotated[str, Field(max_length=1000)] | None = Field(default=None, description="one sentence for people")
    model: Model = Field(description="architecture")
    precision: Precision = Field(default=Precision(), description="number formats")
    parallelism: Parallelism = Field(default=Parallelism(), description="layout over devices")
    training: Training | None = Field(default=None, description="recipe; needed to train")
    data: Data | None = Field(default=None, description="text; needed to train")
    waivers: Annotated[tuple[Waiver, ...], AsTuple] = Field(
        default=(), description="breaking changes that this spec makes on purpose; never inherited"
    )

    def tensors(self) -> Tensors:
        """Every parameter and persistent buffer of the model, by name."""
        return self.model.tensors()
