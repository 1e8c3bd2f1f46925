"""doctor: a spec against environments that are made up, and against the one that is here."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from modelspec import doctor
from modelspec.builders import build
from modelspec.builders.optim import build_optimizer
from modelspec.cli import app
from modelspec.doctor import Line, examine, exit_code
from modelspec.environment import Device, Environment, environment
from modelspec.schema import ModelSpec
from modelspec.validate import load

LEAST = {"torch": "2.11", "triton": "3.6", "click": "8.1"}
CPU = Device("x86_64", 1, 64 * 2**30)
H100 = Device("NVIDIA H100", 8, 80 * 2**30, (9, 0))
HERE = Environment(
    python=(3, 12),
    packages={"torch": "2.13.0+cpu", "triton": "3.7.1", "click": "8.2"},
    least=LEAST,
    device=CPU,
    compiler=True,
    folder="runs/x",
    free=10**12,
)
NANO = load("modelspec:deepseek-v3-nano")
FP8 = load(
    "modelspec:deepseek-v3-nano",
    [
        "precision.fp8={format: e4m3, activation_block: [1, 128], weight_block: [128, 128], scales: float32, "
        "gemms: [forward]}"
    ],
)


def line(subject: str, spec: ModelSpec = NANO, here: Environment = HERE) -> Line:
    """What is said of a subject; it is said once."""
    (found,) = (each for each in examine(spec, here) if each.subject == subject)
    return found


def test_a_machine_that_has_everything_has_no_failure() -> None:
    lines = examine(NANO, HERE)
    assert {each.status for each in lines} == {"ok"}
    assert exit_code(lines) == 0


@pytest.mark.parametrize(
    ("change", "subject", "status", "code"),
    [
        ({"python": (3, 10)}, "python", "fail", 3),
        ({"packages": {**HERE.packages, "torch": "2.9.1"}}, "torch", "fail", 3),
        ({"packages": {**HERE.packages, "torch": None}}, "torch", "fail", 3),
        ({"packages": {**HERE.packages, "triton": None}}, "triton", "ok", 0),
        ({"packages": {**HERE.packages, "triton": None}, "device": H100}, "triton", "fail", 3),
        ({"packages": {**HERE.packages, "click": "8.0"}}, "click", "fail", 3),
        ({"device": Device("cuda", 0, 0, error="no driver")}, "device", "fail", 3),
        ({"device": replace(CPU, memory=2**26)}, "memory", "fail", 3),
        ({"device": replace(CPU, memory=14 * 10**7)}, "memory", "warn", 0),
        ({"free": 10**6}, "disk", "fail", 3),
        ({"free": 2 * 10**8}, "disk", "warn", 0),
        ({"world": "4"}, "world", "fail", 1),
        ({"world": "1"}, "world", "ok", 0),
        *(({"world": world}, "world", "fail", 3) for world in ("abc", "", "0", "-1", "1.0", "9" * 5000)),
    ],
)
def test_each_lack_is_told_with_a_remedy(change: dict[str, object], subject: str, status: str, code: int) -> None:
    found = line(subject, here=replace(HERE, **change))  # type: ignore[arg-type]
    assert found.status == status
    assert (found.remedy is None) == (status == "ok")
    assert exit_code((found,)) == code


@pytest.mark.parametrize("version", ["2.11.0", "2.11", "2.13.0a0+git1234", "3.0.0rc1"])
def test_versions_are_compared_as_numbers(version: str) -> None:
    assert line("torch", here=replace(HERE, packages={**HERE.packages, "torch": version})).status == "ok"


@pytest.mark.parametrize(
    ("device", "emulate", "status"),
    [(CPU, False, "fail"), (CPU, True, "warn"), (replace(H100, capability=(8, 9)), False, "fail"), (H100, False, "ok")],
)
def test_fp8_needs_a_gpu_that_has_it_or_emulation(device: Device, emulate: bool, status: str) -> None:
    assert FP8.precision.fp8 is not None
    fp8 = FP8.precision.fp8.model_copy(update={"emulate": emulate})
    spec = FP8.model_copy(update={"precision": FP8.precision.model_copy(update={"fp8": fp8})})
    found = line("fp8", spec, replace(HERE, device=device))
    assert found.status == status
    assert status != "fail" or (found.code == 1 and "precision.fp8=null" in (found.remedy or ""))


def test_the_environment_outranks_the_spec_in_the_exit_code() -> None:
    disagreement, lack = Line("world", "fail", "", "", 1), Line("disk", "fail", "", "", 3)
    warning = Line("memory", "warn", "", "", 3)
    assert [exit_code(each) for each in ((warning,), (disagreement,), (disagreement, lack))] == [0, 1, 3]


def test_the_state_of_one_rank_is_what_a_built_model_and_its_optimizer_hold() -> None:
    model = build(NANO)
    assert NANO.training is not None
    optimizer = build_optimizer(model, NANO.training.optimizer, NANO.precision)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = [*model.parameters(), *model.buffers(), *(each.grad for each in model.parameters() if each.grad is not None)]
    kept += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    bytes_, parts = doctor._state_bytes(NANO)
    assert parts == "weights, gradients and optimizer"
    assert bytes_ == pytest.approx(sum(each.nbytes for each in kept), rel=1e-3)


def test_sharding_divides_the_state_of_a_rank() -> None:
    def on(*overrides: str) -> int:
        return doctor._state_bytes(load("modelspec:deepseek-v3-nano", overrides))[0]

    # 4 bytes of weight, 4 of gradient, two moments of 2.
    whole = on()
    four = "parallelism.world_size=4"
    assert on(four) == whole
    assert on(four, "parallelism.data.zero=1") == pytest.approx(whole * (8 + 4 / 4) / 12, rel=1e-3)
    assert on(four, "parallelism.data.zero=3") == pytest.approx(whole / 4, rel=1e-3)
    assert on(four, "parallelism.pipeline.size=2") == pytest.approx(whole / 2, rel=1e-3)
    assert whole / 4 < on(four, "parallelism.expert=4") < whole


def test_v3_needs_many_ranks_and_a_launcher() -> None:
    v3 = load("modelspec:deepseek-v3")
    here = replace(HERE, device=H100, free=10**14)
    assert line("memory", v3, here).status == "ok" and "2,048 ranks" in line("memory", v3, here).message
    assert line("world", v3, here).status == "warn"
    one = load(
        "modelspec:deepseek-v3", ["parallelism=null", *(f"training.stages.{n}.parallelism=null" for n in (1, 2))]
    )
    assert line("memory", one, here).status == "fail"
    assert line("world", v3, replace(here, device=replace(H100, count=4))).code == 1


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> Callable[[int], ModelSpec]:
    """A spec whose tokenizer is a file of so many tokens."""

    def make(size: int) -> ModelSpec:
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel

        path = tmp_path / "tokenizer.json"
        Tokenizer(WordLevel({f"w{n}": n for n in range(size)}, unk_token="w0")).save(str(path))
        return load("modelspec:deepseek-v3-nano", [f"data.tokenizer={{type: file, path: {path}}}"])

    return make


@pytest.mark.parametrize(("size", "status", "code"), [(4097, "fail", 1), (4096, "ok", 0), (100, "warn", 0)])
def test_every_token_needs_a_row(
    size: int, status: str, code: int, with_tokenizer: Callable[[int], ModelSpec], tmp_path: Path
) -> None:
    spec = with_tokenizer(size)
    found = line("tokenizer", spec, environment(spec, "cpu", tmp_path))
    assert (found.status, found.code if found.status == "fail" else 0) == (status, code)


def test_a_tokenizer_and_data_that_are_not_there_are_told(tmp_path: Path) -> None:
    missing, glob = tmp_path / "none.json", tmp_path / "*.txt"
    overrides = [f"data.tokenizer={{type: file, path: {missing}}}", f"data.sources=[{{type: text, files: '{glob}'}}]"]
    spec = load("modelspec:deepseek-v3-nano", overrides)
    here = environment(spec, "cpu", tmp_path)
    assert line("tokenizer", spec, here).status == line("data", spec, here).status == "fail"
    assert exit_code((line("tokenizer", spec, here), line("data", spec, here))) == 1
    (tmp_path / "a.txt").write_text("text")
    assert line("data", spec, environment(spec, "cpu", tmp_path)).message.endswith("1 file")


def test_what_this_version_does_not_train_is_told(tmp_path: Path) -> None:
    spec = load("modelspec:deepseek-v3-nano", ["training=null", "data.packing.document_mask=true"])
    told = [each for each in examine(spec, environment(spec, "cpu", tmp_path)) if each.subject == "train"]
    assert {each.status for each in told} == {"warn"}
    assert [each.message.partition(":")[0] for each in told] == ["training", "data.packing.document_mask"]
    assert all(each.remedy for each in told)


def test_blocks_that_no_kernel_has_are_a_failure_that_names_the_layers(tmp_path: Path) -> None:
    key = "precision.fp8.weight_block"
    result = run("modelspec:deepseek-v3-nano-fp8", "--set", f"{key}=[64, 64]", "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 1, result.output
    assert f"FAIL  build      {key}: there are no kernels for blocks of 64 x 64; " in result.output
    assert "q_b_proj" in result.output and f"help: set {key}=[128, 128]" in result.output
    assert result.output.count(key) == 2


def run(*arguments: object) -> Result:
    """The command with these arguments."""
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def test_this_machine_can_be_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    result = run("modelspec:deepseek-v3-nano", "--device", "cpu", "--out", tmp_path / "not" / "yet")
    assert result.exit_code == 0, result.output
    assert torch.__version__.partition("+")[0] in result.output
    assert not (tmp_path / "not").exists()


def test_a_device_that_is_not_there_is_the_environment_s_failure(tmp_path: Path) -> None:
    for name in ("cuda:99", "nonsense"):
        result = run("modelspec:deepseek-v3-nano", "--device", name, "--out", tmp_path)
        assert result.exit_code == 3
        assert f"FAIL  device     {name}: " in result.output


@pytest.mark.parametrize(("name", "reason"), [("cpu:99", "the processor is one device, cpu"), ("meta", "no values")])
def test_a_device_that_torch_only_seems_to_have_is_no_silent_pass(name: str, reason: str, tmp_path: Path) -> None:
    result = run("modelspec:deepseek-v3-nano", "--device", name, "--out", tmp_path)
    assert result.exit_code == 3
    assert f"FAIL  device     {name}: " in result.output and reason in result.output


@pytest.mark.parametrize("name", ["mps", "xla"])
def test_the_reason_why_a_device_is_not_there_is_one_sentence(name: str, tmp_path: Path) -> None:
    seen = environment(NANO, name, tmp_path).device
    assert seen.error is None or len(seen.error) < 150


def test_a_world_that_is_no_number_names_the_variable_and_not_the_spec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "abc")
    result = run("modelspec:deepseek-v3-nano", "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 3
    assert "WORLD_SIZE=abc in the environment is no number of processes" in result.output
    assert "parallelism.world_size" not in result.output and "unset WORLD_SIZE" in result.output


def test_json_is_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run("modelspec:deepseek-v3-nano", "--device", "cpu", "--out", tmp_path, "--format", "json")
    document = json.loads(result.stdout)
    assert result.exit_code == 1 and document["ok"] is False
    failed = [each for each in document["lines"] if each["status"] == "fail"]
    assert [each["subject"] for each in failed] == ["world"]
    assert set(failed[0]) == {"subject", "status", "message", "remedy"}


def test_an_invalid_spec_is_not_examined(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("spec_version: 1\n")
    assert run(tmp_path / "bad.yaml").exit_code == 1
