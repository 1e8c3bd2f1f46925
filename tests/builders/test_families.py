"""Every family against transformers' own model: what it saves loads here, computes the same, and goes back bit for bit.

Gradients come from transformers by the same road as weights: its gradients are saved as if they were weights and read
here, so that each stands under our name.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from modelspec.builders import Transformer
from modelspec.builders.hf import from_pretrained, save_pretrained

# Longer than every window and indexer below, and no multiple of anything.
TOKENS = 29
COMMON: dict[str, Any] = {"vocab_size": 67, "hidden_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 128}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
DENSE: dict[str, Any] = COMMON | HEADS | {"intermediate_size": 33}
MLA: dict[str, Any] = COMMON | {
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 10,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "intermediate_size": 20,
    "moe_intermediate_size": 7,
    "n_routed_experts": 10,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
}
GROUPS: dict[str, Any] = {"n_group": 5, "topk_group": 3}
NO_GROUPS: dict[str, Any] = {"n_group": 1, "topk_group": 1}
V2: dict[str, Any] = MLA | {"routed_scaling_factor": 1.3, "topk_method": "greedy"}
V3: dict[str, Any] = MLA | GROUPS | {"num_nextn_predict_layers": 0}
V32: dict[str, Any] = MLA | GROUPS | {"index_n_heads": 5, "index_head_dim": 6, "index_topk": 7}
QWEN3_MOE: dict[str, Any] = DENSE | {
    "head_dim": 10,
    "num_experts": 9,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 7,
}
GLM: dict[str, Any] = QWEN3_MOE | {
    "num_experts": None,
    "n_routed_experts": 10,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "num_hidden_layers": 3,
    "attention_bias": True,
    "use_qk_norm": True,
    "head_dim": 12,
}
GPT_OSS: dict[str, Any] = DENSE | {
    "head_dim": 10,
    "intermediate_size": 7,
    "num_local_experts": 9,
    "num_experts_per_tok": 3,
    "sliding_window": 8,
    "num_hidden_layers": 4,
}
QWEN3_NEXT: dict[str, Any] = QWEN3_MOE | {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 5,
    "shared_expert_intermediate_size": 11,
    "rms_norm_eps": 1e-3,
}


def rope(**values: Any) -> dict[str, Any]:
    """A configuration's part about rotary embeddings."""
    return {"rope_parameters": {"rope_theta": 1000.0} | values}


