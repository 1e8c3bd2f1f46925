"""The plan as a whole: parameters as published, costs module by module, its data, its command, its own cost."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from modelspec.cli import app
from modelspec.plan import parameters, plan
from modelspec.schema import MAX_LAYERS
from modelspec.validate import load

SPECS = Path(__file__).parents[2] / "specs"


def test_v3_is_counted_as_published() -> None:
    counts = plan(load(SPECS / "deepseek-v3.yaml")).parameters
    assert counts.total == 671_026_419_200
    assert counts.active == 37_552_297_472
    assert counts.mtp == 11_610_068_224
    assert counts.parts["selection_biases"] == 14_848
    assert counts.parts["routed_experts"] == 653_908_770_816
    assert counts.parts["shared_experts"] == 2_554_331_136
    assert counts.parts["routers"] == 106_430_464
    assert counts.parts["embedding"] == counts.parts["head"] == 926_679_040
    assert counts.parts["dense_ffn"] == 1_189_085_184
    # Latent norms count as norms here, so attention is short of 187,107,328 a layer by 1,536 + 512.
    assert counts.parts["attention"] == 61 * (187_107_328 - 2_048)
    assert sum(counts.parts.values()) == counts.total


def test_counts_follow_the_formulas_of_a_plain_variant() -> None:
    spec = load(
        SPECS / "deepseek-v3-nano.yaml",
        ["model.tie_embeddings=true", "model.attention.mla.q_lora_rank=null", "model.ffn.moe.shared_experts.num=2"],
    )
    d, vocab, heads, kv, nope, rope, v = 256, 4096, 4, 64, 32, 16, 32
    attention = d * heads * (nope + rope) + d * (kv + rope) + kv + kv * heads * (nope + v) + heads * v * d
    moe = (16 + 2) * 3 * d * 128 + 16 * d + 16
    layer_norms = 2 * d
    assert plan(spec).parameters.total == vocab * d + 4 * (attention + layer_norms) + 3 * d * 768 + 3 * moe + d


def test_the_plan_is_plain_data() -> None:
    data = plan(load(SPECS / "deepseek-v3-nano.yaml")).as_json()
    assert data["parameters"]["total"] == 8_166_320


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.yaml")), ids=lambda path: path.stem)
def test_runs_counted_once_are_the_table_of_every_layer(path: Path) -> None:
    spec = load(path)
    main, mtp = spec.model.main_tensors().values(), spec.model.mtp_tensors().values()
    counts = parameters(spec)
    assert counts.total == sum(tensor.numel for tensor in main)
    assert counts.active == sum(tensor.active for tensor in main)
    assert counts.mtp == sum(tensor.numel for tensor in mtp)
    assert counts.mtp_active == sum(tensor.active for tensor in mtp)


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.yaml")), ids=lambda path: path.stem)
def test_modules_add_up_to_the_model(path: Path) -> None:
    result = plan(load(path))
    counts, main = result.parameters, [part for part in result.modules if part.name != "mtp"]
    assert sum(part.parameters for part in result.modules) == counts.total + counts.mtp
    assert sum(part.active for part in result.modules) == counts.active + counts.mtp_active
    assert sum(part.forward_flops for part in main) == result.flops_per_token.forward
    assert sum(part.kv_cache_bytes_per_token for part in main) == result.kv_cache_bytes_per_token
    added = sum(part.forward_flops for part in result.modules if part.name == "mtp")
    assert 3 * added >= result.flops_per_token.training_with_mtp - result.flops_per_token.training >= added


def test_a_pattern_of_layers_is_a_row_for_each_of_its_runs() -> None:
    result = plan(load(SPECS / "qwen3-next-80b-a3b.yaml"))
    assert [(part.name, part.layers) for part in result.modules] == [
        ("embed_tokens", 1),
        ("attention.gdn", 36),
        ("ffn.moe", 36),
        ("attention.gqa", 12),
        ("ffn.moe", 12),
        ("norm", 1),
        ("lm_head", 1),
    ]


def test_a_tied_head_has_no_parameters_and_costs_its_product() -> None:
    (head,) = (
        part
        for part in plan(load(SPECS / "qwen2.5-7b.yaml", ["model.tie_embeddings=true"])).modules
        if part.name == "lm_head"
    )
    assert head.parameters == 0
    assert head.forward_flops == 2 * 152_064 * 3_584


def test_sequences_are_the_first_stages_else_the_longest() -> None:
    assert plan(load(SPECS / "deepseek-v3.yaml")).sequence_length == 4096
    assert plan(load(SPECS / "llama-3.1-8b.yaml")).sequence_length == 131_072
    assert plan(load(SPECS / "llama-3.1-8b.yaml"), sequence_length=1).sequence_length == 1


def command(*arguments: object) -> Result:
    """`modelspec plan` with these arguments."""
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_json_is_plain_data_with_exact_integers() -> None:
    data = json.loads(command(SPECS / "deepseek-v3.yaml", "--format", "json").stdout)
    assert data["flops_per_token"] == {
        "forward": 83_483_295_744,
        "training": 250_449_887_232,
        "training_with_mtp": 260_641_652_736,
        "training_with_recompute": 267_402_870_784,
    }
    assert data["kv_cache_bytes_per_token"] == 70_272
    assert data["state_bytes_per_sequence"] == 0
    assert data["checkpoint_bytes"]["hugging_face_fp8"] == 688_574_839_360
    assert all(type(value) is int for value in data["flops_per_token"].values())
    assert len(data["assumptions"]) == 2


def test_half_positions_of_a_window_are_kept_until_they_are_data() -> None:
    result = plan(load(SPECS / "gpt-oss-20b.yaml"), sequence_length=1000)
    assert result.flops_per_token.forward.denominator == 125
    assert result.as_json()["flops_per_token"]["forward"] == float(result.flops_per_token.forward)


def test_the_convention_is_said_with_the_numbers_and_only_that_of_this_model() -> None:
    shown = command(SPECS / "deepseek-v3.2.yaml").output
    assert "half of the sequence" in shown and "at most topk keys" in shown
    assert "window" not in shown and "DeltaNet" not in shown


def test_modules_are_shown_on_request() -> None:
    rows = command(SPECS / "deepseek-v3.yaml", "--modules").output.splitlines()
    assert any(
        row.split() == ["lm_head", "1", "926,679,040", "926,679,040", "1,853,358,080", "2.22%", "0"] for row in rows
    )


@pytest.mark.parametrize("length", [0, -1, 163_841, "many"])
def test_a_sequence_that_the_model_is_not_meant_for_is_misuse(length: object) -> None:
    result = command(SPECS / "deepseek-v3.yaml", "--sequence", length)
    assert result.exit_code == 2
    assert "--sequence" in result.output and "Traceback" not in result.output


def test_as_many_layers_as_a_spec_may_have_cost_no_more_to_count(tmp_path: Path) -> None:
    deep = load(SPECS / "llama-3.1-8b.yaml", [f"model.layers=[{{repeat: {MAX_LAYERS}, attention: gqa, ffn: dense}}]"])
    start = time.process_time()
    counts = plan(deep).parameters
    assert time.process_time() - start < 1.0
    layer = (8_030_261_248 - 2 * 128_256 * 4_096 - 4_096) // 32
    assert counts.total == MAX_LAYERS * layer + 2 * 128_256 * 4_096 + 4_096


@pytest.mark.parametrize("change", ["model.vocab_size=1000000000000000", "model.layers.1.repeat=1000000000"])
def test_absurd_sizes_are_refused_before_anything_is_counted(change: str) -> None:
    start = time.process_time()
    result = command(SPECS / "deepseek-v3.yaml", "--set", change)
    assert time.process_time() - start < 1.0
    assert result.exit_code == 1


def test_a_plan_needs_no_torch_and_little_memory() -> None:
    code = (
        "import psutil, sys; from modelspec.cli import app\n"
        "app(['plan', 'specs/deepseek-v3.yaml', '--format', 'json'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert psutil.Process().memory_info().rss < 300 * 2**20\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=SPECS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
