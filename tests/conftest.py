"""What every test runs under: one thread, fixed seeds, no network. And `tiny`, a model with every mechanism of V3."""

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings

from modelspec.schema import ModelSpec

# A busy machine is no failure.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Before anything imports a kernel: decorated later, it would be one for a GPU.
os.environ["TRITON_INTERPRET"] = "1"
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

# Sizes are odd on purpose: what only works for powers of two shows here.
TINY: dict[str, Any] = {
    "spec_version": 1,
    "name": "tiny",
    "model": {
        "vocab_size": 61,
        "hidden_size": 24,
        "max_position": 256,
        "init": {"std": 0.1},
        "norm": {"type": "rmsnorm", "eps": 1e-6},
        "attention": {
            "mla": {
                "type": "mla",
                "num_heads": 3,
                "q_lora_rank": 10,
                "kv_lora_rank": 8,
                "qk_nope_head_dim": 6,
                "qk_rope_head_dim": 4,
                "v_head_dim": 5,
                "latent_norm_eps": 1e-6,
                "rope": {"theta": 10000, "layout": "interleaved"},
            }
        },
        "ffn": {
            "dense": {"type": "dense", "intermediate_size": 20, "activation": {"type": "swiglu"}},
            "moe": {
                "type": "moe",
                "num_experts": 10,
                "num_experts_per_tok": 4,
                "intermediate_size": 7,
                "activation": {"type": "swiglu"},
                "shared_experts": {"num": 1},
                "router": {
                    "score": "sigmoid",
                    "selection": {
                        "type": "topk",
                        "bias": True,
                        "groups": {"num": 5, "topk": 3, "score": "top2_sum"},
                    },
                    "renormalize": True,
                    "scale": 2.5,
                },
            },
        },
        "layers": [{"attention": "mla", "ffn": "dense"}, {"repeat": 2, "attention": "mla", "ffn": "moe"}],
        "mtp": {"depth": 1},
    },
}


def merged(base: Any, over: Any) -> Any:
    """`over` laid on `base`: maps merge, None removes, all else replaces."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    result = base | {key: merged(base.get(key), value) for key, value in over.items()}
    return {key: value for key, value in result.items() if value is not None}


@pytest.fixture(scope="session")
def tiny() -> Callable[..., ModelSpec]:
    """tiny(model={...}, mla={...}, moe={...}, router={...}, **sections): the spec with these parts laid over it."""

    def make(*, model: Any = None, mla: Any = None, moe: Any = None, router: Any = None, **sections: Any) -> ModelSpec:
        spec = TINY
        for part in (
            {"attention": {"mla": mla or {}}},
            {"ffn": {"moe": moe or {}}},
            {"ffn": {"moe": {"router": router or {}}}},
            model or {},
        ):
            spec = merged(spec, {"model": part})
        return ModelSpec.model_validate(merged(spec, sections))

    return make


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_seeds() -> None:
    # Tests of the language run without torch.
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
        torch.manual_seed(0)
