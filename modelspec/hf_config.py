"""config.json of Hugging Face <-> the `model:` of a spec. Pure data: no torch, nothing from a config is executed.

A family (`model_type`) is two functions: one reads a config into a `model:` map, one writes the config of a model.
Reading takes every key exactly once: a key that nobody takes and that is not known to be harmless is an error, because
it may change what the model computes. Writing states what the family can say and reads it back: whatever part of the
spec does not survive that is what the family cannot say, and is named.
"""

import json
from collections.abc import Iterable, Mapping
from math import isclose, log
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from modelspec import schema
from modelspec.checks import check

MAX_JSON_BYTES = 64 * 2**20

# Keys that say nothing about the function of the network: files, generation, bookkeeping, other programs' settings.
IGNORED = frozenset(
    {
        *("_name_or_path", "architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version"),
        *("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id", "use_cache"),
        *("chunk_size_feed_forward", "id2label", "is_encoder_decoder", "label2id", "output_attentions"),
        *("output_hidden_states", "output_router_logits", "problem_type", "return_dict"),
        *("aux_loss_alpha", "ep_size", "pretraining_tp", "seq_aux"),
        # Follow from other keys.
        *("head_dim", "qk_head_dim"),
    }
)


class HFError(Exception):
    """A Hugging Face directory, or a spec on its way to one, says what cannot be carried over."""

    exit_code = 1


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file: bounded in size, no NaN, no duplicate keys. Raises HFError."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise HFError(f"{path}: larger than {MAX_JSON_BYTES:,} bytes")
        value = json.loads(path.read_bytes(), parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise HFError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise HFError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise HFError(f"{path}: not a JSON object")
    return value


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not a number in JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return result


def spec_from_config(config: Mapping[str, Any], name: str) -> schema.ModelSpec:
    """The spec of a config.json: `model` filled, everything else left out. Raises HFError."""
    keys = _Keys(config)
    match config.get("model_type"):
        case "deepseek_v3":
            model = _read_deepseek_v3(keys)
        case other:
            raise HFError(f"config.json: model_type {other!r} is not supported; supported: deepseek_v3")
    keys.finish()
    try:
        spec = schema.ModelSpec.model_validate({"spec_version": 1, "name": name, "model": model})
    except ValidationError as error:
        first = error.errors()[0]
        raise HFError(f"config.json makes no valid spec: {_dotted(first['loc'])}: {first['msg']}") from None
    wrong = next((finding for finding in check(spec) if finding.severity == "error"), None)
    if wrong is not None:
        raise HFError(f"config.json makes no valid spec: {_dotted(wrong.path)}: {wrong.message}")
    return spec


def _dotted(path: Iterable[str | int]) -> str:
    return ".".join(map(str, path))


def config_from_spec(spec: schema.ModelSpec, dtype: schema.Dtype) -> dict[str, Any]:
    """The config.json of a spec whose weights are stored in `dtype`. Raises HFError naming what it cannot say."""
    config = _write_deepseek_v3(spec.model) | {"dtype": dtype}
    _require_equal(spec.model, spec_from_config(config, spec.name).model, "deepseek_v3")
    return config


_REQUIRED = object()


class _Keys:
    """The keys of a map, taken one by one; null counts as absent."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self.where = where
        self.rest = {key: value for key, value in values.items() if value is not None}

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of a key. Raises HFError if it has neither value nor default."""
        value = self.rest.pop(key, default)
        if value is _REQUIRED:
            raise HFError(f"config.json: {self.where}{key} is missing")
        return value

    def integer(self, key: str, default: Any = _REQUIRED) -> int:
        """A whole number that the layout of layers is computed from."""
        value = self.take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= schema.MAX_LAYERS:
            raise HFError(f"config.json: {self.where}{key} must be a whole number, 0 to {schema.MAX_LAYERS}")
        return value

    def expect(self, key: str, only: Any) -> None:
        """A key that may only have one value here."""
        value = self.take(key, only)
        if value != only:
            raise HFError(f"config.json: {self.where}{key} is {value!r}; only {only!r} is supported")

    def refuse(self, key: str, reason: str) -> None:
        """A key that may not stand here."""
        if key in self.rest:
            raise HFError(f"config.json: {self.where}{key}: {reason}")

    def finish(self) -> None:
        """Raises HFError if a key is left that may mean something."""
        unknown = sorted(self.rest.keys() - IGNORED)
        if unknown:
            raise HFError(
                f"config.json: {', '.join(self.where + key for key in unknown)}: not known, and may change what the "
                "model computes; remove it from the file if it does not"
            )


def _read_deepseek_v3(keys: _Keys) -> dict[str, Any]:
    keys.refuse("quantization_config", "quantised weights are not supported; convert them to bfloat16 first")
    heads = keys.take("num_attention_heads")
    for key, only in {
        "num_key_value_heads": heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    }.items():
        keys.expect(key, only)

    layers, depth = keys.integer("num_hidden_layers"), keys.integer("num_nextn_predict_layers", 0)
    dense = min(keys.integer("first_k_dense_replace"), layers)
    runs = [
        {"repeat": repeat, "attention": "mla", "ffn": ffn}
        for ffn, repeat in (("dense", dense), ("moe", layers - dense))
        if repeat
    ]
    # Sizes of a kind that no layer has are not asked for, and do no harm.
    ffn = {}
    if dense:
        ffn["dense"] = {
            "type": "dense",
            "intermediate_size": keys.take("intermediate_size"),
            "activation": {"type": "swiglu"},
        }
    if dense < layers or depth:
        ffn["moe"] = _read_moe(keys)
    for key in ("intermediate_size", *_MOE_KEYS):
        keys.take(key, None)

    max_position = keys.take("max_position_embeddings")
    model: dict[str, Any] = {
        "vocab_size": keys.take("vocab_size"),
        "hidden_size": keys.take("hidden_size"),
        "max_position": max_position,
        "tie_embeddings": keys.take("tie_word_embeddings", False),
        "init": {"std": keys.take("initializer_range", 0.02)},
        "norm": {"type": "rmsnorm", "eps": keys.take("rms_norm_eps")},
        "attention": {
            "mla": {
                "type": "mla",
                "num_heads": heads,
                "q_lora_rank": keys.take("q_lora_rank", None),
                "kv_lora_rank": keys.take("kv_lora_rank"),
                "qk_nope_head_dim": keys.take("qk_nope_head_dim"),
                "qk_rope_head_dim": keys.take("qk_rope_head_dim"),
                "v_head_dim": keys.take("v_head_dim"),
                # The family's code leaves these norms at their own default, whatever rms_norm_eps is.
                "latent_norm_eps": 1e-6,
                "rope": _read_rope(keys, max_position)
                | {"layout": "interleaved" if keys.take("rope_interleave", True) else "half_split"},
            }
        },
        "ffn": ffn,
        "layers": runs,
    }
    if depth:
        model["mtp"] = {"depth": depth} | ({"layer": {"attention": "mla", "ffn": "moe"}} if dense == layers else {})
    return model


_MOE_KEYS = (
    *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts"),
    *("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor"),
)


def _read_moe(keys: _Keys) -> dict[str, Any]:
    groups = {"num": keys.take("n_group"), "topk": keys.take("topk_group"), "score": "top2_sum"}
    shared = keys.take("n_shared_experts")
    return {
        "type": "moe",
        "num_experts": keys.take("n_routed_experts"),
        "num_experts_per_tok": keys.take("num_experts_per_tok"),
        "intermediate_size": keys.take("moe_intermediate_size"),
        "activation": {"type": "swiglu"},
        "shared_experts": {"num": shared} if shared else None,
        "router": {
            "score": "sigmoid",
            "selection": {"type": "topk", "bias": True, "groups": groups if groups["num"] != 1 else None},
            "renormalize": keys.take("norm_topk_prob"),
            "scale": keys.take("routed_scaling_factor"),
        },
    }


def _write_deepseek_v3(model: schema.Model) -> dict[str, Any]:
    """What the family says of a model. Where it says one thing of all layers, the first that has it speaks for all."""
    layers = list(model.expanded_layers())
    depth = model.mtp.depth if model.mtp else 0
    ffns = [model.ffn[layer.ffn] for layer in layers]
    prefix = next((index for index, ffn in enumerate(ffns) if isinstance(ffn, schema.MoE)), len(layers))
    mla = model.attention[layers[0].attention]
    if depth and not isinstance(model.ffn[model.mtp_layer().ffn], schema.MoE):
        raise HFError("model.mtp.layer.ffn: the Hugging Face family deepseek_v3 has mixtures of experts only there")
    config: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": len(layers),
        "num_nextn_predict_layers": depth,
        "first_k_dense_replace": prefix,
        "moe_layer_freq": 1,
        "num_attention_heads": mla.num_heads,
        "num_key_value_heads": mla.num_heads,
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position,
        "rms_norm_eps": model.norm.eps,
        "initializer_range": model.init.std,
        "tie_word_embeddings": model.tie_embeddings,
        # A spec knows no token ids, and the family's defaults would end generation at an arbitrary token.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if mla.rope != "none":
        config |= _write_rope(mla.rope) | {"rope_interleave": mla.rope.layout == "interleaved"}
    for ffn in (*ffns, *([model.ffn[model.mtp_layer().ffn]] if depth else [])):
        match ffn:
            case schema.Dense():
                config.setdefault("intermediate_size", ffn.intermediate_size)
            case schema.MoE() if "n_routed_experts" not in config:
                config |= _write_moe(ffn)
    return config


def _write_moe(moe: schema.MoE) -> dict[str, Any]:
    router, groups = moe.router, moe.router.selection.groups
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.intermediate_size,
        "n_shared_experts": moe.shared_width // moe.intermediate_size,
        "n_group": groups.num if groups else 1,
        "topk_group": groups.topk if groups else 1,
        "norm_topk_prob": router.renormalize,
        "routed_scaling_factor": router.scale,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }


