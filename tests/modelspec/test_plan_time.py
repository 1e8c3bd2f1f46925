"""The time of a step and of training: what it is made of against counts, what comes out against published figures."""

import csv
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from modelspec.hardware import load as load_hardware
from modelspec.hardware import names
from modelspec.hardware.calibration import calibration
from modelspec.plan.flops import flops
from modelspec.plan.ideal import Ideal, Passes, stage_passes
from modelspec.plan.step import Speed, Steps, speed
from modelspec.plan.training import Training, stages_of_training, training
from modelspec.schema import ModelSpec
from modelspec.schema.calibration import Rates
from modelspec.schema.hardware import Hardware
from modelspec.timeline import steps_by_batch_size
from modelspec.validate import load

ROOT = Path(__file__).parents[2]
V3 = str(ROOT / "specs" / "deepseek-v3.yaml")
H800 = load_hardware("h800")
# Everything at its peak, and nothing waits.
PEAKS = Rates(**(dict.fromkeys(Rates.model_fields, 1.0) | {"layer": 1e-12, "moe_layer": 1e-12, "expert_rows": 1e-9}))
AT_PEAK = Speed(PEAKS, "peaks", 1.0, 1.0, 1.0)


def own(hardware: Hardware = H800) -> Speed:
    return speed(calibration(), hardware)


def planned(*overrides: str, **options: Any) -> Training:
    return training(load(V3, overrides), H800, own(), **options)


def alone(name: str, *overrides: str) -> ModelSpec:
    """A shipped spec on one device."""
    return load(str(ROOT / "specs" / f"{name}.yaml"), ["training=null", "parallelism=null", *overrides])


def whole(spec: ModelSpec, tokens: float, sequence_length: int) -> Ideal:
    return sum(stage_passes(spec, tokens, sequence_length, H800), Passes()).all


@pytest.mark.parametrize(
    "name", ["deepseek-v3", "llama-3.1-8b", "qwen3-next-80b-a3b", "gpt-oss-20b", "deepseek-v2-lite"]
)
def test_ideal_seconds_hold_every_flop_that_is_counted(name: str) -> None:
    spec = alone(name, "precision={compute: bfloat16}")
    found, counted = whole(spec, 4096, 4096), flops(spec, 4096)
    # Attention's core is 3 passes in the count and 3.5 in time: its backward pass computes the scores again.
    wide = (found.products + found.attention * 3 / 3.5) * H800.peak_flops.bfloat16
    assert H800.peak_flops.fp8 is not None
    narrow = found.fp8_products * H800.peak_flops.fp8
    assert wide + narrow == pytest.approx(4096 * float(counted.training_with_mtp), rel=1e-9)


def test_fp8_runs_the_products_that_it_names_at_its_own_peak() -> None:
    fp8 = "format: e4m3, activation_block: [1, 128], weight_block: [128, 128], scales: float32"
    wide = alone("llama-3.1-8b", "precision={compute: bfloat16}")
    narrow = alone("llama-3.1-8b", f"precision={{compute: bfloat16, fp8: {{{fp8}, gemms: [forward]}}}}")
    before, after = whole(wide, 4096, 4096), whole(narrow, 4096, 4096)
    head = 2 * 128256 * 4096 * 4096 / H800.peak_flops.bfloat16
    third = before.products / 3 - head
    assert after.products == pytest.approx(before.products - third)
    assert H800.peak_flops.fp8 is not None
    assert after.fp8_products == pytest.approx(third * H800.peak_flops.bfloat16 / H800.peak_flops.fp8)
    assert before.quantize == 0 < after.quantize


def test_every_axis_divides_the_work_of_a_rank() -> None:
    spec = load(V3)
    cut = load(V3, ["parallelism.tensor=2", "parallelism.pipeline.size=8"])
    stages = sum(stage_passes(spec, 4096, 4096, H800), Passes()).all
    halved = sum(stage_passes(cut, 4096, 4096, H800), Passes()).all
    assert halved.fp8_products == pytest.approx(stages.fp8_products / 2)
    assert halved.attention == pytest.approx(stages.attention / 2)
    assert halved.tensor > 0 == stages.tensor


