"""Bytes of the plan: caches against what transformers keeps, checkpoints against files, both as published."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from modelspec import schema
from modelspec.builders import build
from modelspec.builders.checkpoint import model_tensors, optimizer_tensors
from modelspec.builders.hf import save_pretrained
from modelspec.builders.hf.convert import hub_table
from modelspec.builders.optim import build_optimizer, set_learning_rate
from modelspec.hf_config import config_from_spec
from modelspec.plan.cache import cache
from modelspec.plan.storage import checkpoint_bytes
from modelspec.validate import load

SPECS = Path(__file__).parents[2] / "specs"
TINY = Path(__file__).parents[1] / "specs"
TOKENS = 29
ITEM = {"F32": 4, "BF16": 2, "F8_E4M3": 1}


def tiny(name: str, *overrides: str) -> schema.ModelSpec:
    return load(str(TINY / f"{name}-tiny.yaml"), overrides)


@pytest.mark.parametrize(
    ("name", "per_token"),
    [
        ("deepseek-v3", 70_272),
        ("deepseek-v2", 69_120),
        ("kimi-k2", 70_272),
        ("llama-3.1-405b", 516_096),
        ("qwen2.5-72b", 327_680),
    ],
)
def test_caches_are_as_published(name: str, per_token: int) -> None:
    assert cache(load(SPECS / f"{name}.yaml")).per_token == per_token
    assert cache(load(SPECS / f"{name}.yaml")).per_sequence == 0


def kept(spec: schema.ModelSpec) -> list[Any]:
    """What transformers' model keeps in each layer after so many tokens."""
    config = AutoConfig.for_model(**config_from_spec(spec, "float32"))
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    held = DynamicCache(config=config)
    with torch.no_grad():
        model.eval()(torch.randint(0, spec.model.vocab_size, (1, TOKENS)), past_key_values=held)
    return list(held.layers)


