"""What ranks send: each collective against a count by hand, and the figures that are published for DeepSeek-V3."""

from pathlib import Path

import pytest

from modelspec.plan.runs import runs
from modelspec.plan.traffic import (
    Transfer,
    boundary_traffic,
    choice_traffic,
    layer_traffic,
    naive_exchange,
    nodes_of_token,
    rank_traffic,
    step_traffic,
    token_bytes,
)
from modelspec.schema import ModelSpec, MoE
from modelspec.validate import load

SPECS = Path(__file__).parents[2] / "specs"
V3 = str(SPECS / "deepseek-v3.yaml")
LLAMA = str(SPECS / "llama-3.1-8b.yaml")


def sent(transfers: tuple[Transfer, ...]) -> dict[str, float]:
    return {f"{each.axis} {each.name} {each.link}": each.bytes for each in transfers}


def moe_traffic(spec: ModelSpec, domain: int = 8) -> dict[str, float]:
    return sent(layer_traffic(spec, runs(spec.model)[1], 1, domain))


def test_a_token_of_v3_is_as_large_as_published() -> None:
    assert token_bytes(load(V3)) == (2 * 7168, 2 * 7168)
    # An FP32 scale for each 128 channels of FP8.
    assert token_bytes(load(V3, ["precision.fp8.dispatch=true"])) == (7168 + 4 * 56, 2 * 7168)
    ue8m0 = load(V3, ["precision.fp8.dispatch=true", "precision.fp8.scales=ue8m0"])
    assert token_bytes(ue8m0) == (7168 + 56, 2 * 7168)


def test_a_token_of_v3_goes_to_four_nodes_of_which_an_eighth_is_its_own() -> None:
    spec = load(V3, ["precision.fp8.dispatch=true"])
    found = moe_traffic(spec)
    assert found == {"expert dispatch network": 7392 * 4 * 7 / 8, "expert combine network": 14336 * 4 * 7 / 8}
    # Forward and backward together: the published 152,096 bytes a token and layer.
    assert 2 * sum(found.values()) == 152_096


def test_the_naive_exchange_sends_a_copy_for_each_expert() -> None:
    spec = load(V3)
    naive = naive_exchange(spec, runs(spec.model)[1], 1, 8)
    assert [each.bytes for each in naive] == [114_688 * 63 / 64] * 2
    assert naive_exchange(spec, runs(spec.model)[0], 1, 8) == ()
    assert naive_exchange(spec, runs(spec.model)[1], 1, 64) == ()


def test_inside_a_fast_domain_each_expert_gets_its_copy() -> None:
    assert moe_traffic(load(V3), domain=72) == {
        "expert dispatch node": 114_688 * 63 / 64,
        "expert combine node": 114_688 * 63 / 64,
    }


def test_without_a_limit_a_token_reaches_the_nodes_that_chance_says() -> None:
    moe = load(str(SPECS / "qwen3-235b-a22b.yaml")).model.ffn["moe"]
    assert isinstance(moe, MoE)
    assert moe.num_experts_per_tok == 8
    assert nodes_of_token(moe, 2) == pytest.approx(2 * (1 - 0.5**8))
    assert nodes_of_token(moe, 1) == 1


def test_tensor_ranks_gather_and_scatter_twice_in_a_layer() -> None:
    spec = load(LLAMA, ["parallelism.tensor=4", "parallelism.world_size=4", "precision.compute=bfloat16"])
    found = sent(layer_traffic(spec, runs(spec.model)[0], 100, 8))
    one = 2 * 100 * 4096 * 2 * 3 / 4
    assert found == {"tensor all-gather node": one, "tensor reduce-scatter node": one}
    across = layer_traffic(spec, runs(spec.model)[0], 100, 2)
    assert {each.link for each in across} == {"network"}


def test_tensor_ranks_do_not_gather_for_experts_without_shared_ones() -> None:
    over = ["parallelism.tensor=4", "parallelism.world_size=4", "precision={compute: bfloat16}"]
    spec = load(str(SPECS / "qwen3-30b-a3b.yaml"), over)
    found = sent(layer_traffic(spec, runs(spec.model)[0], 100, 8))
    one = 100 * 2048 * 2 * 3 / 4
    assert found == {"tensor all-gather node": one, "tensor reduce-scatter node": one}


