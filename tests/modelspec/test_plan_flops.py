"""FLOPs of the plan against PyTorch's counter on transformers' own models, and against published figures."""

from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next

from modelspec import schema
from modelspec.builders import build
from modelspec.builders.rope import Rotary
from modelspec.hf_config import config_from_spec
from modelspec.plan.flops import attention, flops, multi_token_prediction
from modelspec.validate import load

SPECS = Path(__file__).parents[2] / "specs"
TINY = Path(__file__).parents[1] / "specs"
# Longer than every window and choice below.
TOKENS = 29


class Case(NamedTuple):
    """A small spec, and what is changed in it."""

    name: str
    overrides: tuple[str, ...] = ()

    def spec(self) -> schema.ModelSpec:
        return load(str(TINY / f"{self.name}-tiny.yaml"), self.overrides)


CASES = (
    Case("deepseek-v2"),
    Case("deepseek-v2-lite"),
    Case("deepseek-v3", ("model.mtp=null",)),
    Case("deepseek-v3.2", ("model.mtp=null", "model.attention.mla.indexer.topk=7")),
    Case("deepseek-v3.2", ("model.mtp=null", f"model.attention.mla.indexer.topk={TOKENS + 1}")),
    Case("glm-4.5", ("model.mtp=null",)),
    Case("gpt-oss-20b", ("model.attention.sliding.sliding_window=8",)),
    Case("llama-3.1-8b", ("model.attention.gqa.num_heads=4",)),
    Case("mixtral-8x7b"),
    Case("qwen2.5-7b", ("model.tie_embeddings=true",)),
    Case("qwen3-30b-a3b"),
    Case("qwen3-next-80b-a3b"),
)


def identity(case: Case) -> str:
    return "-".join((case.name, *(text.partition("=")[0].rpartition(".")[2] for text in case.overrides)))


@pytest.mark.parametrize("case", CASES, ids=identity)
def test_pytorchs_counter_finds_the_same_in_transformers_model(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_qwen3_next, "torch_chunk_gated_delta_rule", no_products)
    spec = case.spec()
    model = theirs(spec)
    ids = torch.randint(0, spec.model.vocab_size, (1, TOKENS))
    with FlopCounterMode(display=False) as forward:
        model(ids, use_cache=False)
    with FlopCounterMode(display=False) as training:
        model(ids, labels=ids, use_cache=False).loss.backward()

    found = flops(spec, TOKENS)
    learned, choice = differences(spec.model)
    assert TOKENS * found.forward == forward.get_total_flops() - learned - choice
    # Without a gradient through the choice of keys, its backward pass costs nothing.
    assert TOKENS * found.training == training.get_total_flops() - 3 * learned - choice - taken_for_dense(spec.model)
    assert found.training_with_mtp == found.training_with_recompute == found.training


def theirs(spec: schema.ModelSpec) -> Any:
    """transformers' model, in its plainest form: a product for each expert, the full square of attention."""
    config = AutoConfig.for_model(**config_from_spec(spec, "float32"))
    model: Any = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    return model.train()


def no_products(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **_: Any) -> tuple[Tensor, None]:
    """In the place of the recurrence: something of its shape that every argument has a part in, without a product."""
    return value + (query + key).sum((-2, -1), keepdim=True) + (g + beta).unsqueeze(-1), None


def differences(model: schema.Model) -> tuple[int | Fraction, int | Fraction]:
    """What the counter finds more: the other half of causal attention, and what transformers computes besides.

    First what gradients flow through, then the choice of keys.
    """
    learned: int | Fraction = 0
    choice: int | Fraction = 0
    for layer in model.expanded_layers():
        match model.attention[layer.attention]:
            case schema.MLA() as mla:
                widths = mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim
                indexer = mla.indexer
                learned += 2 * mla.num_heads * widths * (TOKENS**2 - pairs(indexer.topk if indexer else TOKENS))
                if indexer is not None:
                    scores = 2 * indexer.num_heads * (indexer.head_dim + 1)
                    if indexer.topk < TOKENS:
                        choice += scores * (TOKENS**2 - pairs(TOKENS))
                    else:
                        assert mla.q_lora_rank is not None
                        table = indexer.tensors(model.hidden_size, mla.q_lora_rank)
                        projections = sum(tensor.numel for tensor in table.values() if len(tensor.shape) == 2)
                        choice += scores * TOKENS**2 + 2 * projections * TOKENS
            case schema.GQA() as gqa:
                seen = pairs(gqa.sliding_window or TOKENS)
                learned += 4 * gqa.num_heads * gqa.head_dim * (TOKENS**2 - seen)
            case schema.GatedDeltaNet() as gdn:
                # Its convolution is padded on both sides and cut, and its recurrence is replaced.
                channels = 2 * gdn.num_qk_heads * gdn.qk_head_dim + gdn.num_v_heads * gdn.v_head_dim
                learned += 2 * gdn.conv_kernel * channels * (gdn.conv_kernel - 1)
                learned -= TOKENS * recurrence(gdn)
    return learned, choice


def taken_for_dense(model: schema.Model) -> int:
    """The counter takes the weight gradient of a depthwise convolution for that of one between all channels."""
    total = 0
    for layer in model.expanded_layers():
        gdn = model.attention[layer.attention]
        if isinstance(gdn, schema.GatedDeltaNet):
            channels = 2 * gdn.num_qk_heads * gdn.qk_head_dim + gdn.num_v_heads * gdn.v_head_dim
            total += 2 * gdn.conv_kernel * channels * (channels - 1) * (TOKENS + gdn.conv_kernel - 1)
    return total