def size(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("name", ["glm-4.5", "mixtral-8x7b", "qwen2.5-7b", "qwen3-30b-a3b"])
def test_grouped_queries_keep_keys_and_values_of_every_token(name: str) -> None:
    spec = tiny(name)
    held = sum(size(layer.keys, layer.values) for layer in kept(spec))
    assert cache(spec).per_token * TOKENS == held
    assert cache(spec).per_sequence == 0


def test_a_window_keeps_as_many_tokens_as_it_reads() -> None:
    spec = tiny("gpt-oss-20b", "model.attention.sliding.sliding_window=8")
    layers = kept(spec)
    names = [layer.attention for layer in spec.model.expanded_layers()]
    full = sum(size(x.keys, x.values) for x, name in zip(layers, names, strict=True) if name == "full")
    # transformers keeps those before the next token, which is the last of its own window.
    sliding = sum(size(x.keys, x.values) for x, name in zip(layers, names, strict=True) if name == "sliding")
    assert cache(spec).per_token * TOKENS == full
    assert cache(spec).per_sequence * 7 == sliding * 8


def test_a_window_as_long_as_the_model_bounds_nothing() -> None:
    spec = tiny("gpt-oss-20b", "model.attention.sliding.sliding_window=64")
    assert spec.model.max_position == 64
    assert cache(spec).per_sequence == 0
    assert cache(spec).per_token * TOKENS == sum(size(layer.keys, layer.values) for layer in kept(spec))


def test_a_recurrence_keeps_its_memory_and_what_its_convolution_reaches() -> None:
    spec = tiny("qwen3-next-80b-a3b")
    layers = kept(spec)
    gdn = spec.model.attention["gdn"]
    assert isinstance(gdn, schema.GatedDeltaNet)
    full = [layer for layer in layers if hasattr(layer, "keys") and layer.keys is not None]
    linear = [layer for layer in layers if layer not in full]
    assert cache(spec).per_token * TOKENS == sum(size(layer.keys, layer.values) for layer in full)
    memories = sum(size(*layer.recurrent_states.values()) for layer in linear)
    # transformers keeps the token itself, too.
    reached = sum(size(*layer.conv_states.values()) for layer in linear) * (gdn.conv_kernel - 1) // gdn.conv_kernel
    assert cache(spec).per_sequence == memories + reached


def test_latent_attention_keeps_what_its_first_projection_gives_and_the_indexers_key() -> None:
    spec = tiny("deepseek-v3.2", "model.mtp=null")
    model = build(spec)
    seen: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith(("attention.kv_a_proj", "indexer.k_proj")):
            module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    model(torch.zeros(1, TOKENS, dtype=torch.int64))
    indexers = sum(name.endswith("indexer.k_proj") for name, _ in model.named_modules())
    assert len(seen) == 2 * indexers == 2 * spec.model.num_layers
    assert cache(spec).per_token * TOKENS == size(*seen)


def test_a_cache_is_as_wide_as_the_computation() -> None:
    narrow = load(SPECS / "qwen3-next-80b-a3b.yaml")
    wide = load(SPECS / "qwen3-next-80b-a3b.yaml", ["precision.compute=float32"])
    assert cache(wide).per_token == 2 * cache(narrow).per_token
    # Memories are in FP32 either way.
    assert cache(narrow).per_sequence == 36 * (4 * 32 * 128 * 128 + 2 * 3 * 8192)
    assert cache(wide).per_sequence == 36 * (4 * 32 * 128 * 128 + 4 * 3 * 8192)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3.2", "gpt-oss-20b", "qwen3-next-80b-a3b"])
def test_our_checkpoint_is_as_large_as_its_tensors_after_a_step(name: str, precision: str) -> None:
    changes = [f"precision={{master_weights: {precision}, optimizer_states: bfloat16, compute: {precision}}}"]
    if name == "deepseek-v3.2":
        changes.append("model.attention.mla.indexer.topk=7")
    spec = tiny(name, *changes)
    model = build(spec)
    adamw = schema.AdamW(type="adamw", betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizer = build_optimizer(model, adamw, spec.precision)
    set_learning_rate(optimizer, 1e-3)
    ids = torch.randint(0, spec.model.vocab_size, (1, TOKENS))
    model(ids, targets=ids).loss.backward()
    optimizer.step()
    found = checkpoint_bytes(spec)
    assert found.weights == size(*model_tensors(model).values())
    assert found.optimizer == size(*optimizer_tensors(model, optimizer).values())


def test_hugging_face_files_of_v3_are_as_large_as_those_published() -> None:
    found = checkpoint_bytes(load(SPECS / "deepseek-v3.yaml"))
    assert found.hugging_face_fp8 == 688_574_839_360
    # Biases of 59 routers stay in FP32.
    assert found.hugging_face_bf16 == 2 * 684_489_845_504 + 2 * 59 * 256


@pytest.mark.parametrize("name", ["deepseek-v3", "glm-4.5", "gpt-oss-20b", "qwen2.5-7b"])
def test_the_bf16_files_are_as_large_as_planned(name: str, tmp_path: Path) -> None:
    spec = tiny(name)
    save_pretrained(build(spec, dtype=torch.bfloat16), tmp_path / "hf")
    content = (tmp_path / "hf" / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    stored = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    assert checkpoint_bytes(spec).hugging_face_bf16 == stored


@pytest.mark.parametrize(
    "name", ["deepseek-v3.2", "deepseek-v2-lite", "glm-4.5-air", "gpt-oss-20b", "mixtral-8x7b", "qwen3-next-80b-a3b"]
)
def test_the_fp8_files_are_as_large_as_their_table_at_full_size(name: str) -> None:
    """The table is that of `export`; widths that fill no whole block round up, experts of gpt-oss stay in BF16."""
    spec = load(SPECS / f"{name}.yaml")
    table = hub_table(spec.model, block=(128, 128)).values()
    planned = checkpoint_bytes(spec).hugging_face_fp8
    assert planned == sum(ITEM[entry.dtype] * torch.Size(entry.shape).numel() for entry in table)


def test_a_model_of_no_family_has_no_hugging_face_files() -> None:
    spec = tiny("qwen3-next-80b-a3b", "model.mtp={depth: 1}")
    found = checkpoint_bytes(spec)
    assert found.hugging_face_bf16 is None and found.hugging_face_fp8 is None
