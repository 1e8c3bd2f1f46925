"""Every cross-field check speaks where it should, with a reason and what is legal, and is silent where it should."""

import ast
import inspect
from pathlib import Path

import pytest

from modelspec.checks import ADVICE, BOUNDS, CHECKS, check
from modelspec.checks.finding import divisors, legal
from modelspec.diagnostics import CODES, Diagnostic, SpecError
from modelspec.resolve import resolve
from modelspec.validate import check as check_resolved
from modelspec.validate import load

SPECS = Path(__file__).parents[2] / "specs"
NANO = str(SPECS / "deepseek-v3-nano.yaml")
V3 = str(SPECS / "deepseek-v3.yaml")


def diagnostics(path: str, *overrides: str) -> tuple[Diagnostic, ...]:
    return check_resolved(resolve(path, overrides))[1]


YARN = (
    "{type: yarn, factor: 4, original_max_position: 1024, beta_fast: 32, beta_slow: 1, "
    "mscale: 1.0, mscale_all_dim: 1.0}"
)
FP8 = "{format: e4m3, activation_block: [1, 128], weight_block: [128, 128], scales: float32, gemms: [forward]}"

GDN = "{type: gated_deltanet, num_qk_heads: 4, num_v_heads: 6, qk_head_dim: 8, v_head_dim: 8, conv_kernel: 4}"

