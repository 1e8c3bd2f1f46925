"""Serving: memory and closed forms exactly, a step of V3 by hand, limits, published rates beside those predicted."""

import json
from dataclasses import replace
from fractions import Fraction
from itertools import combinations, pairwise
from math import isclose
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from modelspec.cli import app
from modelspec.hardware import load as load_hardware
from modelspec.plan import parameters
from modelspec.plan.roofline import cache_shares, core, draft_parts, exchange, step_parts, touched
from modelspec.plan.serving import Decode, Rate, Serving, serve
from modelspec.plan.serving_machine import Batch, Efficiency, Layout, Machine, Part
from modelspec.plan.storage import checkpoint_bytes
from modelspec.schema import MLA, ModelSpec, MoE
from modelspec.schema.hardware import Hardware, PeakFlops, Price
from modelspec.validate import load

ROOT = Path(__file__).parents[2]
SPECS = ROOT / "specs"
V3 = load(SPECS / "deepseek-v3.yaml")
LLAMA = load(SPECS / "llama-3.1-8b.yaml")
# Round figures of an H800.
DEVICE = Hardware(
    name="device",
    summary="a device of the tests",
    vendor="nobody",
    memory=80 * 10**9,
    memory_bandwidth=3.0e12,
    peak_flops=PeakFlops(float32=60e12, bfloat16=1000e12, fp8=2000e12),
    gpus_per_node=8,
    fast_domain=8,
    node_bandwidth=200e9,
    network_bandwidth=50e9,
    power=700.0,
    price=Price(usd_per_hour=2.0, source="nobody", date="2025-01"),
)
IDEAL = Efficiency(1.0, 1.0, 1.0, 1.0, overlap=0.0, imbalance=1.0, exchange_latency=0.0, layer_latency=0.0)


def machine(gpus: int, tensor: int = 1, use: Efficiency = IDEAL, hardware: Hardware = DEVICE) -> Machine:
    return Machine(hardware, Layout(gpus, tensor), "fp8", use)


def moe_of(spec: ModelSpec) -> MoE:
    (moe,) = (ffn for ffn in spec.model.ffn.values() if isinstance(ffn, MoE))
    return moe


def faster(**changes: Any) -> Hardware:
    return DEVICE.model_copy(update=changes)


def rate(row: Decode) -> Rate:
    assert row.plain is not None
    return row.plain


# Two tokens of eight sequences on each of 32 devices.
DRAFTED = Batch(256, 2, 1000)


# Memory.


def test_weights_in_bf16_are_two_bytes_a_parameter() -> None:
    assert serve(LLAMA, DEVICE).memory.weights_of_all == 2 * parameters(LLAMA).total


def test_weights_in_fp8_are_the_published_files_without_their_duplicates() -> None:
    duplicates = 2 * 129_280 * 7_168 * 2
    with_drafts = serve(V3, DEVICE, gpus=32, acceptance=0.8).memory.weights_of_all
    assert with_drafts == (checkpoint_bytes(V3).hugging_face_fp8 or 0) - duplicates == 684_868_123_200
    assert serve(V3, DEVICE, gpus=32).memory.weights_of_all < with_drafts


def test_a_device_holds_its_experts_and_all_else_whole() -> None:
    memory = serve(V3, DEVICE, gpus=64).memory
    # Two of three projections are 2048 x 7168 and one is 7168 x 2048: 16 x 56 blocks each, with an FP32 scale.
    expert = 3 * (7168 * 2048 + 16 * 56 * 4)
    everything = memory.weights_of_all
    assert memory.weights == everything - 58 * 256 * expert + 58 * 4 * expert


def test_slots_that_no_expert_needs_hold_copies() -> None:
    assert Layout(144, 1).slots(256) == 2
    assert serve(V3, DEVICE, gpus=144).memory.weights == serve(V3, DEVICE, gpus=128).memory.weights


def test_a_cache_is_bf16_and_holds_the_drafting_layers_too() -> None:
    assert serve(V3, DEVICE, gpus=32, context=1000).memory.cache_per_sequence == 70_272_000
    assert serve(V3, DEVICE, gpus=32, context=1000, acceptance=0.5).memory.cache_per_sequence == 71_424_000
    plain = load(SPECS / "deepseek-v3.yaml", ["precision.compute=float32"])
    assert serve(plain, DEVICE, gpus=32, context=1000).memory.cache_per_sequence == 70_272_000


