"""init: what it writes is valid, keeps its source's proportions, and comes near the size that was asked for."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from modelspec.cli import app
from modelspec.diff import diff
from modelspec.plan import parameters
from modelspec.resolve import resolve
from modelspec.scale import ScaleError, count, scale, wanted
from modelspec.schema import GQA, MLA, ModelSpec, MoE
from modelspec.validate import check, load

ROOT = Path(__file__).parents[2]
SPECS = sorted(path.stem for path in (ROOT / "specs").glob("*.yaml"))
EXPERTS = [name for name in SPECS if any(isinstance(ffn, MoE) for ffn in load(f"modelspec:{name}").model.ffn.values())]


def run(*arguments: object) -> Result:
    """The command with these arguments."""
    return CliRunner().invoke(app, ["init", *map(str, arguments)])


def spoken(path: Path) -> tuple[ModelSpec, list[str]]:
    """The spec in a file, and what validate says beyond information."""
    spec, diagnostics = check(resolve(path))
    assert spec is not None, diagnostics
    return spec, [each.message for each in diagnostics if each.severity != "info"]


@pytest.mark.parametrize("name", SPECS)
def test_every_shipped_spec_is_a_template_of_itself(name: str, tmp_path: Path) -> None:
    file = tmp_path / "new.yaml"
    assert run("--from", name, "--name", "new", "-o", file).exit_code == 0
    spec, warnings = spoken(file)
    assert warnings == []
    assert spec.tensors() == load(f"modelspec:{name}").tensors()
    assert {change.change_class for change in diff(load(f"modelspec:{name}"), spec)} == {"cosmetic"}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("size", ["1b", "3b-a500m", "40b-a4b"])
def test_every_template_scales_within_a_tenth(name: str, size: str, tmp_path: Path) -> None:
    to = wanted(size if name in EXPERTS else size.partition("-")[0])
    file = tmp_path / "new.yaml"
    asked = size if name in EXPERTS else size.partition("-")[0]
    result = run("--from", name, "--name", "new", "--params", asked, "-o", file)
    assert result.exit_code == 0, result.output
    spec, warnings = spoken(file)
    assert warnings == []
    counts = parameters(spec)
    assert counts.total == pytest.approx(to.total, rel=0.1)
    assert to.active is None or counts.active == pytest.approx(to.active, rel=0.1)


@pytest.mark.parametrize("name", SPECS)
def test_a_scaled_model_keeps_what_makes_its_source_itself(name: str) -> None:
    source = load(f"modelspec:{name}").model
    made = scale(source, wanted("3b"))
    assert made.hidden_size % 64 == 0
    assert made.vocab_size == source.vocab_size
    assert {(run.attention, run.ffn) for run in made.expanded_layers()} == {
        (run.attention, run.ffn) for run in source.expanded_layers()
    }
    for old, new in zip(source.attention.values(), made.attention.values(), strict=True):
        heads = ("head_dim", "rope_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "qk_head_dim")
        assert [getattr(new, key, None) for key in heads] == [getattr(old, key, None) for key in heads]
        if isinstance(old, MLA | GQA) and isinstance(new, MLA | GQA):
            ratio = (new.num_heads / made.hidden_size) / (old.num_heads / source.hidden_size)
            assert 0.6 < ratio < 1.7
    for before, after in zip(source.ffn.values(), made.ffn.values(), strict=True):
        assert after.intermediate_size % min(before.intermediate_size & -before.intermediate_size, 64) == 0
        ratio = (after.intermediate_size / made.hidden_size) / (before.intermediate_size / source.hidden_size)
        assert 0.7 < ratio < 1.4
        if isinstance(before, MoE) and isinstance(after, MoE):
            assert after.num_experts_per_tok == before.num_experts_per_tok
            assert after.router == before.router
    aspect = (made.num_layers / made.hidden_size) / (source.num_layers / source.hidden_size)
    assert 0.4 < aspect < 2.6


@pytest.mark.parametrize("name", SPECS)
def test_layers_are_counted_as_plan_counts_them(name: str) -> None:
    spec = load(f"modelspec:{name}")
    counts = parameters(spec)
    assert (count(spec.model).total, count(spec.model).active) == (counts.total, counts.active)


def test_scaling_to_the_source_s_own_size_changes_little() -> None:
    source = load("modelspec:deepseek-v3").model
    made = scale(source, wanted("671b-a37.5b"))
    assert made.num_layers == pytest.approx(source.num_layers, rel=0.1)
    assert made.hidden_size == pytest.approx(source.hidden_size, rel=0.1)


@pytest.mark.parametrize(
    ("text", "total", "active"),
    [
        ("7b", 7 * 10**9, None),
        ("7B", 7 * 10**9, None),
        ("3B-A500M", 3 * 10**9, 5 * 10**8),
        ("3B-a500M", 3 * 10**9, 5 * 10**8),
        ("1.5t-a32b", 15 * 10**11, 32 * 10**9),
    ],
)
def test_sizes_are_read(text: str, total: int, active: int | None) -> None:
    assert (wanted(text).total, wanted(text).active) == (total, active)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "b",
        "3b-500m",
        "3b-a",
        "-a5m",
        "0b",
        "1b-a2b",
        "1e9b",
        "3bb",
        "9" * 5000 + "b",
        "３b",
        "3\N{KELVIN SIGN}",
        "3b-a５00m",
    ],
)
def test_what_is_no_size_is_refused_with_an_example(text: str, tmp_path: Path) -> None:
    result = run("--from", "deepseek-v3", "--name", "new", f"--params={text}", "-o", tmp_path / "new.yaml")
    assert (result.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert "is no size; 7b" in result.output.replace("\n", " ") or "more parameters active" in result.output


def test_a_size_out_of_reach_is_refused_with_the_nearest() -> None:
    with pytest.raises(ScaleError, match=r"the nearest has 46,\d+,\d+ parameters, .* embedding and head alone have 33"):
        scale(load("modelspec:deepseek-v3").model, wanted("30m"))
    with pytest.raises(ScaleError, match="no experts"):
        scale(load("modelspec:llama-3.1-8b").model, wanted("3b-a1b"))


@pytest.mark.parametrize("name", ["deepseek-v3-nano", "llama-3.1-405b", "qwen3-next-80b-a3b"])
def test_even_the_largest_size_is_a_valid_spec(name: str, tmp_path: Path) -> None:
    file = tmp_path / "new.yaml"
    assert run("--from", name, "--name", "new", "--params", "1000t", "-o", file).exit_code == 0
    assert spoken(file)[1] == []
    beyond = run("--from", name, "--name", "new", "--params", "1001t", "-o", file, "--overwrite")
    assert beyond.exit_code == 2 and "which no model has" in beyond.output


def test_what_belongs_to_many_devices_is_left_out_of_another_size(tmp_path: Path) -> None:
    file = tmp_path / "new.yaml"
    run("--from", "deepseek-v3", "--name", "new", "--params", "3b-a500m", "-o", file)
    spec = load(file)
    assert spec.parallelism.world_size == 1
    assert spec.training is not None and all(stage.parallelism is None for stage in spec.training.stages)
    assert "fit lengths, batches and rates" in file.read_text()


def test_a_size_that_is_missed_by_more_than_a_twentieth_is_a_warning_with_what_was_reached(tmp_path: Path) -> None:
    file = tmp_path / "new.yaml"
    result = run("--from", "deepseek-v3", "--name", "new", "--params", "3b-a3b", "-o", file)
    counts = count(load(file).model)
    assert 0.05 < wanted("3b-a3b").farness(counts) < 0.25
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: reached 3.48B parameters, 2.55B active: off by +15.9% of the 3.00B")
    close = run("--from", "deepseek-v3", "--name", "new", "--params", "3B-A500M", "-o", file, "--overwrite")
    assert (close.exit_code, close.stderr) == (0, "")
    assert "off by +1.5% of the 3.00B asked for" in close.stdout


@pytest.mark.parametrize(("name", "size"), [("deepseek-v3", "30m"), ("qwen3-next-80b-a3b", "100m")])
def test_a_size_that_is_missed_by_more_than_a_quarter_is_refused(name: str, size: str, tmp_path: Path) -> None:
    result = run("--from", name, "--name", "new", "--params", size, "-o", tmp_path / "new.yaml")
    assert result.exit_code == 1
    assert isinstance(result.exception, ScaleError) and list(tmp_path.iterdir()) == []


def test_a_shape_less_like_the_source_is_taken_where_only_it_comes_close() -> None:
    to = wanted("300m-a200m")
    assert to.farness(count(scale(load("modelspec:mixtral-8x7b").model, to))) <= 0.05


def modeline(file: Path) -> str:
    """The schema that the first line of a new spec names."""
    run("--from", "deepseek-v3-nano", "--name", "new", "-o", file)
    return file.read_text().splitlines()[0].removeprefix("# yaml-language-server: $schema=")


def test_the_schema_is_named_by_a_path_that_others_have_too(tmp_path: Path) -> None:
    from modelspec.cli.init import schema_seen_from

    assert schema_seen_from(ROOT / "specs" / "never-written.yaml") == "../modelspec/spec.schema.json"
    assert schema_seen_from(ROOT / "never-written.yaml") == "modelspec/spec.schema.json"
    (tmp_path / "pyproject.toml").touch()
    shipped = (ROOT / "specs" / "deepseek-v3.yaml").read_text().splitlines()[0]
    assert shipped == f"# yaml-language-server: $schema={modeline(tmp_path / 'new.yaml')}"
    assert "`modelspec schema` prints the schema" in (tmp_path / "new.yaml").read_text()
    assert str(ROOT) not in (tmp_path / "new.yaml").read_text()


def test_each_key_has_its_meaning_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "new.yaml"
    run("--from", "deepseek-v3-nano", "--name", "new", "-o", file)
    lines = file.read_text().splitlines()
    assert "  hidden_size: 256                            # width of the residual stream; elements" in lines
    assert max(map(len, lines)) <= 120


def test_a_hugging_face_config_is_a_source(hf_config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    names = ("config.json", "conf.JSON", "config", "config.yaml")
    for name in names:
        (tmp_path / name).write_text(json.dumps(hf_config("qwen3_moe")))
    for source in (tmp_path, *(tmp_path / name for name in names)):
        file = tmp_path / "new.yaml"
        result = run("--from", source, "--name", "new", "-o", file, "--overwrite")
        assert result.exit_code == 0, result.output
        spec, warnings = spoken(file)
        assert warnings == []
        assert spec.model.num_layers == 5


def test_a_file_that_exists_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "new.yaml"
    file.write_text("mine")
    refused = run("--from", "deepseek-v3", "--name", "new", "-o", file)
    assert (refused.exit_code, file.read_text()) == (2, "mine")
    assert "--overwrite replaces it" in refused.output
    assert run("--from", "deepseek-v3", "--name", "new", "-o", file, "--overwrite").exit_code == 0
    assert load(file).name == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["new.yaml"]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--from", "deepseek-v4", "--name", "new"], 2, "did you mean 'deepseek-v3'?"),
        (["--from", "deepseek-v3", "--name", "a b"], 2, "begins with a letter or a digit"),
        (["--from", "", "--name", "new"], 2, "--from: it is empty; name a file"),
        (["--from", "deepseek-v3", "--name", "new", "-o", ""], 2, "-o: it is empty; name a file"),
        (["--from", "missing.json", "--name", "new"], 2, "missing.json"),
        (["--from", "missing.yaml", "--name", "new"], 2, "missing.yaml"),
        (["--from", "deepseek-v3", "--name", "new", "-o", "no/such/new.yaml"], 2, "no folder no/such"),
        (["--from", "deepseek-v3", "--name", "new", "-o", "."], 2, "is no file"),
        (["--from", "deepseek-v3", "--name", "new", "--params", "1m"], 1, "does not scale"),
    ],
)
def test_a_wrong_call_writes_nothing_and_says_what_to_do(
    arguments: list[str], code: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    program = [sys.executable, "-m", "modelspec", "init", *arguments]
    result = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (result.returncode, list(tmp_path.iterdir())) == (code, [])
    assert told in " ".join(result.stderr.split()) and "Traceback" not in result.stderr


def test_it_starts_without_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from click.testing import CliRunner; from modelspec.cli import app;"
        "result = CliRunner().invoke(app, ['init', '--from', 'deepseek-v3', '--name', 'new', '-o', sys.argv[1]]);"
        "sys.exit(result.exit_code or ('torch' in sys.modules))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "new.yaml")]
    assert subprocess.run(command, check=False).returncode == 0


def test_a_link_that_leads_nowhere_is_misuse(tmp_path: Path) -> None:
    link = tmp_path / "link.yaml"
    link.symlink_to(tmp_path / "nowhere" / "spec.yaml")
    result = CliRunner().invoke(app, ["init", "--from", "deepseek-v3-nano", "--name", "q", "-o", str(link)])
    assert result.exit_code == 2
    assert "link.yaml" in result.output