# Code, what is set on nano, the path of the finding, a piece of its help, severity.
CASES: list[tuple[str, list[str], str, str, str]] = [
    ("MS301", ["model.layers.1.repeat=100000"], "model.layers", "repeat", "error"),
    ("MS302", ["model.layers.1.ffn=mo"], "model.layers.1.ffn", "did you mean 'moe'?", "error"),
    ("MS302", ["model.mtp.layer={attention: gqa, ffn: moe}"], "model.mtp.layer.attention", "there are: mla", "error"),
    (
        "MS303",
        ["model.attention.mla.qk_rope_head_dim=15"],
        "model.attention.mla.qk_rope_head_dim",
        "legal values: 14, 16",
        "error",
    ),
    (
        "MS304",
        ["model.ffn.moe.router.selection.groups.num=3"],
        "model.ffn.moe.router.selection.groups.num",
        "legal values: 2, 4, 8, 16",
        "error",
    ),
    (
        "MS305",
        ["model.ffn.moe.router.selection.groups={num: 1, topk: 1}"],
        "model.ffn.moe.router.selection.groups.num",
        "groups: null",
        "error",
    ),
    (
        "MS306",
        ["model.ffn.moe.router.selection.groups.topk=5"],
        "model.ffn.moe.router.selection.groups.topk",
        "legal values: 1, 2, 3, 4",
        "error",
    ),
    (
        "MS307",
        ["model.ffn.moe.router.selection.groups={num: 16, topk: 8}"],
        "model.ffn.moe.router.selection.groups.score",
        "score: max",
        "error",
    ),
    (
        "MS308",
        ["model.ffn.moe.num_experts_per_tok=9"],
        "model.ffn.moe.num_experts_per_tok",
        "3, 4, 5, 6, 7, 8",
        "error",
    ),
    (
        "MS309",
        [f"model.attention.mla.rope.scaling={YARN.replace('beta_slow: 1', 'beta_slow: 64')}"],
        "model.attention.mla.rope.scaling.beta_fast",
        "at least 64",
        "error",
    ),
    (
        "MS310",
        ["model.ffn.spare={type: dense, intermediate_size: 8, activation: {type: swiglu}}"],
        "model.ffn.spare",
        "remove it",
        "warning",
    ),
    (
        "MS311",
        [f"model.attention.mla.rope.scaling={YARN}", "model.max_position=8192"],
        "model.max_position",
        "at most 4,096",
        "warning",
    ),
    (
        "MS312",
        ["model.ffn.moe.num_experts_per_tok=1"],
        "model.ffn.moe.router.renormalize",
        "renormalize: false",
        "warning",
    ),
    ("MS313", ["model.attention.mla.rope=none"], "model.attention", "rope", "warning"),
    (
        "MS314",
        [
            f"precision.fp8={FP8}",
            "model.ffn.moe.intermediate_size=96",
        ],
        "model.ffn.moe.intermediate_size",
        "128",
        "warning",
    ),
    (
        "MS321",
        ["precision.fp8=" + FP8.replace("[1, 128]", "[1, 64]")],
        "precision.fp8.activation_block",
        "only 1 x 128 is computed",
        "warning",
    ),
    (
        "MS321",
        ["precision.fp8=" + FP8.replace("[128, 128]", "[64, 128]")],
        "precision.fp8.weight_block",
        "only 128 x 128 is computed",
        "warning",
    ),
    ("MS322", [f"precision.fp8={FP8}", "precision.compute=float64"], "precision.compute", "float32", "error"),
    ("MS323", [f"precision.fp8={FP8}"], "precision.fp8.weight_block", "multiples of 128", "info"),
    ("MS320", [f"model.attention.mla={GDN}"], "model.attention.mla.num_qk_heads", "legal values: 1, 2, 3, 6", "error"),
    (
        "MS401",
        ["parallelism.world_size=4", "parallelism.pipeline.size=3"],
        "parallelism.pipeline.size",
        "legal values: 1, 2, 4",
        "error",
    ),
    (
        "MS402",
        ["parallelism.world_size=4", "parallelism.data.replicate=3"],
        "parallelism.data.replicate",
        "1, 2, 4",
        "error",
    ),
    ("MS403", ["parallelism.world_size=4", "parallelism.expert=8"], "parallelism.expert", "1, 2, 4", "error"),
    (
        "MS404",
        ["parallelism.world_size=3", "parallelism.expert=3", "training.stages.0.batch_size=9"],
        "parallelism.expert",
        "1, 2, 4, 8",
        "error",
    ),
    (
        "MS407",
        ["parallelism.world_size=8", "parallelism.tensor=8", f"model.attention.mla={GDN.replace('6', '4')}"],
        "parallelism.tensor",
        "legal values: 1, 2, 4",
        "error",
    ),
    ("MS407", ["parallelism.world_size=8", "parallelism.tensor=8"], "parallelism.tensor", "1, 2, 4", "error"),
    (
        "MS408",
        ["parallelism.world_size=8", "parallelism.pipeline={size: 8}"],
        "parallelism.pipeline.size",
        "1, 2, 3, 4",
        "error",
    ),
    (
        "MS408",
        ["parallelism.world_size=4", "parallelism.pipeline={size: 4, schedule: zbv}"],
        "parallelism.pipeline.size",
        "1, 2",
        "error",
    ),
    (
        "MS409",
        ["parallelism.world_size=2", "parallelism.pipeline={size: 2, schedule: 1f1b, stages_per_rank: 2}"],
        "parallelism.pipeline.stages_per_rank",
        "interleaved",
        "error",
    ),
    (
        "MS410",
        ["parallelism.world_size=2", "parallelism.context=2", "training.stages.0.sequence_length=254"],
        "training.stages.0.sequence_length",
        "252, 256",
        "error",
    ),
    ("MS411", ["parallelism.world_size=3"], "training.stages.0.batch_size", "6, 9", "error"),
    (
        "MS412",
        [
            "parallelism.world_size=2",
            "parallelism.pipeline={size: 2, schedule: dualpipev}",
            "training.stages.0.batch_size=2",
        ],
        "training.stages.0.batch_size",
        "at least 4 sequences",
        "error",
    ),
    (
        "MS413",
        ["parallelism.world_size=4", "parallelism.tensor=4", "model.vocab_size=4098"],
        "parallelism.tensor",
        "1, 2, 3, 6",
        "error",
    ),
    (
        "MS413",
        ["parallelism.world_size=4", "parallelism.tensor=4", "model.ffn.moe.intermediate_size=130"],
        "parallelism.tensor",
        "1, 2, 5",
        "error",
    ),
    (
        "MS413",
        [
            "parallelism.world_size=4",
            "parallelism.tensor=4",
            "model.attention.mla=null",
            "model.attention.mla={type: gqa, num_heads: 12, num_kv_heads: 6, head_dim: 16, rope: none}",
        ],
        "parallelism.tensor",
        "1, 2, 3, 6, 12",
        "error",
    ),
    (
        "MS414",
        ["parallelism.world_size=2", "parallelism.context=2", f"model.attention.mla={GDN.replace('6', '4')}"],
        "parallelism.context",
        "legal values: 1",
        "error",
    ),
    (
        "MS415",
        ["parallelism.world_size=8", "parallelism.gpus_per_node=2", "parallelism.tensor=4"],
        "parallelism.tensor",
        "stay inside a node: 1, 2",
        "warning",
    ),
    (
        "MS416",
        ["parallelism.world_size=6", "parallelism.gpus_per_node=4", "training.stages.0.batch_size=6"],
        "parallelism.world_size",
        "nearest legal values: 4, 8; or set parallelism.gpus_per_node=3",
        "warning",
    ),
    ("MS501", ["training.stages.0.steps=null"], "training.stages.0", "tokens or steps", "error"),
    ("MS501", ["training.stages.0.tokens=1e6"], "training.stages.0.steps", "keep one", "error"),
    (
        "MS503",
        ["training.stages.0.learning_rate=[{until_steps: 9, value: 1}, {until_steps: 9, value: 2}, {value: 1}]"],
        "training.stages.0.learning_rate.1.until_steps",
        "not lengths",
        "error",
    ),
    (
        "MS503",
        ["training.stages.0.learning_rate=[{ramp: [0, 1]}, {value: 1}]"],
        "training.stages.0.learning_rate.0",
        "until_tokens or until_steps",
        "error",
    ),
    (
        "MS503",
        ["training.stages.0.learning_rate=[{cosine: [0, 1]}]"],
        "training.stages.0.learning_rate.0",
        "until_tokens or until_steps",
        "error",
    ),
    (
        "MS504",
        ["training.stages.0.learning_rate=[{until_steps: 100, value: 1}]"],
        "training.stages.0.learning_rate.0.until_steps",
        "at least 400",
        "error",
    ),
    (
        "MS505",
        ["training.losses.mtp=[{until_tokens: 10e12, value: 1}, {value: 0}]"],
        "training.losses.mtp.0.until_tokens",
        "shorten",
        "warning",
    ),
    ("MS506", ["model.max_position=128"], "training.stages.0.sequence_length", "at most 128", "error"),
    (
        "MS507",
        [f"model.attention.mla.rope.scaling={YARN}"],
        "training.stages.0.sequence_length",
        "rope_scaling: none",
        "warning",
    ),
    ("MS508", ["model.mtp=null"], "training.losses.mtp", "mtp: null", "error"),
    ("MS508", ["training.losses.mtp=null"], "training.losses", "training.losses.mtp", "error"),
    (
        "MS509",
        ["model.ffn.moe.router.selection.bias=false"],
        "training.router_bias_update_speed",
        "remove it",
        "error",
    ),
    (
        "MS510",
        ["training.router_bias_update_speed=null"],
        "model.ffn.moe.router.selection.bias",
        "router_bias_update_speed",
        "warning",
    ),
    (
        "MS511",
        ["model.layers=[{attention: mla, ffn: dense}]", "model.ffn.moe=null", "training.router_bias_update_speed=null"],
        "training.losses.balance",
        "balance: null",
        "error",
    ),
    ("MS512", ["data.tokenizer.vocab_size=5000"], "data.tokenizer.vocab_size", "4096", "error"),
]