def test_heads_of_a_cache_are_cut_and_a_latent_is_not() -> None:
    (mla,), (gqa,) = V3.model.attention.values(), LLAMA.model.attention.values()
    assert [cache_shares(mla, tensor) for tensor in (1, 8)] == [1, 1]
    assert [cache_shares(gqa, tensor) for tensor in (1, 4, 16)] == [1, 4, 8]


def test_the_largest_batch_fills_what_the_margin_leaves() -> None:
    serving = serve(LLAMA, DEVICE, gpus=1, context=8192)
    each = 131_072 * 8192
    assert serving.largest_batch == (72 * 10**9 - 16_060_522_496) // each == 52
    assert [row.batch for row in serving.decode] == [1, 8, 32, 52]
    assert all(row.fits for row in serving.decode)


def test_the_fewest_devices_are_a_part_of_a_node_or_whole_nodes() -> None:
    assert serve(LLAMA, DEVICE).fewest_gpus == 1
    assert serve(load(SPECS / "llama-3.1-70b.yaml"), DEVICE).fewest_gpus == 2
    assert serve(V3, DEVICE).fewest_gpus == 16
    assert serve(V3, faster(memory=2**40)).fewest_gpus == 1
    assert serve(load(SPECS / "llama-3.1-405b.yaml"), faster(memory=2**30)).fewest_gpus is None


# What a step does.


def test_decoding_attends_over_latents_and_prefill_over_heads() -> None:
    (mla,) = V3.model.attention.values()
    assert isinstance(mla, MLA)
    flops, read = core(mla, Batch(1, queries=1, context=1000))
    assert flops == 1000 * 2 * 128 * (576 + 512)
    assert read == 1000 * 576 * 2
    verifying, shared = core(mla, Batch(1, queries=2, context=1000))
    assert (verifying, shared) == (2 * flops, read)
    prompt, _ = core(mla, Batch(1, queries=1000, context=1000, prefill=True))
    assert prompt == 1000 * 2 * 128 * (192 + 128) * 500


def test_windows_and_choices_bound_what_decoding_reads() -> None:
    windowed = [v for v in load(SPECS / "gpt-oss-20b.yaml").model.attention.values() if getattr(v, "sliding_window", 0)]
    _, read = core(windowed[0], Batch(1, queries=1, context=100_000))
    assert read == 128 * 2 * 8 * 64 * 2
    (sparse,) = load(SPECS / "deepseek-v3.2.yaml").model.attention.values()
    flops, read = core(sparse, Batch(1, queries=1, context=100_000))
    assert read == (2048 * 576 + 100_000 * 128) * 2
    assert flops == 2048 * 2 * 128 * 1088 + 100_000 * 2 * 64 * 129
    verifying, twice = core(sparse, Batch(1, queries=2, context=100_000))
    assert verifying == 2 * flops
    assert twice == (2 * 2048 * 576 + 100_000 * 128) * 2


def test_a_recurrence_reads_and_writes_its_memory_whatever_the_context() -> None:
    (gdn,) = [v for k, v in load(SPECS / "qwen3-next-80b-a3b.yaml").model.attention.items() if k == "gdn"]
    assert core(gdn, Batch(1, 1, 10)) == core(gdn, Batch(1, 1, 10_000)) == (6 * 32 * 128 * 128, 8 * 32 * 128 * 128)


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_experts_that_are_read_are_those_that_a_batch_touches(tiny: Any, tokens: int) -> None:
    moe = moe_of(tiny()).model_copy(update={"num_experts": 6, "num_experts_per_tok": 2})
    picks = list(combinations(range(6), 2))
    untouched = Fraction(sum(0 not in pick for pick in picks), len(picks)) ** tokens
    expected = touched(machine(2), moe, Batch(tokens, 1, 1))
    assert isclose(expected, max(1.0, float(3 * (1 - untouched))))


def test_experts_that_are_read_are_no_more_than_there_are() -> None:
    assert touched(machine(32, use=Efficiency()), moe_of(V3), Batch(10**6, 1, 1)) == 8
    assert touched(machine(32, use=Efficiency()), moe_of(V3), Batch(1, 1, 1)) == 1


def test_an_exchange_sends_a_copy_to_each_expert_when_decoding() -> None:
    seconds = exchange(machine(64), V3.model, moe_of(V3), 128, prefill=False)
    assert isclose(seconds, 128 * 8 * (7168 + 56 * 4 + 7168 * 2) * 7 / 8 / 50e9)
    assert exchange(machine(1), V3.model, moe_of(V3), 128, prefill=False) == 0
    inside = exchange(machine(8), V3.model, moe_of(V3), 128, prefill=False)
    assert isclose(inside, 128 * 7 * (7168 + 56 * 4 + 7168 * 2) / 200e9)