def pairs(most: int) -> Fraction:
    """Query-key pairs of a causal sequence, position by position: half a pair more or less than a mask counts."""
    return sum((Fraction(min(t, most) + min(t + 1, most), 2) for t in range(TOKENS)), Fraction(0))


def recurrence(gdn: schema.GatedDeltaNet) -> int:
    """One token's step of the delta rule, its three products written out."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        memory = torch.empty(gdn.num_v_heads, gdn.v_head_dim, gdn.qk_head_dim)
        key, value = torch.empty(gdn.num_v_heads, gdn.qk_head_dim, 1), torch.empty(gdn.num_v_heads, gdn.v_head_dim, 1)
        correction = value - memory @ key
        memory = memory + correction @ key.mT
        torch.bmm(memory, key)
    return counter.get_total_flops()


def test_multi_token_prediction_is_what_its_module_and_the_head_compute() -> None:
    spec = load(str(TINY / "deepseek-v3-tiny.yaml"), ["model.mtp={depth: 2, layer: {attention: mla, ffn: dense}}"])
    size, vocab = spec.model.hidden_size, spec.model.vocab_size
    model = build(spec, device="meta")
    mla = spec.model.attention["mla"]
    assert isinstance(mla, schema.MLA)
    hidden = torch.empty(1, TOKENS, size, device="meta")
    turns = torch.empty(TOKENS, mla.qk_rope_head_dim // 2, device="meta")
    with FlopCounterMode(display=False) as counter:
        for module in model.mtp:
            module(hidden, hidden, Rotary(turns, turns, "interleaved"))
            torch.nn.functional.linear(hidden, torch.empty(vocab, size, device="meta"))
    widths = mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim
    other_half = 2 * 2 * mla.num_heads * widths * (TOKENS**2 - pairs(TOKENS))
    work = multi_token_prediction(spec.model, TOKENS)
    assert TOKENS * work.forward == counter.get_total_flops() - other_half
    found = flops(spec, TOKENS)
    assert found.training_with_mtp - found.training == 3 * work.forward


def test_v3_costs_what_is_published() -> None:
    """250.4 and 260.6 GFLOP per token: throughput in FLOP/s over tokens/s, as Megatron's users report them."""
    found = flops(load(SPECS / "deepseek-v3.yaml"), 4096)
    assert found.forward == 83_483_295_744
    assert found.training == 250_449_887_232
    assert round(found.training / 10**9, 1) == Fraction(2504, 10)
    assert round(found.training_with_mtp / 10**9, 1) == Fraction(2606, 10)
    full_square = found.training + 3 * 61 * 128 * (128 + 64 + 128) * 4096
    assert round(full_square / 10**9, 1) == Fraction(2812, 10)


def test_recomputing_the_up_projection_repeats_its_two_products() -> None:
    """Norms and the activation, which V3 computes again too, hold no product."""
    found = flops(load(SPECS / "deepseek-v3.yaml"), 4096)
    assert found.training_with_recompute - found.training_with_mtp == 62 * 2 * (37_748_736 + 16_777_216)


def test_recomputing_layers_repeats_all_but_the_head() -> None:
    found = flops(
        load(
            SPECS / "deepseek-v3.yaml", ["parallelism.recompute=[layer]", "model.mtp=null", "training.losses.mtp=null"]
        ),
        4096,
    )
    assert found.training_with_recompute - found.training == found.forward - 2 * 129_280 * 7_168


def test_recompute_of_the_first_stage_is_what_counts() -> None:
    spec = load(SPECS / "deepseek-v3.yaml", ["training.stages.0.parallelism={recompute: [norm]}"])
    found = flops(spec, 4096)
    assert found.training_with_recompute == found.training_with_mtp


def test_a_window_bounds_what_long_sequences_cost() -> None:
    spec = load(SPECS / "gpt-oss-20b.yaml")
    sliding, full = spec.model.attention["sliding"], spec.model.attention["full"]
    assert isinstance(sliding, schema.GQA)

    def grown(variant: schema.Attention) -> Fraction:
        return attention(spec.model, variant, 65536).forward - attention(spec.model, variant, 32768).forward

    assert grown(full) == 4 * 64 * 64 * 16384
    assert grown(sliding) == 4 * 64 * 64 * (Fraction(128**2, 2 * 32768) - Fraction(128**2, 2 * 65536))


def test_sparse_attention_reads_a_bounded_number_of_keys_and_scores_all() -> None:
    spec = load(SPECS / "deepseek-v3.2.yaml")
    before, after = (flops(spec, length).forward for length in (65536, 131072))
    scores = 64 * (128 + 1) * 65536
    fewer_short = 128 * 320 * 2048 * (Fraction(2048, 65536) - Fraction(2048, 131072))
    assert after - before == 61 * (scores + fewer_short)


def test_every_kind_of_attention_and_network_is_among_the_cases() -> None:
    def kinds(spec: schema.ModelSpec) -> set[type]:
        return {type(variant) for variant in (*spec.model.attention.values(), *spec.model.ffn.values())}

    covered = {kind for case in CASES for kind in kinds(case.spec())}
    assert covered == {kind for path in SPECS.glob("*.yaml") for kind in kinds(load(path))}
