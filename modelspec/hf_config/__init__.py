"""config.json of Hugging Face <-> the `model:` of a spec. Pure data: no torch, nothing from a config is executed.

A family (`model_type`) is two functions: one reads a config into a `model:` map, one writes the config of a model.
Reading takes every key exactly once (`Keys`). Writing states what the family can say and reads it back: whatever part
of the spec does not survive that is what the family cannot say, and is named (`require_equal`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, assert_never, cast, get_args

from pydantic import ValidationError

from modelspec import schema
from modelspec.checks import check
from modelspec.hf_config import deepseek, glm, gpt_oss, llama, qwen3_next
from modelspec.hf_config.compare import require_equal
from modelspec.hf_config.keys import HFError, Keys, Unreadable, read_json, said
from modelspec.hf_config.origin import Steps, origins, without_tags
from modelspec.hf_config.quantization import Quantization, read_quantization, write_quantization

__all__ = [
    "Family",
    "HFError",
    "Quantization",
    "Reading",
    "Unreadable",
    "config_from_spec",
    "family_of",
    "read_config",
    "read_json",
    "spec_from_config",
    "spec_from_file",
]

Family = Literal[
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "glm4_moe",
    "gpt_oss",
    "llama",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
]
# Other names under which a family's architecture is published.
_ALIASES: Mapping[str, Family] = {"kimi_k2": "deepseek_v3"}


@dataclass(frozen=True, slots=True)
class Reading:
    """What a config.json says: a spec with `model` alone, and what is no part of a spec.

    `ignored` holds the keys that say nothing about the model's function, with their values; `quantization` how the
    weights are stored beside it, None if plainly.
    """

    spec: schema.ModelSpec
    family: Family
    ignored: Mapping[str, Any]
    quantization: Quantization | None


def read_config(config: Mapping[str, Any], name: str, file: str = "config.json") -> Reading:
    """What a config.json says, as a spec of this name.

    Raises HFError naming the file and the key; of a value that no spec may have also the place in the spec.
    """
    try:
        return _reading(config, name)
    except HFError as error:
        raise HFError(f"{file}: {error}") from None


def spec_from_config(config: Mapping[str, Any], name: str, file: str = "config.json") -> schema.ModelSpec:
    """The spec of a config.json: `model` filled, everything else left out. Raises HFError as `read_config` does."""
    return read_config(config, name, file).spec


def spec_from_file(path: Path, name: str) -> schema.ModelSpec:
    """The spec of the config.json in a file. Raises Unreadable where it is none, HFError where no spec can say it."""
    return spec_from_config(read_json(path), name, str(path))


def _reading(config: Mapping[str, Any], name: str) -> Reading:
    keys = Keys(config)
    family = _family(keys.take("model_type", None))
    quantization = read_quantization(keys)
    model = _read(family, keys)
    keys.finish()
    data = {"spec_version": 1, "name": name, "model": model}
    try:
        spec = schema.ModelSpec.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        message = f"{first['msg']}, not {said(first['input'])}"
        raise _invalid(config, family, [without_tags(data, first["loc"])], message) from None
    wrong = next((finding for finding in check(spec) if finding.severity == "error"), None)
    if wrong is not None:
        raise _invalid(config, family, [wrong.path, *(path for path, _ in wrong.related)], wrong.message)
    return Reading(spec, family, keys.ignored, quantization)


def _invalid(config: Mapping[str, Any], family: Family, paths: Sequence[Steps], message: str) -> HFError:
    """The error of values that a spec may not have, by their names in the config and the first one's in the spec."""

    def read(keys: Keys) -> dict[str, Any]:
        return {"model": _read(family, keys)}

    # First those of the value that is at fault, then those of what it depends on.
    keys = list(dict.fromkeys(key for path in paths for key in origins(config, read, path)))
    words = f"{' and '.join(keys)} make{'' if len(keys) > 1 else 's'}" if keys else "makes"
    return HFError(f"{words} no valid spec: {'.'.join(map(str, paths[0]))}: {message}")


