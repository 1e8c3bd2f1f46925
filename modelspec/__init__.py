"""A model factory: YAML specs, checked to the last key and compiled into runnable, trainable PyTorch models.

    spec = modelspec.load("specs/deepseek-v3.yaml", overrides=["model.vocab_size=4096"])
    model = modelspec.build(spec, device="meta")

The public names are loaded when they are first used, so that `import modelspec` costs nothing, and what needs no
torch imports none.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelspec.builders.build import build
    from modelspec.builders.hf import from_pretrained, save_pretrained
    from modelspec.diagnostics import Diagnostic, SpecError
    from modelspec.diff import diff
    from modelspec.plan import plan
    from modelspec.schema import ModelSpec
    from modelspec.validate import load

__version__ = "0.1.0"
__all__ = [
    "Diagnostic",
    "ModelSpec",
    "SpecError",
    "build",
    "diff",
    "from_pretrained",
    "load",
    "plan",
    "save_pretrained",
]

_HOMES = {
    "Diagnostic": "modelspec.diagnostics",
    "ModelSpec": "modelspec.schema",
    "SpecError": "modelspec.diagnostics",
    "build": "modelspec.builders.build",
    "diff": "modelspec.diff",
    "from_pretrained": "modelspec.builders.hf",
    "load": "modelspec.validate",
    "plan": "modelspec.plan",
    "save_pretrained": "modelspec.builders.hf",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`plan` and `diff` are functions here and folders on disk: importing the folder must not hide the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