def test_prefill_sends_fewer_copies_than_decoding() -> None:
    moe = moe_of(V3)
    both = [exchange(machine(64), V3.model, moe, 16_384, prefill) for prefill in (True, False)]
    assert both[0] < both[1]
    # Inside one node there is no copy to save.
    inside = exchange(machine(8), V3.model, moe, 128, prefill=True)
    assert isclose(inside, 128 * 8 * 7 / 8 * (7168 * 3 + 224) / 200e9)


# 128 tokens of V3 to 8 experts each: DeepEP's table of kernels for decoding on H800, dispatch and combine; us.
DEEPEP = {8: 77 + 114, 16: 118 + 195, 32: 155 + 273, 64: 173 + 314, 128: 192 + 369, 256: 194 + 360}


@pytest.mark.parametrize("ranks", DEEPEP)
def test_an_exchange_takes_as_long_as_deepep_measured(ranks: int) -> None:
    h800 = load_hardware("h800")
    seconds = exchange(machine(ranks, use=Efficiency(), hardware=h800), V3.model, moe_of(V3), 128, prefill=False)
    assert seconds * 1e6 == pytest.approx(DEEPEP[ranks], rel=0.08)


def test_a_step_of_v3_by_hand() -> None:
    """64 devices with 8,192 sequences of 2,000 tokens: every part of a layer in the numbers of the report."""
    tokens, context = 128, 2000
    scales = 4 / 128**2
    projections = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    absorbed = 512 * 128 * 256
    attention = max(
        2 * (projections - absorbed) * tokens / 2000e12 + 2 * absorbed * tokens / 1000e12,
        projections * (1 + scales) / 3e12,
    )
    core_time = tokens * max(2 * 128 * 1088 * context / 1000e12, 576 * 2 * context / 3e12)
    dense = max(2 * 3 * 7168 * 18432 * tokens / 2000e12, 3 * 7168 * 18432 * (1 + scales) / 3e12)
    expert = 3 * 7168 * 2048
    shared = max(
        2 * expert * tokens / 2000e12 + 2 * 256 * 7168 * tokens / 1000e12,
        (expert * (1 + scales) + 256 * 7168 * 2) / 3e12,
    )
    routed = max(2 * expert * 8 * tokens / 2000e12, 4 * expert * (1 + scales) / 3e12)
    head = max(2 * 129_280 * 7168 * tokens / 1000e12, 129_280 * 7168 * 2 / 3e12)
    sent = tokens * 8 * (7168 * 3 + 224) * 7 / 8 / 50e9
    seconds = 61 * (attention + core_time) + 3 * dense + 58 * (shared + routed + sent) + head
    time = machine(64).time(step_parts(machine(64), V3.model, Batch(8192, 1, context)))
    assert time.seconds == pytest.approx(seconds, rel=1e-3)
    assert time.communication == pytest.approx(58 * sent)


def test_prefill_computes_what_plan_counts_and_the_head_for_the_last_token() -> None:
    parts = list(step_parts(machine(1), V3.model, Batch(1, 4096, 4096, prefill=True)))
    done = sum(part.fp8 + part.bf16 + part.attention for part in parts)
    head = 2 * 129_280 * 7168
    assert done == pytest.approx((83_483_295_744 - head) * 4096 + head, rel=1e-9)