@pytest.mark.parametrize(
    ("code", "overrides", "path", "help", "severity"), CASES, ids=[f"{case[0]}-{case[2]}" for case in CASES]
)
def test_check_speaks_at_the_dependent_key(
    code: str, overrides: list[str], path: str, help: str, severity: str
) -> None:
    found = [each for each in diagnostics(NANO, *overrides) if each.code == code]
    assert [each.path for each in found] == [path], diagnostics(NANO, *overrides)
    assert found[0].severity == severity
    assert help in (found[0].help or "")


def test_fp8_says_which_layers_leave_blocks_part_empty_and_how_much_that_costs() -> None:
    found = [each.message for each in diagnostics(NANO, f"precision.fp8={FP8}") if each.code == "MS323"]
    # Per token and layer: a full table by hand. Four layers and MTP's share attention, one has the dense network.
    attention = {(96, 256): 128 * 256, (192, 96): 256 * 128, (80, 256): 128 * 256, (256, 64): 256 * 128}
    inside = sum(rows * columns for rows, columns in attention) + 256 * 128
    whole = sum(attention.values()) + 256 * 128
    full = 3 * 768 * 256 + 4 * (4 + 1) * 3 * 128 * 256
    assert f"add {(5 * whole + full) / (5 * inside + full) - 1:.0%} to the work" in found[0]
    assert "kv_b_proj (256 x 64) +100%, q_b_proj (192 x 96) +78%, kv_a_proj (80 x 256) +60%" in found[0]
    assert "gate" not in found[0]