def test_tensor_ranks_that_share_a_head_of_keys_gather_all_of_it() -> None:
    over = ["training=null", "parallelism=null", "parallelism={world_size: 8, context: 2, tensor: 4}"]
    spec = load(LLAMA, [*over, "precision={compute: bfloat16}", "model.attention.gqa.num_kv_heads=2"])
    assert sent(layer_traffic(spec, runs(spec.model)[0], 100, 8))["context all-gather node"] == 100 * 2 * 128 * 2


@pytest.mark.parametrize(("file", "width"), [(LLAMA, 2 * 8 * 128), (V3, 512 + 64)])
def test_context_ranks_gather_what_a_cache_would_keep(file: str, width: int) -> None:
    overrides = ["training=null", "parallelism=null", "parallelism={world_size: 4, context: 4}"]
    spec = load(file, [*overrides, "precision={compute: bfloat16}"])
    found = sent(layer_traffic(spec, runs(spec.model)[0], 100, 8))
    assert found == {"context all-gather node": 100 * width * 2 * 3}


def test_context_ranks_gather_the_keys_of_an_indexer_that_has_to_choose() -> None:
    overrides = ["training=null", "parallelism=null", "parallelism={world_size: 4, context: 4}"]
    spec = load(str(SPECS / "deepseek-v3.2.yaml"), [*overrides, "precision={compute: bfloat16}"])
    run = runs(spec.model)[0]
    name = "context all-gather of the indexer's keys node"
    assert sent(choice_traffic(spec, run, 1024, 4096, 8)) == {name: 1024 * 128 * 2 * 3}
    # 2,048 keys are as many as a query sees.
    assert choice_traffic(spec, run, 512, 2048, 8) == ()
    layers = sum(each.repeat for each in runs(spec.model)) + (spec.model.mtp.depth if spec.model.mtp else 0)
    step = sent(rank_traffic(spec, 2, 4096, 8))
    # The choice has no gradient: its keys pass once, latents there and gradients back.
    assert step[name] == 2 * 1024 * 128 * 2 * 3 * layers
    for collective in ("all-gather", "reduce-scatter"):
        assert step[f"context {collective} node"] == 2 * 1024 * (512 + 64) * 2 * 3 * layers


def test_a_stage_hands_on_the_residual_stream() -> None:
    assert sent(boundary_traffic(load(V3), 4096, 8)) == {"pipeline send network": 4096 * 7168 * 2}
    assert boundary_traffic(load(LLAMA), 4096, 8) == ()


def test_without_zero_gradients_are_summed_everywhere() -> None:
    spec = load(LLAMA, ["parallelism={world_size: 16}", "precision={compute: bfloat16, gradients: float32}"])
    found = sent(step_traffic(spec, 1000, 0, 5, 8))
    assert found == {"data all-reduce of dense network": 2 * 1000 * 4 * 15 / 16}


@pytest.mark.parametrize(("zero", "scatters", "gathers"), [(1, 1, 1), (2, 5, 1), (3, 5, 2 * 5)])
def test_what_zero_keeps_scattered_travels_in_every_microbatch(zero: int, scatters: int, gathers: int) -> None:
    overrides = [
        f"parallelism={{world_size: 16, data: {{zero: {zero}}}}}",
        "precision={compute: bfloat16, gradients: float32}",
    ]
    spec = load(LLAMA, overrides)
    found = sent(step_traffic(spec, 1000, 0, 5, 8))
    assert found == {
        "data reduce-scatter of dense network": 1000 * 4 * scatters * 15 / 16,
        "data all-gather of dense network": 1000 * 2 * gathers * 15 / 16,
    }


def test_copies_of_experts_exchange_among_themselves() -> None:
    found = sent(step_traffic(load(V3), 0, 1000, 120, 8))
    # 128 data ranks hold the experts of 64 twice.
    assert found == {
        "data reduce-scatter of experts network": 1000 * 4 / 2,
        "data all-gather of experts network": 1000 * 2 / 2,
    }


def test_a_step_sums_over_layers_passes_and_microbatches() -> None:
    found = sent(rank_traffic(load(V3), 15360, 4096, 8))
    # The rank with the most experts has four such layers; 120 microbatches go through them, forward and back.
    assert found["expert dispatch network"] == 4 * 2 * 120 * 4096 * 14336 * 3.5
    assert found["expert naive dispatch network"] == 4 * 2 * 120 * 4096 * 114_688 * 63 / 64
    assert found["pipeline send network"] == 2 * 2 * 120 * 4096 * 14336