def config_from_spec(
    spec: schema.ModelSpec,
    dtype: schema.Dtype,
    quantization: Quantization | None = None,
    *,
    with_mtp: bool = True,
) -> dict[str, Any]:
    """The config.json of a spec whose weights are stored in `dtype`, its matrices as `quantization` says.

    Without `with_mtp` it is that of the model without multi-token prediction. Raises HFError naming the part of the
    spec that the family cannot say.
    """
    model = spec.model if with_mtp else spec.model.model_copy(update={"mtp": None})
    family = family_of(model)
    config = _write(family, model) | {"dtype": dtype}
    require_equal(model, read_config(config, spec.name).spec.model, family)
    if quantization is not None:
        config["quantization_config"] = write_quantization(quantization)
    return config


def family_of(model: schema.Model) -> Family:
    """The family that a model is written as, by its structure alone.

    It is the one whose mechanisms are the model's; `config_from_spec` says whether it can say every detail.
    """
    layers = [*model.expanded_layers(), *([model.mtp_layer()] if model.mtp else [])]
    moe = next((ffn for layer in layers if isinstance(ffn := model.ffn[layer.ffn], schema.MoE)), None)
    attention = model.attention[layers[0].attention]
    match attention:
        case schema.MLA():
            if attention.indexer is not None:
                return "deepseek_v32"
            return "deepseek_v2" if moe and moe.router.score == "softmax" else "deepseek_v3"
        case schema.GQA():
            if attention.sinks:
                return "gpt_oss"
            if attention.output_gate:
                return "qwen3_next"
            if moe is not None:
                if moe.router.score == "sigmoid" or model.mtp is not None:
                    return "glm4_moe"
                return "mixtral" if attention.qk_norm is None else "qwen3_moe"
            if attention.qk_norm is not None:
                return "qwen3"
            return "qwen2" if set(attention.bias) == {"q", "k", "v"} else "llama"
        case schema.GatedDeltaNet():
            return "qwen3_next"
        case other:
            assert_never(other)


def _family(model_type: Any) -> Family:
    if model_type in get_args(Family):
        return cast(Family, model_type)
    if isinstance(model_type, str) and model_type in _ALIASES:
        return _ALIASES[model_type]
    supported = ", ".join(sorted([*get_args(Family), *_ALIASES]))
    raise HFError(f"model_type {said(model_type)} is not supported; supported: {supported}")


def _read(family: Family, keys: Keys) -> dict[str, Any]:
    match family:
        case "deepseek_v2":
            return deepseek.read_v2(keys)
        case "deepseek_v3":
            return deepseek.read_v3(keys)
        case "deepseek_v32":
            return deepseek.read_v32(keys)
        case "glm4_moe":
            return glm.read_glm4_moe(keys)
        case "gpt_oss":
            return gpt_oss.read_gpt_oss(keys)
        case "llama":
            return llama.read_llama(keys)
        case "mixtral":
            return llama.read_mixtral(keys)
        case "qwen2":
            return llama.read_qwen2(keys)
        case "qwen3":
            return llama.read_qwen3(keys)
        case "qwen3_moe":
            return llama.read_qwen3_moe(keys)
        case "qwen3_next":
            return qwen3_next.read_qwen3_next(keys)
        case other:
            assert_never(other)


def _write(family: Family, model: schema.Model) -> dict[str, Any]:
    match family:
        case "deepseek_v2":
            return deepseek.write_v2(model)
        case "deepseek_v3":
            return deepseek.write_v3(model)
        case "deepseek_v32":
            return deepseek.write_v32(model)
        case "glm4_moe":
            return glm.write_glm4_moe(model)
        case "gpt_oss":
            return gpt_oss.write_gpt_oss(model)
        case "llama":
            return llama.write_llama(model)
        case "mixtral":
            return llama.write_mixtral(model)
        case "qwen2":
            return llama.write_qwen2(model)
        case "qwen3":
            return llama.write_qwen3(model)
        case "qwen3_moe":
            return llama.write_qwen3_moe(model)
        case "qwen3_next":
            return qwen3_next.write_qwen3_next(model)
        case other:
            assert_never(other)
