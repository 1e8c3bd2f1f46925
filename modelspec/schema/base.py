"""What every part of the language is made of: strict, frozen classes whose fields explain themselves.

A schema class is both the grammar of one map in a spec and the truth about the tensors that this map stands for.
`tensors()` returns that truth as a table from parameter name to `TensorSpec`. The parameter count, checkpoint
comparison, Hugging Face inventory and memory model all read this one table, and a test holds it equal to the
model that the builders make.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.config import JsonDict

# A description ends its first sentence with the unit, behind a semicolon.
UNITS = (
    "elements",
    "tokens",
    "turns",
    "sequences",
    "optimizer steps",
    "bytes",
    "bytes/s",
    "FLOP/s",
    "watts",
    "no unit",
)


def unit_of(description: str) -> str | None:
    """The unit that a field's description states; None where it measures nothing."""
    last = description.partition(". ")[0].rpartition("; ")[2]
    return last if last in UNITS else None


class Strict(BaseModel):
    """Base of every map in a spec: unknown keys, silent coercions, NaN and infinity are errors; values are frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


Dtype = Literal["float64", "float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a model: its shape and what becomes of it.

    `dtype` None means that it follows the spec's `precision`. `experts_per_token` is set on stacked expert weights,
    whose first dim counts experts: of these, one token uses so many. `initial` says where values begin: `normal` as
    `init` has it, the same for all, or `log_of_uniform`, the logarithm of a number drawn evenly from 0.01 to 16. Weight
    decay falls on what begins as `normal`.
    """

    shape: tuple[int, ...]
    kind: Literal["parameter", "buffer"] = "parameter"
    dtype: Dtype | None = None
    experts_per_token: int | None = None
    initial: Literal["normal", "ones", "zeros", "log_of_uniform"] = "normal"

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def active(self) -> int:
        """Number of elements that take part in the computation for one token."""
        if self.experts_per_token is None:
            return self.numel
        return self.experts_per_token * prod(self.shape[1:])


Tensors = dict[str, TensorSpec]


def is_learnt(name: str) -> bool:
    """Whether a parameter of this name gets a gradient: the indexer's choice of keys passes none on."""
    return ".indexer." not in name


def under(prefix: str, tensors: Mapping[str, TensorSpec]) -> Tensors:
    """The same table, each name placed below `prefix`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def linear(outputs: int, inputs: int, bias: bool = False) -> Tensors:
    """The table of a projection: a weight of shape [outputs, inputs], and a bias [outputs] if it has one."""
    table = {"weight": TensorSpec((outputs, inputs))}
    if bias:
        table["bias"] = TensorSpec((outputs,), initial="zeros")
    return table


def _tuple_from_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _integer_from_integral_float(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _sorted_set(value: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(value)) < len(value):
        raise ValueError("a projection stands twice")
    return tuple(sorted(value))


def _distinct(value: tuple[str, ...]) -> tuple[str, ...]:
    if twice := [each for at, each in enumerate(value) if each in value[:at]]:
        raise ValueError(f"{twice[0]} stands twice")
    return value


# YAML gives lists; a frozen spec keeps tuples.
AsTuple = BeforeValidator(_tuple_from_list)
# A list whose order means nothing, and where nothing stands twice.
AsSet = AfterValidator(_sorted_set)
# A list whose order stays, and where nothing stands twice.
Distinct = AfterValidator(_distinct)
UNIQUE: JsonDict = {"uniqueItems": True}
# Token counts are written as 14.8e12, which YAML reads as a float; an integral one is the integer it says.
AsInteger = BeforeValidator(_integer_from_integral_float)

# The bounds are far above any model that exists. They keep arithmetic exact and refuse absurd sizes before anything
# is counted or allocated.
Width = Annotated[int, Field(ge=1, le=2**22)]
Count = Annotated[int, Field(ge=1, le=2**20)]
Position = Annotated[int, Field(ge=1, le=2**40)]
TokenCount = Annotated[int, Field(ge=1, le=10**18), AsInteger]
StepCount = Annotated[int, Field(ge=1, le=10**12), AsInteger]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
VariantName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
