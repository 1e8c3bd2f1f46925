"""The compiler: a spec becomes a runnable PyTorch model.

`build` makes the model; beside it stand what trains, saves, converts and samples from it, each in a module of its own.
"""

from modelspec.builders.build import DTYPES, BuildError, build
from modelspec.builders.model import Losses, LossWeights, Output, Transformer

__all__ = ["DTYPES", "BuildError", "LossWeights", "Losses", "Output", "Transformer", "build"]