def yarn(**values: Any) -> dict[str, Any]:
    """YaRN whose ramp covers some of the few pairs that there are."""
    scaling = {"factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 0.5}
    return rope(rope_type="yarn", **scaling, **values)


LLAMA3 = rope(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)


class Case(NamedTuple):
    """A configuration of transformers, and how far logits may differ in units of the largest: some amplify rounding."""

    family: str
    config: dict[str, Any]
    tolerance: float = 1e-5


CASES = {
    "llama": Case("Llama", DENSE | rope(rope_type="default")),
    "llama-scaled-tied": Case(
        "Llama", DENSE | LLAMA3 | {"head_dim": 10, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
    ),
    "llama-biases": Case("Llama", DENSE | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "qwen2": Case("Qwen2", DENSE | rope(rope_type="default") | {"rms_norm_eps": 1e-3}),
    "qwen2-window-tied": Case(
        "Qwen2",
        DENSE
        | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
        | {"num_hidden_layers": 4, "tie_word_embeddings": True},
    ),
    "qwen2-yarn": Case("Qwen2", DENSE | yarn()),
    "qwen3": Case("Qwen3", DENSE | {"head_dim": 10, "rms_norm_eps": 1e-3}),
    "qwen3-yarn-tied": Case("Qwen3", DENSE | yarn() | {"head_dim": 10, "tie_word_embeddings": True}),
    "mixtral": Case("Mixtral", DENSE | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-window": Case(
        "Mixtral", DENSE | {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 7, "head_dim": 10}
    ),
    "qwen3-moe": Case("Qwen3Moe", QWEN3_MOE | {"norm_topk_prob": True}),
    "qwen3-moe-dense-layers": Case(
        "Qwen3Moe", QWEN3_MOE | yarn() | {"norm_topk_prob": False, "mlp_only_layers": [1], "num_hidden_layers": 3}
    ),
    "qwen3-next": Case("Qwen3Next", QWEN3_NEXT | {"num_hidden_layers": 3, "full_attention_interval": 3}),
    "qwen3-next-dense-layer": Case(
        "Qwen3Next",
        QWEN3_NEXT
        | {"num_hidden_layers": 2, "layer_types": ["full_attention", "linear_attention"]}
        | {"linear_num_value_heads": 2, "linear_conv_kernel_dim": 3, "shared_expert_intermediate_size": 7}
        | {"attention_bias": True, "mlp_only_layers": [0], "norm_topk_prob": False, "tie_word_embeddings": True},
    ),
    "glm4-moe": Case("Glm4Moe", GLM | NO_GROUPS | {"routed_scaling_factor": 2.5}),
    "glm4-moe-groups-without-norms": Case(
        "Glm4Moe",
        GLM
        | GROUPS
        | {"use_qk_norm": False, "attention_bias": False, "n_shared_experts": 2, "norm_topk_prob": False}
        | rope(rope_type="default", partial_rotary_factor=1 / 3),
    ),
    "gpt-oss": Case("GptOss", GPT_OSS),
    "gpt-oss-without-a-window": Case(
        "GptOss", GPT_OSS | {"layer_types": ["full_attention"] * GPT_OSS["num_hidden_layers"]}
    ),
    "gpt-oss-yarn": Case("GptOss", GPT_OSS | yarn(truncate=False) | {"swiglu_limit": 0.5, "swiglu_alpha": 1.3}),
    "deepseek-v2": Case("DeepseekV2", V2 | rope(rope_type="default")),
    "deepseek-v2-groups-yarn": Case(
        "DeepseekV2",
        V2
        | {"topk_method": "group_limited_greedy", "n_group": 5, "topk_group": 3, "n_shared_experts": 2}
        | yarn(mscale=0.707, mscale_all_dim=0.707)
        | {"q_lora_rank": None},
    ),
    "deepseek-v3": Case("DeepseekV3", V3 | rope(rope_type="default") | {"rms_norm_eps": 1e-4}),
    "deepseek-v3-yarn": Case("DeepseekV3", V3 | NO_GROUPS | yarn(mscale=1.0, mscale_all_dim=1.0)),
    "deepseek-v32": Case("DeepseekV32", V32 | rope(rope_type="default")),
    "deepseek-v32-yarn": Case("DeepseekV32", V32 | yarn(mscale=1.0, mscale_all_dim=1.0) | {"rms_norm_eps": 1e-5}),
}


class Pair(NamedTuple):
    """transformers' model, the directory that it saved, and what this project reads there."""

    theirs: PreTrainedModel
    saved: Path
    ours: Transformer
    tolerance: float


@pytest.fixture(scope="module", params=CASES.values(), ids=list(CASES))
def pair(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    randomize: Callable[[torch.nn.Module], None],
) -> Pair:
    torch.manual_seed(0)
    case: Case = request.param
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = getattr(transformers, f"{case.family}Config")(**case.config, **tokens)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomize(theirs)
    saved = tmp_path_factory.mktemp("hf") / "theirs"
    return Pair(odd_sizes(theirs), save(theirs, saved), from_pretrained(saved), case.tolerance)


def odd_sizes(model: Any) -> Any:
    """The same model with the loop over experts: grouped products want rows of whole 16 bytes."""
    model.set_experts_implementation("eager")
    return model


def save(model: PreTrainedModel, path: Path) -> Path:
    model.save_pretrained(path)
    return path


@pytest.fixture
def text() -> Tensor:
    return torch.randint(0, COMMON["vocab_size"], (2, TOKENS))


def test_logits_are_those_of_transformers(pair: Pair, text: Tensor) -> None:
    with torch.no_grad():
        mine, theirs = pair.ours(text).logits, pair.theirs(text, use_cache=False).logits
    assert theirs.std() > 0.1
    torch.testing.assert_close(mine, theirs, rtol=0, atol=pair.tolerance * theirs.abs().max().item())


def test_every_gradient_is_that_of_transformers(pair: Pair, text: Tensor, tmp_path: Path) -> None:
    targets = torch.randint(0, COMMON["vocab_size"], text.shape)
    loss = F.cross_entropy(pair.theirs(text, use_cache=False).logits.flatten(0, 1), targets.flatten())
    loss.backward()
    for parameter in pair.theirs.parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.data, parameter.grad = gradient, parameter.data
    wanted = dict(from_pretrained(save(pair.theirs, tmp_path / "gradients")).named_parameters())
    for parameter in pair.theirs.parameters():
        assert parameter.grad is not None
        parameter.data, parameter.grad = parameter.grad, None

    output = pair.ours(text, targets=targets)
    torch.testing.assert_close(output.losses.lm, loss, rtol=1e-5, atol=0)
    output.losses.lm.backward()
    for name, parameter in pair.ours.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (found - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name
        # The indexer's choice carries no gradient.
        assert found.any() != ("indexer" in name), name
    pair.ours.zero_grad()


def assert_same_files(mine: Path, theirs: Path) -> None:
    """Same names, dtypes and bits."""
    ours, wanted = (load_file(path / "model.safetensors") for path in (mine, theirs))
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensor.dtype == ours[name].dtype, name
        assert torch.equal(tensor, ours[name]), name


def test_every_tensor_goes_back_bit_for_bit(pair: Pair, text: Tensor, tmp_path: Path) -> None:
    save_pretrained(pair.ours, tmp_path / "ours")
    assert_same_files(tmp_path / "ours", pair.saved)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    again, report = loaded
    assert not any(report.values()), report
    # Not bit for bit: transformers' own products vary with where the weights lie in memory.
    with torch.no_grad():
        found, wanted = odd_sizes(again)(text).logits, pair.theirs(text).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=pair.tolerance * wanted.abs().max().item())


def test_what_the_family_keeps_in_fp32_stays_so(pair: Pair, tmp_path: Path) -> None:
    narrow = AutoModelForCausalLM.from_pretrained(pair.saved, dtype=torch.bfloat16)
    ours = from_pretrained(save(narrow, tmp_path / "theirs"))
    assert ours.compute_dtype == torch.bfloat16
    save_pretrained(ours, tmp_path / "ours")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")
    assert {b.dtype for b in from_pretrained(pair.saved, dtype=torch.bfloat16).buffers()} <= {torch.float32}
