"""Steps on the machine at hand beside their plan, and the hardware file that makes the plan say what came."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from modelspec.builders import measure
from modelspec.builders.errors import EnvironmentFailed, Refused, Stopped
from modelspec.cli import main
from modelspec.environment import usable_memory
from modelspec.hardware import load as load_hardware
from modelspec.plan import plan
from modelspec.plan.memory import training_memory
from modelspec.schema import ModelSpec
from modelspec.validate import load

ROOT = Path(__file__).parents[2]
NANO = ROOT / "specs" / "deepseek-v3-nano.yaml"
TINY = ROOT / "tests" / "specs" / "llama-3.1-8b-tiny.yaml"
# The smallest spec, smaller still.
SMALL = ("model.hidden_size=64", "training.stages.0.sequence_length=32", "training.stages.0.batch_size=2")

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def small() -> ModelSpec:
    return load(NANO, SMALL)


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_EDGE", {"cpu": 256})
    monkeypatch.setattr(measure, "_COPIED", {"cpu": 2**22})


@pytest.fixture
def modelspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["modelspec", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, captured.out, captured.err

    return run


def _sets(*overrides: str) -> list[str]:
    return [argument for override in overrides for argument in ("--set", override)]


def test_the_steps_of_a_spec_are_taken_after_one_that_warms_up(small: ModelSpec) -> None:
    found = measure.measured(small, 2, steps=2, device="cpu")
    assert len(found.seconds) == 2 and min(found.seconds) > 0 < found.warm_up
    assert (found.sequence_length, found.batch_size, found.tokens) == (32, 2, 64)
    # Torch alone takes more than that.
    assert 2**26 < found.memory < usable_memory()


def test_the_middle_step_counts() -> None:
    assert measure.Measured("cpu", 4, 2, 9.0, (0.2, 5.0, 0.1), 1).step == 0.2


def test_a_spec_without_training_takes_the_steps_that_its_plan_assumes() -> None:
    spec = load(TINY)
    assert spec.training is None
    step = plan(spec).training.stages[0]
    found = measure.measured(spec, step.step.batch_size, steps=1, device="cpu")
    assert (found.sequence_length, found.batch_size) == (step.sequence_length, step.step.batch_size)


def test_what_this_version_does_not_train_is_not_measured() -> None:
    with pytest.raises(Refused, match=r"parallelism.world_size: 2048 processes"):
        measure.require_measurable(load(NANO.with_name("deepseek-v3.yaml")))
    # Neither text nor recipe is needed.
    measure.require_measurable(load(NANO, ["data=null"]))


def test_a_stop_ends_the_steps(small: ModelSpec) -> None:
    def stop() -> None:
        raise Stopped(15)

    with pytest.raises(Stopped):
        measure.measured(small, 2, steps=1, device="cpu", check=stop)


def test_a_step_that_does_not_fit_is_told_by_the_numbers_of_its_plan(
    small: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    hardware, _ = measure.present("cpu")
    rank = measure.heaviest(small, 32, 2, hardware)
    assert rank == training_memory(small, hardware).ranks[0]
    monkeypatch.setattr(measure, "free_memory", lambda device: rank.total)
    measure.require_room("small", rank, "cpu")
    monkeypatch.setattr(measure, "free_memory", lambda device: rank.total - 1)
    with pytest.raises(EnvironmentFailed, match=r"a step of small needs .* by its plan \(weights .*, activations .*\)"):
        measure.require_room("small", rank, "cpu")


def test_the_machine_is_described_by_what_it_does() -> None:
    hardware, fresh = measure.present("cpu")
    assert fresh and hardware.kind == "cpu" and hardware.memory == usable_memory()
    assert measure.free_memory(torch.device("cpu")) <= hardware.memory
    assert 1e8 < hardware.peak_flops.float32 < 1e15 and 1e8 < hardware.memory_bandwidth < 1e13
    assert hardware.peak_flops.float64 is not None and hardware.peak_flops.fp8 is None
    assert (hardware.power, hardware.price, hardware.slowdown) == (200.0, None, None)


def test_a_gpu_that_ships_as_hardware_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "require_device", torch.device)
    for name, known in (("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA GB200", "gb200"), ("NVIDIA B200", "b200")):
        monkeypatch.setattr(measure, "device_name", lambda device, name=name: name)
        hardware, fresh = measure.present("cuda:0")
        assert (hardware.name, fresh) == (known, False)


def test_a_calibrated_file_makes_the_plan_say_what_was_measured(modelspec: Command) -> None:
    code, out, err = modelspec(
        "plan", str(NANO), *_sets(*SMALL), "--measure", "--steps", "1", "--calibrated", "box.yaml", "--format", "json"
    )
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["error"] == {key: told["planned"][key] / told["measured"][key] - 1 for key in told["planned"]}
    assert told["measured"]["tokens_per_second"] == pytest.approx(64 / told["measured"]["seconds"])
    assert told["measured"]["seconds"] == told["step_seconds"][0]
    hardware = load_hardware("box.yaml")
    assert (hardware.name, hardware.kind, hardware.stack) == ("box", "cpu", told["stack"])
    assert hardware.slowdown == pytest.approx(told["slowdown"], rel=1e-3)
    step = plan(load(NANO, SMALL), hardware=hardware).training.stages[0].step
    assert step.seconds == pytest.approx(told["measured"]["seconds"], rel=2e-3)
    text = Path("box.yaml").read_text()
    assert "set what yours takes" in text and "# price: {usd_per_hour" in text
    Path("priced.yaml").write_text(text.replace("# price:", "price:"))
    assert load_hardware("priced.yaml").price is not None
    assert modelspec("plan", str(NANO), "--hardware", "./box.yaml")[0] == 0

    # With it the next measurement is compared, and may replace it.
    code, out, err = modelspec(
        "plan", str(NANO), *_sets(*SMALL), "--measure", "--hardware", "box.yaml", "--calibrated", "box.yaml"
    )
    assert (code, err) == (0, "")
    assert "seconds for a step" in out and "peak memory" in out and "GFLOP/s" not in out
    assert f"(it had {hardware.slowdown:.3g})" in out and "--hardware ./box.yaml" in out
    assert len([s for s in load_hardware("box.yaml").sources if s.fields == ("slowdown",)]) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--steps", "2"], 2, "go with --measure"),
        (["--calibrated", "box.yaml"], 2, "go with --measure"),
        (["--measure", "--calibrated", "box"], 2, "must end in .yaml"),
        (["--measure", "--calibrated", str(NANO)], 2, "this is the spec"),
        (["--measure", "--out", "plan.json"], 2, "--out goes without --measure"),
        (["--measure", "--hardware", "h100"], 2, "h100 is of kind gpu, and this machine is of kind cpu"),
        (["--measure", "--set", "parallelism.world_size=2"], 1, "2 processes"),
        (["--measure", "--sweep", "model.vocab_size=1,2"], 2, "do not go with"),
    ],
)
def test_what_cannot_be_measured_is_one_message(
    modelspec: Command, arguments: list[str], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = NANO.read_text()
    got, out, err = modelspec("plan", str(NANO), *arguments)
    assert (got, out) == (code, "") and message in err and "Traceback" not in err
    assert NANO.read_text() == before and list(Path().iterdir()) == []


def test_a_model_larger_than_the_machine_is_not_begun(modelspec: Command) -> None:
    big = _sets("parallelism=null", "precision.fp8=null", "precision.gradients=float32")
    stages = _sets("training.stages.1.parallelism=null", "training.stages.2.parallelism=null")
    code, out, err = modelspec("plan", str(NANO.with_name("deepseek-v3.yaml")), *big, *stages, "--measure")
    assert (code, out) == (3, "")
    assert "a step of deepseek-v3 needs" in err and "TB by its plan" in err and "nothing was run" in err