def test_a_cut_matrix_costs_its_share_and_a_reduction() -> None:
    whole, cut = (
        list(step_parts(machine(8, tensor), LLAMA.model, Batch(8 // tensor * 16, 1, 100))) for tensor in (1, 8)
    )
    assert sum(part.bf16 for part in whole) == 8 * sum(part.bf16 for part in cut)
    assert sum(part.read for part in whole) == pytest.approx(8 * sum(part.read for part in cut), rel=1e-3)
    assert sum(part.reduce for part in whole) == 0
    assert sum(part.reduce for part in cut) == pytest.approx(64 * 2 * 16 * 4096 * 2 * 7 / 8 / 200e9)


def test_a_reduction_over_nodes_sends_a_share_between_them() -> None:
    parts = step_parts(machine(16, 16), LLAMA.model, Batch(16, 1, 100))
    output = 2 * 16 * 4096 * 2
    each = output * 7 / 8 / 200e9 + output / 8 / 2 / 50e9
    assert sum(part.reduce for part in parts) == pytest.approx(64 * each)


def test_every_drafting_module_has_its_projection_its_block_and_the_head() -> None:
    one, three = (
        list(draft_parts(machine(32), load(SPECS / "deepseek-v3.yaml", [f"model.mtp.depth={depth}"]).model, DRAFTED))
        for depth in (1, 3)
    )
    assert [part.name for part in one] == [part.name for part in three]
    for first, many in zip(one, three, strict=True):
        assert [3 * x for x in (first.fp8, first.bf16, first.attention, first.read)] == pytest.approx(
            [many.fp8, many.bf16, many.attention, many.read]
        )
    flops = {part.name: part.bf16 for part in one}
    assert flops["mtp.proj"] == 16 * 2 * 2 * 7168**2
    assert flops["mtp.head"] == 16 * 2 * 129_280 * 7168
    assert not list(draft_parts(machine(32), LLAMA.model, DRAFTED))


def test_half_of_the_shorter_hides_behind_the_longer() -> None:
    parts = [Part("both", 0, bf16=3e15, exchange=2.0)]
    half = replace(IDEAL, overlap=0.5)
    time = machine(8, use=half).time(iter(parts))
    assert (time.compute, time.communication, time.seconds) == (3.0, 1.0, 4.0)
    shorter = machine(8, use=half).time(iter([Part("both", 0, bf16=1e15, exchange=2.0)]))
    assert (shorter.compute, shorter.communication, shorter.limit) == (0.5, 2.0, "communication")


@pytest.mark.parametrize(
    ("hardware", "batch", "limit"),
    [
        (faster(network_bandwidth=1e8), 64, "communication"),
        (faster(network_bandwidth=1e15, node_bandwidth=1e15, memory_bandwidth=1e15), 2048, "compute"),
        (faster(network_bandwidth=1e15, node_bandwidth=1e15, memory_bandwidth=1e11), 2048, "memory"),
    ],
)
def test_what_is_scarce_is_what_a_step_waits_for(hardware: Hardware, batch: int, limit: str) -> None:
    chosen = rate(serve(V3, hardware, gpus=32, batch=batch, efficiency=IDEAL).chosen)
    assert chosen.limit == limit
    step = chosen.step
    assert step.seconds == step.compute + step.memory + step.communication + step.latency


def test_a_tiny_model_waits_for_its_launches() -> None:
    assert rate(serve(load(SPECS / "deepseek-v3-nano.yaml"), DEVICE, batch=1).chosen).limit == "latency"


# What it comes to.


def test_larger_batches_give_more_tokens_and_each_sequence_fewer() -> None:
    rows = [rate(row) for row in serve(V3, DEVICE, gpus=64).decode]
    assert len(rows) > 5
    assert all(a.tokens_per_second < b.tokens_per_second for a, b in pairwise(rows))
    assert all(a.per_sequence >= b.per_sequence for a, b in pairwise(rows))


@pytest.mark.parametrize("field", ["memory_bandwidth", "node_bandwidth", "network_bandwidth"])
def test_a_faster_machine_is_never_slower(field: str) -> None:
    slow = serve(V3, DEVICE, gpus=32, batch=1024)
    fast = serve(V3, faster(**{field: 2 * getattr(DEVICE, field)}), gpus=32, batch=1024)
    assert rate(fast.chosen).per_gpu >= rate(slow.chosen).per_gpu
    assert fast.prefill and slow.prefill and fast.prefill.per_gpu >= slow.prefill.per_gpu


def test_longer_contexts_fit_less_and_decode_slower() -> None:
    short, long = (serve(V3, DEVICE, gpus=32, context=length, batch=256) for length in (1024, 8192))
    assert short.largest_batch > long.largest_batch
    assert rate(short.chosen).per_gpu > rate(long.chosen).per_gpu


@pytest.mark.parametrize(
    ("depth", "accepted", "tokens"), [(1, 0.0, 1.0), (1, 0.85, 1.85), (3, 0.5, 1.875), (2, 1.0, 3.0)]
)
def test_a_draft_counts_while_all_before_it_were_accepted(depth: int, accepted: float, tokens: float) -> None:
    spec = load(SPECS / "deepseek-v3.yaml", [f"model.mtp.depth={depth}"])
    serving = serve(spec, DEVICE, gpus=32, batch=32, acceptance=accepted)
    assert serving.tokens_per_step == tokens
    drafted = serving.chosen.mtp
    assert drafted is not None
    assert drafted.per_sequence == pytest.approx(tokens / drafted.step.seconds)
    assert drafted.step.seconds > rate(serving.chosen).step.seconds


def test_drafts_pay_at_small_batches_and_not_where_arithmetic_binds() -> None:
    serving = serve(V3, DEVICE, gpus=144, context=4989, acceptance=0.85)
    first, last = serving.decode[0], serving.decode[-1]
    assert first.mtp and last.mtp
    assert 1.5 < first.mtp.per_gpu / rate(first).per_gpu < 1.85
    assert last.mtp.per_gpu / rate(last).per_gpu < 1.1


def test_dollars_follow_from_the_rate_and_the_price_of_a_device() -> None:
    serving = serve(V3, DEVICE, gpus=32, batch=512, price=3.6)
    assert rate(serving.chosen).usd_per_million == pytest.approx(1000 / rate(serving.chosen).per_gpu)
    assert rate(serve(V3, faster(price=None), gpus=32, batch=512).chosen).usd_per_million is None


def test_a_device_without_fp8_multiplies_at_the_rate_of_bf16() -> None:
    older = faster(peak_flops=DEVICE.peak_flops.model_copy(update={"fp8": None}))
    serving = serve(V3, older, gpus=32, batch=512)
    assert any("no FP8 unit" in sentence for sentence in serving.assumptions)
    assert serving.prefill and serving.prefill.per_gpu < getattr(serve(V3, DEVICE, gpus=32).prefill, "per_gpu", 0)


def test_precision_is_the_specs_unless_said_otherwise() -> None:
    assert serve(V3, DEVICE).precision == "fp8"
    assert serve(V3, DEVICE, precision="bfloat16").fewest_gpus == 24
    assert serve(LLAMA, DEVICE).precision == "bfloat16"
    assert serve(LLAMA, DEVICE, precision="fp8").memory.weights < 10e9


def test_the_layout_is_the_one_that_decodes_the_batch_fastest() -> None:
    alone, many = (serve(LLAMA, DEVICE, gpus=8, batch=batch) for batch in (1, 256))
    assert alone.tensor > many.tensor
    assert many.tensor * many.replicas == 8


# Published rates, tokens per second of a node of eight: hardware, devices, tokens of a prompt, rate.
PREFILL = {
    "DeepSeek's profile, H800": ("h800", 32, 4096, 62_713),
    "SGLang, H100, experts made even": ("h100", 32, 4096, 59_337),
    "SGLang, H100": ("h100", 32, 4096, 50_302),
    "SGLang, H100, shorter": ("h100", 32, 2048, 54_543),
    "SGLang, H100, shortest": ("h100", 32, 1024, 57_674),
}
# The same with sequences of a device and what is accepted of drafts.
DECODE = {
    "SGLang, H100": ("h100", 72, 2000, 256, None, 22_282),
    "SGLang, H100, drafts simulated": ("h100", 72, 4000, 128, 0.6, 17_373),
    "DeepSeek's profile, H800": ("h800", 128, 4096, 128, 0.6, 18_598),
}
PAGE = (ROOT / "docs" / "serving-costs.md").read_text("utf-8")


@pytest.mark.parametrize("name", PREFILL)
def test_prefill_is_predicted_within_an_eighth_of_what_was_published(name: str) -> None:
    hardware, gpus, prompt, published = PREFILL[name]
    predicted = serve(V3, load_hardware(hardware), gpus=gpus, context=prompt).prefill
    assert predicted is not None
    error = 8 * predicted.per_gpu / published - 1
    assert abs(error) < 0.125
    assert f"| {name} | {gpus} | {prompt:,} | {published:,} | {8 * predicted.per_gpu:,.0f} | {error:+.0%} |" in PAGE


@pytest.mark.parametrize("name", DECODE)
def test_decoding_is_predicted_within_a_fifth_of_what_was_published(name: str) -> None:
    hardware, gpus, context, batch, accepted, published = DECODE[name]
    serving = serve(V3, load_hardware(hardware), gpus=gpus, context=context, batch=batch * gpus, acceptance=accepted)
    predicted = serving.chosen.mtp or rate(serving.chosen)
    error = 8 * predicted.per_gpu / published - 1
    assert abs(error) < 0.2
    row = f"| {name} | {gpus} | {batch} | {context:,} | {accepted or ''} | {published:,} |"
    assert f"{row} {8 * predicted.per_gpu:,.0f} | {error:+.0%} |" in PAGE


# The command.

WITHOUT_MTP = ("--set", "model.mtp=null", "--set", "training.losses.mtp=null")


def command(*arguments: object) -> Result:
    """`modelspec plan deepseek-v3 --serve` with these arguments."""
    return CliRunner().invoke(app, ["plan", str(SPECS / "deepseek-v3.yaml"), *map(str, arguments)])


def test_json_has_all_of_it_beside_the_plan() -> None:
    data = json.loads(command("--serve", "--gpus", 32, "--acceptance", 0.8, "--format", "json").stdout)
    assert data["parameters"]["total"] == 671_026_419_200
    serving = data["serving"]
    assert serving["memory"]["weights_of_all"] == 684_868_123_200
    first = serving["decode"][0]
    assert (first["batch"], first["fits"]) == (1, True)
    step = first["mtp"]["step"]
    assert step["seconds"] == pytest.approx(sum(v for k, v in step.items() if k != "seconds"))
    assert first["plain"]["limit"] in step
    assert serving["efficiency"]["imbalance"] == 1.2


def test_every_assumption_is_a_sentence_below_the_numbers() -> None:
    serving = serve(V3, load_hardware("h800"), gpus=32, acceptance=0.8)
    shown = command("--serve", "--gpus", 32, "--acceptance", 0.8).output
    assert len(serving.assumptions) == 10
    assert all(sentence in shown and sentence.endswith(".") for sentence in serving.assumptions)


def test_costs_stand_beside_a_list_price_that_is_given() -> None:
    shown = command("--serve", "--gpus", 32, "--batch", 2048, "--list-price", "0.27,1.10").output
    assert "input tokens cost $0.080; the vendor's list price that was given is $0.27" in shown
    assert "$1.10" in shown
    assert "list price" not in command("--serve", "--gpus", 32).output


def test_imbalance_of_experts_slows_decoding_down_and_is_said() -> None:
    even, uneven = (
        json.loads(command("--serve", "--format", "json", "--imbalance", load).stdout)["serving"] for load in (1, 4)
    )
    assert uneven["chosen"]["plain"]["per_gpu"] < even["chosen"]["plain"]["per_gpu"]
    assert any("has 4 times the mean of tokens" in sentence for sentence in uneven["assumptions"])


def test_a_measured_slowdown_is_said_not_to_count(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: modelspec:hardware/h800\nname: mine\nslowdown: 3\n")
    shown = command("--serve", "--hardware", file).output
    assert "The slowdown of mine, 3, was measured in training" in shown and "is not used here" in shown


def test_a_batch_that_does_not_fit_says_so_and_what_would() -> None:
    shown = command("--serve", "--gpus", 16, "--batch", 5000)
    assert shown.exit_code == 0
    assert "A batch of 5,000 does not fit: at most 912 sequences do." in shown.output
    small = command("--serve", "--gpus", 8).output
    assert "Weights and one sequence need 16 devices." in small
    chosen = json.loads(command("--serve", "--gpus", 8, "--format", "json").stdout)["serving"]
    assert (chosen["chosen"]["fits"], chosen["prefill"]) == (False, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", 8), "--batch goes with --serve"),
        (("--serve", "--context", 163_841), "a context of 163,841 tokens"),
        (("--serve", "--input-tokens", 163_841), "a prompt of 163,841 tokens"),
        (("--serve", "--acceptance", 1.5), "--acceptance"),
        (("--serve", "--list-price", "0.27"), "must be two prices"),
        (("--serve", "--list-price", "0,1"), "above 0"),
        (("--serve", "--acceptance", 0.5, *WITHOUT_MTP), "the spec has no model.mtp"),
        (("--serve", "--tokens", 1e12), "--tokens is of training and does not go with --serve"),
        (("--serve", "--stack", "deepseek-2024-12"), "--stack is of training and does not go with --serve"),
        (("--serve", "--sequence", 512), "--context and --input-tokens say how long sequences are"),
        (("--serve", "--step"), "--step is of training and does not go with --serve"),
        (("--serve", "--modules"), "--modules is of training and does not go with --serve"),
    ],
)
def test_misuse_says_what_is_wrong(arguments: tuple[object, ...], message: str) -> None:
    result = command(*arguments)
    assert result.exit_code == 2
    assert message in result.output and "Traceback" not in result.output


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_spec_can_be_served(path: Path) -> None:
    serving: Serving = serve(load(path), DEVICE)
    assert serving.fewest_gpus == serving.gpus
    assert serving.largest_batch > 0 and serving.chosen.fits and serving.prefill is not None
    json.dumps(serving.as_json())