def test_one_device_takes_the_sum_of_its_work() -> None:
    spec = alone("llama-3.1-8b", "precision={compute: bfloat16}", "parallelism={microbatch_size: 1}")
    step = Steps(spec, 4096, H800, AT_PEAK).step(3)
    assert step.microbatches == 3
    assert step.seconds == pytest.approx(sum(step.kinds.values()))
    assert step.bubble == step.exposed == 0
    assert step.kinds["products"] == pytest.approx(3 * whole(spec, 4096, 4096).products)


def test_a_pipeline_of_equal_stages_has_the_bubble_of_the_closed_form() -> None:
    pipeline = "parallelism={world_size: 4, pipeline: {size: 4}}"
    # A vocabulary of two words has no head to speak of: 32 layers make four equal stages.
    spec = alone("llama-3.1-8b", "precision={compute: bfloat16}", "model.vocab_size=2", pipeline)
    at_once = H800.model_copy(update={"node_bandwidth": 1e30})
    for count in (4, 16, 200):
        step = Steps(spec, 4096, at_once, AT_PEAK).step(count)
        assert step.bubble == pytest.approx(3 / (count + 3), abs=1e-4)


def test_a_growing_batch_that_is_too_small_for_dualpipev_runs_zbv() -> None:
    steps = Steps(load(V3), 4096, H800, own())
    assert steps.step(3072).schedule == "zbv"
    assert steps.step(15360).schedule == "dualpipev"


def test_imbalance_slows_down_what_experts_do() -> None:
    even, uneven = planned(), planned(imbalance=1.5)
    before, after = (each.stages[0].step.kinds for each in (even, uneven))
    assert after["network"] == pytest.approx(1.5 * before["network"])
    assert after["attention"] == before["attention"]
    assert uneven.gpu_hours is not None
    assert even.gpu_hours is not None
    assert uneven.gpu_hours > even.gpu_hours


def test_pretraining_of_v3_takes_what_its_report_says() -> None:
    found = planned()
    pretraining, *extension = found.stages
    # 2,664K H800 hours on 2,048 devices, of 14.8T tokens: 180K hours for each trillion.
    assert pretraining.gpu_hours == pytest.approx(2664e3, rel=0.05)
    assert pretraining.steps == 242940
    assert pretraining.step.microbatches == 120
    assert [stage.sequence_length for stage in extension] == [32768, 131072]
    assert found.gpu_hours == pytest.approx(sum(stage.gpu_hours for stage in found.stages))
    assert found.cost_usd == pytest.approx(2 * (found.gpu_hours or 0))
    assert found.energy_kwh == pytest.approx(0.7 * (found.gpu_hours or 0))
    assert found.days == pytest.approx((found.gpu_hours or 0) / 2048 / 24)


def test_utilisation_is_flops_over_peak_in_each_way_of_counting() -> None:
    found = planned()
    rate, used = found.tokens_per_second_per_gpu, found.utilization
    assert used.flops_per_second == pytest.approx(rate * 250.449887232e9)
    assert used.flops_per_second_with_mtp == pytest.approx(rate * 260.641652736e9)
    assert used.bfloat16 == pytest.approx(used.flops_per_second / 989.4e12)
    assert used.fp8_with_mtp == pytest.approx(used.flops_per_second_with_mtp / 1978.9e12)


def test_tokens_replace_the_first_stage_and_a_price_the_listed_one() -> None:
    found = planned(tokens=10**12, price=3.5)
    assert found.stages[0].tokens == pytest.approx(10**12, rel=1e-3)
    assert [stage.name for stage in found.stages] == ["pretrain", "context-32k", "context-128k"]
    assert found.cost_usd == pytest.approx(3.5 * (found.gpu_hours or 0))


def test_a_spec_without_training_has_a_rate_and_no_length() -> None:
    spec = alone("llama-3.1-8b", "parallelism={world_size: 16, pipeline: {size: 2}}")
    found = training(spec, H800, own())
    # Eight sequences for each of 16 devices, one at a time through pipelines of two.
    assert found.stages[0].step.microbatches == 16
    assert found.tokens_per_second_per_gpu > 0
    assert found.gpu_hours is found.days is found.cost_usd is found.tokens is None
    told = training(spec, H800, own(), tokens=10**9)
    assert told.tokens == pytest.approx(10**9, rel=1e-3)
    assert (told.gpu_hours or 0) * 3600 * told.tokens_per_second_per_gpu == pytest.approx(told.tokens or 0)


