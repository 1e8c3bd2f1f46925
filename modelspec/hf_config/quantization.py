"""quantization_config: how a checkpoint's weights are stored. It says nothing about the model itself.

One form is read and written, DeepSeek's: matrices in FP8 (e4m3), and beside each the factors that its blocks are
multiplied by (arXiv 2412.19437, section 3.3).
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

from modelspec.hf_config.keys import HFError, Keys, said

ScaleFormat = Literal["float", "ue8m0"]


@dataclass(frozen=True, slots=True)
class Quantization:
    """FP8 weights with one scale for each block of so many rows and columns.

    `scale_fmt` ue8m0 says that the scales are powers of two. Modules named in `modules_to_not_convert` keep their
    dtype, beside what never is in FP8: embedding, head, norms, router.
    """

    weight_block_size: tuple[int, int] = (128, 128)
    scale_fmt: ScaleFormat = "float"
    modules_to_not_convert: tuple[str, ...] = ()


def read_quantization(keys: Keys) -> Quantization | None:
    """How the weights are stored; None for plain ones. Raises HFError for any other way."""
    values = keys.take("quantization_config", None)
    if values is None:
        return None
    if not isinstance(values, dict):
        raise keys.wrong("quantization_config", "must be an object")
    mine = Keys(values, "quantization_config.")
    method = mine.take("quant_method")
    if method != "fp8":
        raise HFError(
            f"quantization_config.quant_method is {said(method)}; only fp8 with a scale per block is "
            "supported. Convert the weights to bfloat16 first, with the program that made them or with transformers"
        )
    mine.expect("fmt", "e4m3")
    mine.expect("activation_scheme", "dynamic")
    mine.expect("dequantize", False)
    mine.expect("expert_dtype", "fp8")
    mine.expect("modules_to_convert", [])
    block = mine.take("weight_block_size")
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise mine.wrong("weight_block_size", f"is {said(block)}; it must be two whole numbers above 0")
    kept = mine.take("modules_to_not_convert", mine.take("ignored_layers", []))
    if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
        raise mine.wrong("modules_to_not_convert", "must be a list of names")
    fmt = mine.choice("scale_fmt", ("float", "ue8m0"), "float")
    mine.finish()
    return Quantization((block[0], block[1]), cast(ScaleFormat, fmt), tuple(kept))


def write_quantization(quantization: Quantization) -> dict[str, Any]:
    """The quantization_config of a checkpoint."""
    result: dict[str, Any] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(quantization.weight_block_size),
    }
    if quantization.scale_fmt != "float":
        result["scale_fmt"] = quantization.scale_fmt
    if quantization.modules_to_not_convert:
        result["modules_to_not_convert"] = list(quantization.modules_to_not_convert)
    return result