def _read_rope(keys: _Keys, max_position: Any) -> dict[str, Any]:
    theta = keys.take("rope_theta", 10000.0)
    scaling, parameters = keys.take("rope_scaling", {}), keys.take("rope_parameters", {})
    if not isinstance(scaling, dict) or not isinstance(parameters, dict):
        raise HFError("config.json: rope_scaling and rope_parameters must be objects")
    if scaling and parameters:
        raise HFError("config.json: rope_scaling and rope_parameters say the same thing; only one may stand")
    rope = _Keys(parameters or scaling, "rope_parameters." if parameters else "rope_scaling.")
    old, new = rope.take("type", "default"), rope.take("rope_type", None)
    theta = rope.take("rope_theta", theta)
    rope.expect("partial_rotary_factor", 1.0)
    match new or old:
        case "default":
            result = {"theta": theta}
        case "yarn":
            result = {"theta": theta, "scaling": _read_yarn(rope, max_position)}
        case other:
            raise HFError(f"config.json: {rope.where}rope_type {other!r} is not supported; supported: default, yarn")
    rope.finish()
    return result


def _read_yarn(rope: _Keys, max_position: Any) -> dict[str, Any]:
    factor = rope.take("factor")
    mscale, mscale_all_dim = rope.take("mscale", 0.0), rope.take("mscale_all_dim", 0.0)
    attention_factor = rope.take("attention_factor", None)
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position": rope.take("original_max_position_embeddings", max_position),
        "beta_fast": rope.take("beta_fast", 32.0),
        "beta_slow": rope.take("beta_slow", 1.0),
        "mscale": _read_mscale(factor, mscale, mscale_all_dim, attention_factor),
        "mscale_all_dim": mscale_all_dim,
        "truncate": rope.take("truncate", True),
    }