def test_a_growing_batch_is_interpolated_closely() -> None:
    spec, stage = next(iter(stages_of_training(load(V3))))
    steps = Steps(spec, stage.sequence_length, H800, own())
    exact = sum(count * steps.step(size).seconds for size, count in steps_by_batch_size(stage) if size < 15360)
    constant = next(count for size, count in steps_by_batch_size(stage) if size == 15360) * steps.step(15360).seconds
    assert planned().stages[0].seconds - constant == pytest.approx(exact, rel=0.02)


def test_a_stack_is_named_or_refused() -> None:
    assert speed(calibration(), H800).stack == H800.stack
    with pytest.raises(ValueError, match="no stack 'megatron'; there are deepseek-2024-12"):
        speed(calibration(), H800, "megatron")


def test_a_measured_slowdown_wins_over_the_calibrated_one() -> None:
    assert speed(calibration(), H800).device == calibration().devices["h800"]
    assert speed(calibration(), H800.model_copy(update={"slowdown": 2.5})).device == 2.5
    assert speed(calibration(), H800.model_copy(update={"name": "of-mine"})).device == 1.0


def test_every_calibrated_device_names_a_stack_that_is_calibrated_and_others_are_told() -> None:
    for name in names():
        hardware = load_hardware(name)
        assert (hardware.stack in calibration().stacks) == (name in calibration().devices)
        told = " ".join(training(alone("llama-3.1-8b"), hardware, own(hardware)).assumptions)
        assert ("No throughput on" in told) == (name not in calibration().devices)


def test_the_committed_errors_are_what_the_model_says_of_each_row() -> None:
    benchmark: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "plan_calibration.py"))
    committed = json.loads((ROOT / "benchmarks" / "results" / "plan-calibration.json").read_text())
    assert committed["calibration"] == json.loads((ROOT / "modelspec" / "hardware" / "calibration.json").read_text())
    rows = benchmark["rows"]()
    with (ROOT / "benchmarks" / "published_throughput.csv").open() as stream:
        assert len(rows) == len(list(csv.DictReader(stream))) == len(committed["rows"])
    # Every seventh is enough to tell that the model has changed since.
    for row, told in list(zip(rows, committed["rows"], strict=True))[::7]:
        hardware = load_hardware(row.hardware)
        step = Steps(row.spec, row.sequence, hardware, speed(calibration(), hardware, row.stack)).step(row.batch)
        assert row.seconds / step.seconds - 1 == pytest.approx(told["fit_error"], abs=0.01), row


def test_the_median_error_of_every_software_is_within_its_bound() -> None:
    for stack in calibration().stacks.values():
        assert (stack.error is None) == (stack.rows == 1)
        if stack.error is not None:
            assert stack.error <= 0.15, stack


@pytest.mark.parametrize("schedule", ["dualpipev", "zbv", "1f1b"])
def test_a_step_is_the_work_of_its_busiest_rank_less_what_is_hidden_and_what_it_waits(schedule: str) -> None:
    step = Steps(load(V3, [f"parallelism.pipeline.schedule={schedule}"]), 4096, H800, own()).step(15360)
    assert step.seconds == pytest.approx(sum(step.kinds.values()) - step.hidden + step.waiting)
    exchange = step.kinds["node"] + step.kinds["network"]
    assert step.hidden <= exchange
    # A difference of sums, not exactly zero.
    assert (step.hidden > 1e-9) == (schedule == "dualpipev")
    assert step.seconds >= sum(step.kinds.values()) - exchange


@pytest.mark.parametrize("schedule", ["dualpipev", "zbv", "1f1b"])
def test_a_faster_network_never_makes_a_step_longer(schedule: str) -> None:
    spec = load(V3, [f"parallelism.pipeline.schedule={schedule}"])
    times = [
        Steps(spec, 4096, H800.model_copy(update={"network_bandwidth": bandwidth}), own()).step(15360).seconds
        for bandwidth in (25e9, 50e9, 100e9, 400e9)
    ]
    assert times == sorted(times, reverse=True)