def test_empty_parts_of_fp8_blocks_are_those_of_a_tensor_rank() -> None:
    over = ["training=null", "parallelism=null", "parallelism={world_size: 32, tensor: 32}"]
    (found,) = [each for each in diagnostics(V3, *over) if each.code == "MS323"]
    # Of the shared expert's width of 2048 a rank has half a block; heads fill theirs.
    assert "on each of 32 tensor ranks: " in found.message
    assert "gate_proj (64 x 7168) +100%" in found.message
    assert "down_proj (7168 x 64) +100%" in found.message
    assert "o_proj" not in found.message
    assert found.help is not None
    assert "4096" in found.help


@pytest.mark.parametrize(
    ("code", "overrides", "told"),
    [
        (
            "MS321",
            ["precision.fp8=" + FP8.replace("[128, 128]", "[64, 64]")],
            "there are no kernels for blocks of 64 x 64; WHICH would need them, so that building or training the model "
            "is refused",
        ),
        (
            "MS322",
            [f"precision.fp8={FP8}", "precision.compute=float64"],
            "FP8 products give BF16 or FP32, not FP64, in WHICH",
        ),
    ],
)
def test_what_fp8_has_no_products_for_names_the_weights(code: str, overrides: list[str], told: str) -> None:
    (found,) = [each for each in diagnostics(NANO, *overrides) if each.code == code]
    # Four layers and that of multi-token prediction, one of them dense; the others have experts and a shared one.
    attention = [f"5 {name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj", "o_proj")]
    ffn = [f"5 {name}" for name in ("gate_proj", "up_proj", "down_proj")]
    kinds = {*attention, *ffn, "4 experts.gate_up_proj", "4 experts.down_proj", "1 proj"}
    before, after = told.split("WHICH")
    assert found.message.startswith(before + "49 weights (") and found.message.endswith(")" + after)
    assert set(found.message.split("(")[1].split(")")[0].split(", ")) == kinds


def test_v3_fills_its_blocks() -> None:
    assert not {"MS321", "MS322", "MS323"} & {each.code for each in diagnostics(V3)}


def test_expert_parallelism_without_experts_is_an_error() -> None:
    dense = [
        "model.layers=[{attention: mla, ffn: dense}]",
        "model.ffn.moe=null",
        "training=null",
        "parallelism.world_size=2",
        "parallelism.expert=2",
    ]
    assert "MS405" in {each.code for each in diagnostics(NANO, *dense)}


def test_an_inherited_variant_that_no_layer_uses_is_only_mentioned(tmp_path: Path) -> None:
    leaf = tmp_path / "leaf.yaml"
    leaf.write_text("extends: modelspec:deepseek-v3\nname: leaf\nmodel:\n  layers: [{attention: mla, ffn: moe}]\n")
    found = diagnostics(str(leaf), "parallelism=null", "training=null")
    assert [(each.code, each.severity, each.path) for each in found] == [("MS310", "info", "model.ffn.dense")]


def test_a_recurrence_knows_the_order_of_tokens_without_a_rope() -> None:
    assert "MS313" not in {each.code for each in diagnostics(NANO, f"model.attention.mla={GDN}")}


def test_groups_that_differ_from_nodes_are_a_warning() -> None:
    found = diagnostics(V3, "model.ffn.moe.router.selection.groups.num=16")
    assert [(each.code, each.severity) for each in found if each.severity != "info"] == [("MS406", "warning")]