def _g(factor: float, m: float) -> float:
    return 0.1 * m * log(factor) + 1.0


def _read_mscale(factor: Any, mscale: Any, all_dim: Any, attention_factor: Any) -> float:
    """The m with g(m) / g(mscale_all_dim) equal to the factor on cos and sin.

    A config gives that factor as it is, or by two m that are both above 0; else it is g(1).
    """
    numbers = (factor, mscale, all_dim, 0.0 if attention_factor is None else attention_factor)
    if any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers) or not 1 <= factor <= 1e9:
        raise HFError("config.json: factor (1 or more), mscale, mscale_all_dim and attention_factor must be numbers")
    if factor == 1 or (attention_factor is None and mscale and all_dim):
        return mscale
    wanted = _g(factor, 1.0) if attention_factor is None else attention_factor
    if isclose(wanted, _g(factor, mscale) / _g(factor, all_dim), rel_tol=1e-12):
        return mscale
    return (wanted * _g(factor, all_dim) - 1.0) / (0.1 * log(factor))


def _write_rope(rope: schema.Rope) -> dict[str, Any]:
    if rope.scaling is None:
        return {"rope_theta": rope.theta, "rope_scaling": None}
    yarn = rope.scaling
    scaling: dict[str, Any] = {
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }
    if not yarn.truncate:
        scaling["truncate"] = False
    if not (yarn.mscale and yarn.mscale_all_dim):
        # Readers take an m of 0 for one that is absent.
        scaling["attention_factor"] = _g(yarn.factor, yarn.mscale) / _g(yarn.factor, yarn.mscale_all_dim)
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def _require_equal(spec: schema.Model, family: schema.Model, model_type: str) -> None:
    for name in ("vocab_size", "hidden_size", "max_position", "tie_embeddings", "init", "norm"):
        _require_same(f"model.{name}", _plain(getattr(spec, name)), _plain(getattr(family, name)), model_type)
    mine, theirs = [*spec.expanded_layers()], [*family.expanded_layers()]
    if spec.mtp:
        mine, theirs = [*mine, spec.mtp_layer()], [*theirs, family.mtp_layer()]
    for index, (layer, other) in enumerate(zip(mine, theirs, strict=True)):
        place = f"model.layers (layer {index})" if index < spec.num_layers else "model.mtp.layer"
        _require_same(
            f"{place}: model.attention.{layer.attention}",
            _plain(spec.attention[layer.attention]),
            _plain(family.attention[other.attention]),
            model_type,
        )
        _require_same(
            f"{place}: model.ffn.{layer.ffn}", _plain(spec.ffn[layer.ffn]), _plain(family.ffn[other.ffn]), model_type
        )
        _require_same(f"{place}: norm", _plain(layer.norm or spec.norm), _plain(family.norm), model_type)


def _plain(part: Any) -> Any:
    """A part of a spec as maps, where equal meanings look equal."""
    if not isinstance(part, schema.Strict):
        return part
    plain = part.model_dump()
    if isinstance(part, schema.MoE):
        plain["shared_experts"] = part.shared_width
    return plain


def _require_same(path: str, mine: Any, theirs: Any, model_type: str) -> None:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        # `type` first: where kinds differ, their other keys have nothing to do with each other.
        for key in sorted(mine.keys() | theirs.keys(), key=lambda key: (key != "type", key)):
            _require_same(f"{path}.{key}", mine.get(key), theirs.get(key), model_type)
    elif mine != theirs:
        raise HFError(f"{path} is {mine!r}: the Hugging Face family {model_type} can only say {theirs!r} there")
