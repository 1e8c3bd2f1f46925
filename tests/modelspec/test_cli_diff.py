"""The command diff: what it reads, what it prints, how it ends."""

import json
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from markdown_it import MarkdownIt

from modelspec.amount import amount_of_bytes
from modelspec.cli import app

NANO = Path(__file__).parents[2] / "specs" / "deepseek-v3-nano.yaml"

SMALL = """\
spec_version: 1
name: small
model:
  vocab_size: 64
  hidden_size: 32
  max_position: 128
  init: {std: 0.02}
  norm: {type: rmsnorm, eps: 1.0e-6}
  attention: {gqa: {type: gqa, num_heads: 4, num_kv_heads: 2, head_dim: 8, rope: {theta: 10000, layout: half_split}}}
  ffn: {dense: {type: dense, intermediate_size: 64, activation: {type: swiglu}}}
  layers: [{repeat: 2, attention: gqa, ffn: dense}]
"""


def run(*arguments: object) -> Result:
    """The command with these arguments."""
    return CliRunner().invoke(app, ["diff", *map(str, arguments)])


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two specs: the second has other heads, another eps, one more layer, and another name."""
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text(SMALL)
    changed = SMALL.replace("num_kv_heads: 2", "num_kv_heads: 4").replace("1.0e-6", "1.0e-5")
    new.write_text(changed.replace("repeat: 2", "repeat: 3").replace("name: small", "name: wider"))
    return old, new


def test_text_lists_changes_by_class_and_what_they_come_to(pair: tuple[Path, Path]) -> None:
    result = run(*pair)
    assert result.exit_code == 0
    assert (
        result.output
        == """\
small -> wider

checkpoint-breaking
  ~ model.attention.gqa.num_kv_heads  2 -> 4
  ~ model.layers                      2 x gqa/dense -> 3 x gqa/dense

convergence
  ~ model.norm.eps  1e-06 -> 1e-05

cosmetic
  ~ name  small -> wider

2 checkpoint-breaking, 1 convergence, 1 cosmetic
total parameters: 22,688 -> 35,040 (+12,352)
active parameters: 22,688 -> 35,040 (+12,352)
forward pass, FLOPs per token of sequences of 128: 57.34 KFLOP -> 90.11 KFLOP (+57.14%)
training, FLOPs per token of sequences of 128: 172.03 KFLOP -> 270.34 KFLOP (+57.14%)
cache bytes per token: 256 -> 768 (+512)
checkpoint, weights: 90.75 KB -> 140.16 KB (+54.44%)
checkpoint, optimizer: 181.59 KB -> 280.44 KB (+54.44%)
checkpoint, Hugging Face BF16: 45.38 KB -> 70.08 KB (+54.44%)
checkpoint, Hugging Face FP8: 27.00 KB -> 39.44 KB (+46.09%)
tensors: 9 new, 0 gone, 4 reshaped; 14.40K parameters must be initialised anew
  + layers.2.attention_norm.weight        [32]
  + layers.2.attention.q_proj.weight      [32, 32]
  + layers.2.attention.k_proj.weight      [32, 32]
  + layers.2.attention.v_proj.weight      [32, 32]
  + layers.2.attention.o_proj.weight      [32, 32]
  + layers.2.ffn_norm.weight              [32]
  + layers.2.ffn.gate_proj.weight         [64, 32]
  + layers.2.ffn.up_proj.weight           [64, 32]
  + layers.2.ffn.down_proj.weight         [32, 64]
  ~ layers.{0-1}.attention.k_proj.weight  [16, 32] -> [32, 32]
  ~ layers.{0-1}.attention.v_proj.weight  [16, 32] -> [32, 32]