def test_equal_stage_names_are_an_error() -> None:
    stage = "{name: a, steps: 5, sequence_length: 16, batch_size: 2, learning_rate: 1}"
    found = diagnostics(NANO, f"training.stages=[{stage}, {stage}]", "training.router_bias_update_speed=0.1")
    assert [each.path for each in found if each.code == "MS502"] == ["training.stages.0.name", "training.stages.1.name"]


def test_interleaved_schedules_need_whole_rounds() -> None:
    found = diagnostics(
        NANO,
        "parallelism.world_size=2",
        "parallelism.pipeline={size: 2, schedule: interleaved_1f1b}",
        "training.stages.0.batch_size=7",
    )
    assert "MS412" in {each.code for each in found}


def test_a_stage_is_checked_with_its_own_layout_at_its_own_keys() -> None:
    found = diagnostics(V3, "training.stages.1.parallelism.context=3")
    assert "training.stages.1.parallelism.context" in {each.path for each in found if each.code == "MS401"}


@pytest.mark.parametrize("layout", ["expert=4", "tensor=2", "pipeline.size=2"])
def test_nano_may_be_laid_out_on_four_ranks(layout: str) -> None:
    spec = load(NANO, ["parallelism.world_size=4", f"parallelism.{layout}"])
    assert spec.parallelism.world_size == 4


@pytest.mark.parametrize("path", sorted(str(path) for path in SPECS.glob("*.yaml")), ids=lambda path: Path(path).stem)
def test_shipped_specs_have_neither_errors_nor_warnings(path: str) -> None:
    assert [each for each in diagnostics(path) if each.severity != "info"] == []


def test_the_ramp_of_v3_begins_with_too_few_microbatches_and_says_so() -> None:
    (found,) = diagnostics(V3)
    assert (found.code, found.severity, found.path) == ("MS412", "info", "training.stages.0.batch_size.0.ramp")


def test_all_findings_come_in_one_pass() -> None:
    with pytest.raises(SpecError) as error:
        load(NANO, ["model.ffn.moe.num_experts=15", "parallelism.world_size=3", "data.tokenizer.vocab_size=5000"])
    assert {"MS304", "MS411", "MS512"} <= {each.code for each in error.value.diagnostics}


def test_every_check_has_a_docstring_and_every_case_a_check() -> None:
    checks = {**BOUNDS, **CHECKS}
    assert all(function.__doc__ for function in checks.values())
    assert {case[0] for case in CASES} <= checks.keys()
    assert list(check(load(NANO))) == []
    assert not checks.keys() & CODES.keys()


def test_a_check_is_advice_where_each_of_its_findings_says_so() -> None:
    for code, function in CHECKS.items():
        tree = ast.parse(inspect.getsource(function))
        calls = [each for each in ast.walk(tree) if isinstance(each, ast.Call) and ast.unparse(each.func) == "Finding"]
        severities = [key.value for call in calls for key in call.keywords if key.arg == "severity"]
        told = [each.value for each in severities if isinstance(each, ast.Constant)]
        only_advises = len(told) == len(calls) > 0 and "error" not in told
        assert only_advises == (code in ADVICE), code


@pytest.mark.parametrize(("number", "expected"), [(1, [1]), (12, [1, 2, 3, 4, 6, 12]), (49, [1, 7, 49])])
def test_divisors(number: int, expected: list[int]) -> None:
    assert divisors(number) == expected


def test_legal_values_are_the_nearest_ones() -> None:
    assert legal([1, 2, 4, 8, 16, 32, 64], 30, shown=3) == "nearest legal values: 8, 16, 32"
    assert legal([1, 2], 30) == "legal values: 1, 2"
    assert legal([], 3) == "no value is legal here"


def test_a_product_that_stands_twice_is_told_at_its_list() -> None:
    twice = FP8.replace("[forward]", "[forward, forward]")
    (found,) = diagnostics(NANO, f"precision.fp8={twice}")
    assert found.path == "precision.fp8.gemms" and "forward stands twice" in found.message
