"""Triton, where there is Triton: it exists for Linux alone, and everything else of this package runs without it.

    from modelspec.kernels.triton_language import HAS_TRITON, tl, triton

Without it, kernels are plain Python functions that nobody may launch.
"""

from typing import Any

try:
    import triton as _triton
    import triton.language as _language

    HAS_TRITON = True
except ImportError:  # pragma: no cover - Linux always has it

    class _Absent:
        """Stands for a module: its decorators return what they decorate, and everything else is itself."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, value: Any = None, **_: Any) -> Any:
            return self if value is None else value

    _triton = _language = _Absent()
    HAS_TRITON = False

# Kernels are written in Triton's own language, which no type checker knows.
triton: Any = _triton
tl: Any = _language