"""
    )


def test_every_format_has_what_training_takes_on_the_hardware(tmp_path: Path) -> None:
    wider = tmp_path / "wider.yaml"
    wider.write_text("extends: modelspec:deepseek-v3-nano\nname: wider\nmodel: {hidden_size: 512}\n")
    sides = NANO, wider
    summary = json.loads(run(*sides, "--hardware", "h200", "--format", "json").stdout)["summary"]
    (less, more), (few, many) = summary["memory_bytes"], summary["gpu_hours"]
    assert less < more and few < many and summary["hardware"] == "h200"
    was, now = (f"{amount_of_bytes(count)} FITS in pretrain" for count in (less, more))
    memory = f"{was} -> {now} ({more / less - 1:+.2%})"
    hours = f"{few:.3g} -> {many:.3g} GPU hours ({many / few - 1:+.2%})"
    before, after = summary["cost_usd"]
    lines = [
        f"memory of the heaviest h200 in the stage that needs most: {memory}",
        f"training on h200: {hours}",
        f"cost of training: ${before:.3g} -> ${after:.3g}",
    ]
    text = run(*sides, "--hardware", "h200").output.splitlines()
    assert [line for line in lines if line not in text] == []
    markdown = run(*sides, "--hardware", "h200", "--format", "markdown").output.splitlines()
    assert [line for line in lines if f"- {line}" not in markdown] == []
    page = run(*sides, "--hardware", "h200", "--format", "html").output
    for said in (
        amount_of_bytes(more),
        f"in pretrain on h200, was {amount_of_bytes(less)} FITS",
        f"was {few:.3g}, on h200",
    ):
        assert said in page
    swapped = json.loads(run(*reversed(sides), "--hardware", "h200", "--format", "json").stdout)["summary"]
    for key in ("memory_bytes", "gpu_hours", "cost_usd"):
        assert swapped[key] == summary[key][::-1]
    assert "h800" in run(*sides).output and "on h" not in run(NANO, NANO).output


def test_hardware_that_is_not_there_is_one_message(pair: tuple[Path, Path]) -> None:
    result = run(*pair, "--hardware", "h801", "--format", "json")
    assert result.exit_code == 2 and json.loads(result.stdout)["diagnostics"][0]["code"] == "MS001"


def test_a_spec_and_itself_have_no_change(pair: tuple[Path, Path]) -> None:
    result = run(pair[0], pair[0], "--breaking")
    assert (result.exit_code, result.output) == (0, "small -> small\n\nno change\n")


def test_json_is_one_document(pair: tuple[Path, Path]) -> None:
    document = json.loads(run(*pair, "--format", "json").stdout)
    assert document["changes"][-1] == {
        "path": "model.layers",
        "before": [{"repeat": 2, "attention": "gqa", "ffn": "dense"}],
        "after": [{"repeat": 3, "attention": "gqa", "ffn": "dense"}],
        "class": "checkpoint-breaking",
    }
    assert document["summary"]["classes"]["checkpoint-breaking"] == 2
    assert document["summary"]["parameters"]["total"] == [22688, 35040]
    assert document["summary"]["sequence_length"] == 128
    assert document["summary"]["flops_per_token"]["forward"] == [57344, 90112]
    assert document["summary"]["kv_cache_bytes_per_token"] == [2 * 2 * 2 * 8 * 4, 3 * 2 * 4 * 8 * 4]
    assert document["summary"]["checkpoint_bytes"]["weights"] == [4 * 22688, 4 * 35040]


def test_markdown_has_a_row_per_change(pair: tuple[Path, Path]) -> None:
    lines = run(*pair, "--format", "markdown").stdout.splitlines()
    assert "| ~ | `model.attention.gqa.num_kv_heads` | 2 | 4 |" in lines
    assert lines[0] == "### small → wider"


def test_json_has_every_tensor_that_changes_with_layers_folded(pair: tuple[Path, Path]) -> None:
    tensors = json.loads(run(*pair, "--format", "json").stdout)["summary"]["tensors"]
    assert sum(group["count"] for group in tensors["new"]) == 9
    assert tensors["gone"] == []
    assert tensors["reshaped"] == [
        {"name": f"layers.{{0-1}}.attention.{name}.weight", "count": 2, "before": [16, 32], "after": [32, 32]}
        for name in ("k_proj", "v_proj")
    ]
    assert tensors["elements"] == (4 * 32 * 32 + 3 * 64 * 32 + 2 * 32) + 2 * 2 * 32 * 32
    large = run("modelspec:deepseek-v3", "modelspec:llama-3.1-405b", "--format", "json").stdout
    assert len(large) < 40_000


def test_people_are_shown_the_first_tensors_and_told_of_the_rest(tmp_path: Path) -> None:
    old, new = "modelspec:deepseek-v3", "modelspec:llama-3.1-405b"
    tensors = json.loads(run(old, new, "--format", "json").stdout)["summary"]["tensors"]
    left = sum(len(tensors[kind]) for kind in ("new", "gone", "reshaped")) - 20
    assert left > 0
    *_, before, last = run(old, new).stdout.splitlines()
    assert last == f"  and {left} more (--format json lists all)"
    assert before.startswith("  - layers.{")
    *shown, more = run(old, new, "--format", "markdown").stdout.splitlines()[-21:]
    assert all(line.startswith(("  - `+ ", "  - `- ")) for line in shown)
    assert more == f"  - and {left} more (--format json lists all)"
    page = run(old, new, "--format", "html").stdout
    assert all(group["name"] in page for kind in ("new", "gone", "reshaped") for group in tensors[kind])


def test_breaking_decides_the_exit_code(pair: tuple[Path, Path]) -> None:
    old, new = pair
    assert run(old, new, "--breaking").exit_code == 1
    new.write_text(SMALL.replace("1.0e-6", "1.0e-5"))
    assert run(old, new, "--breaking").exit_code == 0


def test_a_waiver_lets_its_change_pass_and_says_why(pair: tuple[Path, Path]) -> None:
    old, new = pair
    waiver = "waivers: [{rule: checkpoint-breaking, path: model.attention.*, reason: retrained from scratch}]\n"
    new.write_text(SMALL.replace("num_kv_heads: 2", "num_kv_heads: 4") + waiver)
    result = run(old, new, "--breaking")
    assert result.exit_code == 0
    assert "waived: retrained from scratch" in result.output
    (change,) = (c for c in json.loads(run(old, new, "--format", "json").stdout)["changes"] if "waived" in c)
    assert change["path"] == "model.attention.gqa.num_kv_heads"
    new.write_text(SMALL.replace("num_kv_heads: 2", "num_kv_heads: 4").replace("repeat: 2", "repeat: 3") + waiver)
    assert run(old, new, "--breaking").exit_code == 1


def test_waivers_are_not_inherited(tmp_path: Path) -> None:
    base, leaf = tmp_path / "base.yaml", tmp_path / "leaf.yaml"
    base.write_text(SMALL + "waivers: [{rule: checkpoint-breaking, path: '*', reason: once}]\n")
    leaf.write_text("extends: base.yaml\nname: leaf\nmodel: {vocab_size: 65}\n")
    assert run(base, leaf, "--breaking").exit_code == 1
    assert run(leaf, base, "--breaking").exit_code == 0


def test_a_run_and_a_hugging_face_config_are_sides_too(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "spec.yaml").write_text(SMALL)
    assert run(pair[0], run_folder).output.endswith("no change\n")
    hub = tmp_path / "hub"
    hub.mkdir()
    for name in ("config.json", "conf.JSON", "config.yaml"):
        (hub / name).write_text(json.dumps({"model_type": "no such family"}))
    for side in (hub, *hub.iterdir()):
        result = run(pair[0], side)
        assert result.exit_code == 1
        assert "no such family" in str(result.exception)


def test_the_same_file_at_a_revision_is_the_old_side(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    git("init", "--quiet")
    (tmp_path / "specs").mkdir()
    base, leaf = tmp_path / "base.yaml", tmp_path / "specs" / "leaf.yaml"
    base.write_text(SMALL)
    leaf.write_text("extends: ../base.yaml\nname: leaf\n")
    git("add", ".")
    git("commit", "--quiet", "-m", "one")
    base.write_text(SMALL.replace("vocab_size: 64", "vocab_size: 65"))
    result = run(leaf, "--against", "git:HEAD", "--breaking")
    assert result.exit_code == 1
    assert "model.vocab_size  64 -> 65" in result.output
    assert "no change" in run(leaf, leaf).output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([NANO], "give OLD and NEW"),
        ([NANO, NANO, "--against", "git:HEAD"], "give OLD and NEW"),
        ([NANO, "--against", "HEAD"], "must be git:REF"),
        ([NANO, "--against", "git:--output=x"], "must be git:REF"),
        ([NANO, "--against", "git:no-such-revision"], "no-such-revision"),
        ([NANO, NANO.parent], "neither spec.yaml nor config.json"),
    ],
)
def test_misuse_is_a_message_and_exit_2(arguments: list[object], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.output


def test_a_spec_that_breaks_a_relation_is_still_compared(pair: tuple[Path, Path]) -> None:
    old, new = pair
    new.write_text(SMALL.replace("num_kv_heads: 2", "num_kv_heads: 3"))
    result = run(old, new)
    assert result.exit_code == 0
    assert "num_kv_heads  2 -> 3" in result.output


def test_costs_are_compared_at_the_shorter_sequence_and_only_where_they_differ(pair: tuple[Path, Path]) -> None:
    old, new = pair
    new.write_text(SMALL.replace("max_position: 128", "max_position: 64"))
    document = json.loads(run(old, new, "--format", "json").stdout)
    assert document["summary"]["sequence_length"] == 64
    assert "FLOPs" not in run(old, new).output
    new.write_text(SMALL + "precision: {compute: bfloat16}\n")
    assert "cache bytes per token: 256 -> 128 (-128)" in run(old, new, "--format", "markdown").output
    new.write_text(SMALL + "  mtp: {depth: 1}\n")
    assert "checkpoint, Hugging Face BF16: 45.38 KB -> none" in run(old, new).output


@pytest.mark.parametrize(
    "summary",
    [
        *(
            "<img src=x>",
            "![x](y)",
            "@user, see #12 and owner/name@12ab",
            "a `b` ``c``",
            "`",
            "``` x",
            "**b** _i_ ~~s~~",
        ),
        *("a | b", "a \\\\| b", "[x]: http://example.org", "www.example.org", "&lt;b&gt;", "https://example.org/?a=1"),
    ],
)
def test_markdown_says_free_text_as_it_is(pair: tuple[Path, Path], summary: str) -> None:
    old, new = pair
    new.write_text(SMALL + f"summary: {json.dumps(summary)}\n")
    text = run(old, new, "--format", "markdown").stdout
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    (cells,) = [
        [token.children or [] for token in tokens[at : at + 20] if token.type == "inline"][:4]
        for at, token in enumerate(tokens)
        if token.type == "tr_open" and "summary" in tokens[at + 5].content
    ]
    # All of it is one piece of code: no link, no picture, no name that would be told, no other cell.
    assert [[child.type for child in cell] for cell in cells] == [["text"], ["code_inline"], ["text"], ["code_inline"]]
    (said,) = cells[3]
    assert said.content in (summary, json.dumps(summary))


def test_a_waiver_needs_a_reason_that_says_something(pair: tuple[Path, Path]) -> None:
    old, new = pair
    new.write_text(SMALL + "waivers: [{rule: checkpoint-breaking, path: '*', reason: ' '}]\n")
    assert run(old, new, "--breaking").exit_code == 1


def test_a_bad_side_is_one_json_document_where_json_is_asked_for(pair: tuple[Path, Path], tmp_path: Path) -> None:
    good, bad = pair
    bad.write_text(SMALL.replace("hidden_size", "hiden_size"))
    (tmp_path / "config.json").write_text('{"model_type": "no such family"}')
    (tmp_path / "empty").mkdir()
    for sides, code, said in (
        ((good, bad), 1, ["MS201"]),
        ((bad, good), 1, ["MS201"]),
        ((bad, bad), 1, ["MS201"]),
        ((bad, tmp_path / "absent.yaml"), 2, ["MS201", "MS001"]),
        ((good, tmp_path), 1, ["MS017"]),
        ((good, tmp_path / "empty"), 2, ["MS001"]),
        ((good, ""), 2, ["MS001"]),
        ((good, "--against", "git:no-such-revision"), 2, ["MS001"]),
    ):
        result = run(*sides, "--format", "json")
        document = json.loads(result.stdout)
        assert document.keys() == {"valid", "diagnostics"}
        assert document["valid"] is False
        assert [each["code"] for each in document["diagnostics"]] == said, sides
        assert result.exit_code == code, sides


def test_both_sides_are_told_and_each_error_once(pair: tuple[Path, Path]) -> None:
    one, other = pair
    one.write_text(SMALL.replace("hidden_size", "hiden_size"))
    other.write_text(SMALL.replace("vocab_size", "vocab_sise"))
    both, same = run(one, other), run(one, one)
    assert str(both.exception).count("error[") == 2
    assert f"{one}:5:3" in str(both.exception) and f"{other}:4:3" in str(both.exception)
    assert str(same.exception).count("error[") == 1


@pytest.mark.parametrize(
    ("arguments", "said"), [(["", NANO], "OLD is empty; name a spec"), ([NANO, ""], "NEW is empty; name a spec")]
)
def test_an_empty_argument_is_named(arguments: list[object], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [("ffn: dense}]", "ffn: dens}]", "MS302"), ("repeat: 2", "repeat: 100000", "MS301")],
)
def test_layers_that_make_no_model_are_an_error_and_no_traceback(
    pair: tuple[Path, Path], old: str, new: str, code: str
) -> None:
    good, bad = pair
    bad.write_text(SMALL.replace(old, new))
    document = json.loads(run(good, bad, "--format", "json").stdout)
    assert [each["code"] for each in document["diagnostics"]] == [code]


def _validated(tmp_path: Path, path: str) -> list[dict[str, str]]:
    """What `validate` says of a waiver for a path."""
    spec = tmp_path / "waiving.yaml"
    spec.write_text(SMALL + f"waivers: [{{rule: checkpoint-breaking, path: '{path}', reason: retrained}}]\n")
    result = CliRunner().invoke(app, ["validate", str(spec), "--format", "json"])
    assert result.exit_code == 0
    found: list[dict[str, str]] = json.loads(result.stdout)["diagnostics"]
    return found


@pytest.mark.parametrize(
    ("path", "help"),
    [
        ("model.vocab_sise", "did you mean 'model.vocab_size'?"),
        ("model.ffn.dense.intermediate_sizes", "did you mean 'model.ffn.dense.intermediate_size'?"),
        ("model.ffn.*.num_expert", "did you mean 'model.ffn.*.num_experts'?"),
        ("model.layers.0.repeat", "did you mean 'model.layers'?"),
        ("vocabulary", "write the path that diff tells"),
    ],
)
def test_validate_warns_of_a_waiver_that_can_waive_nothing(tmp_path: Path, path: str, help: str) -> None:
    (found,) = _validated(tmp_path, path)
    assert (found["code"], found["severity"], found["path"]) == ("MS210", "warning", "waivers.0.path")
    assert help in found["help"]


@pytest.mark.parametrize(
    "path",
    [
        *("*", "model.*", "model.vocab_size", "model.ffn.*", "model.ffn.any_name", "model.ffn.any_name.num_experts"),
        *("model.f*.num_experts", "*wide.num_experts", "*.rope.theta", "model.m?p", "model.layers", "model.mtp.layer"),
        *("model.attention.gqa.bias.0", "training.stages.1.steps"),
    ],
)
def test_validate_is_silent_about_a_waiver_for_a_key_of_any_model(tmp_path: Path, path: str) -> None:
    assert _validated(tmp_path, path) == []


def test_every_path_that_a_diff_tells_may_be_waived(tmp_path: Path) -> None:
    names = ("deepseek-v3", "gpt-oss-20b", "qwen3-next-80b-a3b", "mixtral-8x7b", "deepseek-v3.2", "qwen2.5-7b")
    sides = [f"modelspec:{name}" for name in names]
    found = [json.loads(run(*pair, "--format", "json").stdout)["changes"] for pair in pairwise(sides)]
    paths = {change["path"] for changes in found for change in changes if change["class"] == "checkpoint-breaking"}
    assert len(paths) > 20
    for path in paths:
        assert _validated(tmp_path, path) == [], path
