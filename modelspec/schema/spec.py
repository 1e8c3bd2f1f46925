"""The root of the language."""

from typing import Annotated, Literal

from pydantic import Field

from modelspec.schema.base import Strict, Tensors
from modelspec.schema.data import Data
from modelspec.schema.model import Model
from modelspec.schema.parallelism import Parallelism
from modelspec.schema.precision import Precision
from modelspec.schema.training import Training


class ModelSpec(Strict):
    """One model: its architecture, and optionally precision, layout, recipe and data. Frozen."""

    spec_version: Literal[1] = Field(description="version of the language")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = Field(
        description="name of the model and of its runs"
    )
    summary: Annotated[str, Field(max_length=1000)] | None = Field(default=None, description="one sentence for people")
    model: Model = Field(description="architecture")
    precision: Precision = Field(default=Precision(), description="number formats")
    parallelism: Parallelism = Field(default=Parallelism(), description="layout over devices")
    training: Training | None = Field(default=None, description="recipe; needed to train")
    data: Data | None = Field(default=None, description="text; needed to train")

    def tensors(self) -> Tensors:
        """Every parameter and persistent buffer of the model, by name."""
        return self.model.tensors()
