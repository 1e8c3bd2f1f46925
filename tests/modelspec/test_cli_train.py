"""`train` and `generate` as a user meets them: what they print, their exit codes, and real signals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from torch import Tensor

from modelspec.amount import amount_of_bytes
from modelspec.builders.errors import Stopped
from modelspec.builders.events import Evaluated, Finished, Preparing, Sampled, Started, StepDone
from modelspec.builders.learner import Learner
from modelspec.cli import main
from modelspec.cli.options import amount
from modelspec.cli.progress import shown, sparkline, spoken
from modelspec.plan import Parameters, plan
from modelspec.timeline import Step
from modelspec.validate import load

SPEC = """
spec_version: 1
name: tiny
model:
  vocab_size: 280
  hidden_size: 16
  max_position: 64
  init: {std: 0.05}
  norm: {type: rmsnorm, eps: 1.0e-6}
  attention:
    mla: {type: mla, num_heads: 2, q_lora_rank: 8, kv_lora_rank: 8, qk_nope_head_dim: 4, qk_rope_head_dim: 4,
          v_head_dim: 4, latent_norm_eps: 1.0e-6, rope: {theta: 10000, layout: interleaved}}
  ffn:
    moe: {type: moe, num_experts: 4, num_experts_per_tok: 2, intermediate_size: 8, activation: {type: swiglu},
          shared_experts: {num: 1},
          router: {score: sigmoid, selection: {type: topk, bias: true}, renormalize: true, scale: 2.5}}
  layers: [{attention: mla, ffn: moe}]
  mtp: {depth: 1}
training:
  optimizer: {type: adamw, betas: [0.9, 0.95], eps: 1.0e-8, weight_decay: 0.1}
  losses: {mtp: 0.3, balance: {sequence: 1.0e-4}}
  router_bias_update_speed: 0.001
  stages: [{name: main, steps: 4, sequence_length: 16, batch_size: 4, learning_rate: 1.0e-2}]
  evaluation: {every_steps: 2, tokens: 200}
  checkpoint: {every_steps: 2, keep_last: 2}
data:
  sources: [{type: text, files: text.txt}]
  tokenizer: {type: bpe_trained, vocab_size: 280}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a spec and some text, and the process in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODELSPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "tiny.yaml").write_text(SPEC)
    (tmp_path / "text.txt").write_text("".join(f"{n} times {n % 7} makes {n * (n % 7)}\n" for n in range(600)))
    return tmp_path


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def modelspec(project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["modelspec", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, captured.out, captured.err

    return run


def test_a_run_tells_its_course_in_plain_lines_and_generate_continues_a_prompt(modelspec: Command) -> None:
    counts = plan(load("tiny.yaml")).parameters
    code, out, err = modelspec("train", "tiny.yaml")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    size = re.escape(f"{amount(counts.total)} parameters + {amount(counts.mtp)} MTP")
    assert re.search(rf"^tiny: {size} on cpu, 4 steps, into runs/tiny$", out, re.MULTILINE)
    assert f"tiny, {amount(counts.total)} parameters + " in modelspec("validate", "tiny.yaml")[1]
    assert any(line.startswith("unigram baseline: ") for line in lines)
    assert sum(line.startswith("step ") for line in lines) == 4
    assert "saved runs/tiny/checkpoints/step-4" in lines
    assert lines[-1].startswith("validation after step 4: ") and "(unigram " in lines[-1]
    assert "\x1b" not in out

    first = modelspec("generate", "runs/tiny", "--prompt", "3 times", "--max-tokens", "8")
    assert first == modelspec("generate", "runs/tiny/checkpoints/step-4", "--prompt", "3 times", "--max-tokens", "8")
    assert first[0] == 0 and len(first[1]) > 1
    assert modelspec("generate", "runs/tiny", "--prompt", "x", "--step", "3")[0] == 2

    code, out, err = modelspec("train", "tiny.yaml")
    assert code == 2 and "runs/tiny is not empty: --resume" in err
    code, out, err = modelspec("train", "tiny.yaml", "--resume")
    assert code == 0 and "has all its 4 steps already" in out
    assert modelspec("train", "tiny.yaml", "--resume", "--overwrite")[0] == 2
    assert modelspec("train", "tiny.yaml", "--overwrite", "--steps", "1", "--tensorboard")[0] == 0
    assert len(list(Path("runs/tiny/tensorboard").glob("events.*"))) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--out", "text.txt"], 2, "text.txt is a file"),
        (["--set", "data.sources=[{type: text, files: '*.md'}]"], 2, "no file matches '*.md'"),
        (["--set", "data.sources=[{type: text, files: bad.txt}]"], 2, "bad.txt: not UTF-8"),
        (["--set", "data.tokenizer=null"], 1, "data.tokenizer: missing"),
        (
            ["--set", "training.stages.0.sequence_length=64", "--set", "data.sources.0.files=short.txt"],
            2,
            "fewer than the 65",
        ),
        (["--device", "nonsense"], 2, "'nonsense' is no device"),
        (["--device", ""], 2, "'' is no device"),
        (["--out", ""], 2, "--out is empty; it names a folder"),
        (["--world", "2"], 2, "parallelism.world_size is 2 and this is one process"),
        (["--steps", "0"], 2, "--steps"),
    ],
    ids=["file", "glob", "encoding", "missing", "short", "device", "no-device", "no-out", "world", "steps"],
)
def test_a_users_mistake_is_one_message(
    modelspec: Command, project: Path, arguments: list[str], code: int, message: str
) -> None:
    (project / "bad.txt").write_bytes(b"\xff\xfe" * 100)
    (project / "short.txt").write_text("a few words only\n" * 3)
    got, out, err = modelspec("train", "tiny.yaml", *arguments)
    assert got == code and message in err.replace("\n", " ")
    assert "Traceback" not in err + out


def test_a_dry_run_says_time_and_memory_and_leaves_nothing(modelspec: Command, project: Path) -> None:
    code, out, _ = modelspec("train", "tiny.yaml", "--dry-run")
    assert code == 0 and "one step of 64 tokens: " in out and "GiB" in out
    assert not (project / "runs").exists()


def test_a_run_with_a_plan_says_what_was_planned_and_what_came(modelspec: Command, project: Path) -> None:
    assert modelspec("plan", "tiny.yaml", "--out", "plan.json", "--tokens", "1e6")[0] == 0
    code, out, err = modelspec("train", "tiny.yaml", "--plan", "plan.json")
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    content = json.loads(Path("plan.json").read_text())
    assert content["arguments"]["tokens"] == 1e6
    planned = content["plan"]["training"]["stages"][0]["tokens_per_second_per_gpu"]
    held = content["plan"]["memory"]["ranks"][0]["total"]
    assert [row["planned_tokens_per_second"] for row in steps] == [pytest.approx(planned)] * 4
    assert [row["planned_memory"] for row in steps] == [held] * 4
    assert all(2**26 < row["memory"] < 2**35 for row in steps)
    (line,) = (line for line in out.splitlines() if line.startswith("plan for h800: "))
    # The first step warms up.
    rate = 3 * 64 / sum(row["seconds"] for row in steps[1:])
    assert line.startswith(
        f"plan for h800: {planned:,.0f} tokens/s, measured {rate:,.0f} ({planned / rate - 1:+.1%}); "
    )
    most = max(row["memory"] for row in steps)
    assert line.endswith(f"measured {amount_of_bytes(most)} ({held / most - 1:+.1%})")

    assert modelspec("train", "tiny.yaml", "--overwrite")[0] == 0
    assert "planned" not in Path("runs/tiny/metrics.jsonl").read_text()
    # Lines of both kinds stay through a resumption.
    longer = ("--set", "training.stages.0.steps=6")
    assert modelspec("plan", "tiny.yaml", *longer, "--out", "plan.json")[0] == 0
    code, out, err = modelspec("train", "tiny.yaml", *longer, "--plan", "plan.json", "--resume", "--allow-changed")
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    held_at = [(row["step"], "memory" in row) for row in rows if "loss" in row]
    assert held_at == [(1, False), (2, False), (3, False), (4, False), (5, True), (6, True)]


def test_a_plan_of_another_spec_or_none_begins_no_run(modelspec: Command, project: Path) -> None:
    assert modelspec("plan", "tiny.yaml", "--out", "plan.json")[0] == 0
    code, out, err = modelspec("train", "tiny.yaml", "--plan", "plan.json", "--set", "training.seed=1")
    assert (code, out) == (1, "")
    assert "--set:1:15: error[MS019]: training.seed was 0 when this was planned, and is 1 now (convergence)" in err
    code, out, err = modelspec("train", "tiny.yaml", "--plan", "tiny.yaml")
    assert (code, out) == (2, "") and "tiny.yaml:2:1: error[MS018]: not JSON" in err
    assert modelspec("train", "tiny.yaml", "--plan", "plan.json", "--dry-run")[0] == 2
    assert not (project / "runs").exists()


def test_a_plan_is_not_written_over_its_spec_or_by_halves(modelspec: Command, project: Path) -> None:
    before = (project / "tiny.yaml").read_text()
    assert modelspec("plan", "tiny.yaml", "--out", "tiny.yaml")[0] == 2
    assert modelspec("plan", "tiny.yaml", "--out", "none/plan.json")[0] == 2
    assert modelspec("plan", "tiny.yaml", "--out", "plan.json", "--modules")[0] == 2
    assert (project / "tiny.yaml").read_text() == before
    assert sorted(path.name for path in project.iterdir() if path.is_file()) == ["text.txt", "tiny.yaml"]


def _start(*arguments: str, ignore: bool = False) -> subprocess.Popen[str]:
    def background() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    return subprocess.Popen(
        [sys.executable, "-m", "modelspec", "train", "tiny.yaml", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=background if ignore else None,
    )


def _wait(process: subprocess.Popen[str], steps: int) -> None:
    """Returns when the process has told of so many steps."""
    assert process.stdout is not None
    for line in process.stdout:
        steps -= line.startswith("step ")
        if steps == 0:
            return
    pytest.fail(f"the run ended: {process.communicate()}")


def _files(run: Path, step: int) -> dict[str, bytes]:
    names = ("model.safetensors", "optimizer.safetensors", "manifest.json")
    return {name: (run / "checkpoints" / f"step-{step}" / name).read_bytes() for name in names}


def test_a_signal_and_a_kill_end_in_the_run_that_nothing_disturbed(modelspec: Command, project: Path) -> None:
    changes = (
        "training.stages.0.steps=120",
        "training.evaluation.every_steps=40",
        "training.checkpoint.every_steps=20",
    )
    change = [argument for value in changes for argument in ("--set", value)]
    process = _start(*change, "--out", "run", ignore=True)
    _wait(process, steps=12)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "stopped by a signal; --resume goes on from here\n"

    process = _start(*change, "--out", "run", "--resume")
    _wait(process, steps=12)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)

    assert modelspec("train", "tiny.yaml", *change, "--out", "run", "--resume")[0] == 0
    assert modelspec("train", "tiny.yaml", *change, "--out", "calm")[0] == 0
    assert _files(project / "run", 120) == _files(project / "calm", 120)
    steps = [json.loads(line)["step"] for line in (project / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step for step in steps if steps.count(step) == 1 or step % 40 == 0] == steps


def test_sigterm_saves_and_gives_back_the_handlers(
    modelspec: Command, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Learner.step

    def interrupted(self: Learner, at: Step, batch: Tensor) -> StepDone:
        if at.index == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, at, batch)

    monkeypatch.setattr(Learner, "step", interrupted)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    code, _, err = modelspec("train", "tiny.yaml")
    assert code == 143 and "--resume" in err
    assert (project / "runs" / "tiny" / "checkpoints" / "step-3" / "manifest.json").exists()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_run_that_diverged_ends_with_a_warning_and_generate_says_why(modelspec: Command) -> None:
    code, out, err = modelspec("train", "tiny.yaml", "--set", "training.stages.0.learning_rate=1e300", "--steps", "2")
    assert (code, err) == (0, "")
    assert "warning: no sample: the model's predictions are not finite: its training diverged" in out
    for temperature in ("0", "1"):
        code, out, err = modelspec("generate", "runs/tiny", "--prompt", "x", "--temperature", temperature)
        assert (code, out) == (1, "") and "predictions are not finite" in err and "Traceback" not in err


def test_ctrl_c_ends_generate_without_a_traceback(
    modelspec: Command, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    assert modelspec("train", "tiny.yaml", "--steps", "1")[0] == 0
    monkeypatch.setattr("modelspec.builders.generate.sample", interrupted)
    assert modelspec("generate", "runs/tiny", "--prompt", "x") == (130, "", "")


def test_a_signal_during_a_dry_run_promises_nothing(
    modelspec: Command, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr("modelspec.builders.trainer.prepare", interrupted)
    assert modelspec("train", "tiny.yaml", "--dry-run") == (143, "", "stopped by a signal\n")


def test_a_closed_stdout_is_no_error(project: Path) -> None:
    command = f"{sys.executable} -m modelspec train tiny.yaml --steps 1 >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_tensorboard_that_cannot_have_its_folder_is_one_message(modelspec: Command, project: Path) -> None:
    assert modelspec("train", "tiny.yaml", "--steps", "1")[0] == 0
    (project / "runs" / "tiny" / "tensorboard").write_text("")
    code, _, err = modelspec("train", "tiny.yaml", "--resume", "--tensorboard")
    assert (code, err) == (3, "error: cannot write runs/tiny/tensorboard: File exists\n")


def test_a_checkpoint_of_a_stage_that_its_spec_lacks_is_refused(modelspec: Command, project: Path) -> None:
    assert modelspec("train", "tiny.yaml", "--steps", "1")[0] == 0
    path = project / "runs" / "tiny" / "checkpoints" / "step-1" / "manifest.json"
    path.write_text(path.read_text().replace('"stage": 0', '"stage": 7'))
    code, _, err = modelspec("generate", "runs/tiny", "--prompt", "x")
    assert code == 2 and "manifest.json names stage 7, which spec.yaml lacks" in err


def test_a_terminal_sees_a_live_panel_and_control_characters_stay_harmless() -> None:
    console = Console(file=StringIO(), force_terminal=True, width=100, color_system="standard")
    with shown(console) as show:
        show(Preparing("reading text", 0.5))
        show(
            Started(
                Path("runs/x"), "x", "cpu", Parameters(10_000_000, 5_000_000, 0, 0, {}), 0, 100, 9_000_000, 700_000, 6.5
            )
        )
        show(StepDone(1, 64, 9.0, 8.0, 8.1, 0.0, 1.5, 1e-3, 1.25, True, 0.5, 128.0))
        show(Evaluated(1, 7.5, 3.0, 6.5))
        time.sleep(0.11)
        show(StepDone(2, 128, 8.9, 7.0, 8.0, 0.0, 1.4, 1e-3, 1.2, False, 0.5, 128.0))
        show(Sampled("def ", "f():\x1b[2J\n  pass"))
        show(Finished(Path("runs/x"), 100, 61.0, Evaluated(100, 4.0, 1.9, 6.5)))
    assert isinstance(console.file, StringIO)
    told = console.file.getvalue()
    for expected in (
        "x: 10.00M parameters on cpu",
        "reading text",
        "step 2/100",
        "128 tokens/s",
        "0:49 left",
        "1.20",
        "7.500",
        "unigram 6.5",
        "█▁",
    ):
        assert expected in told
    assert "step 1 was skipped" in told and "100 steps done in 1:01: runs/x" in told
    assert "\x1b[2J" not in told and "f():\N{REPLACEMENT CHARACTER}[2J" in told


def test_colours_are_left_out_where_the_user_wants_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=StringIO(), force_terminal=True, width=100)
    with shown(console) as show:
        show(Preparing("reading text", 0.5))
    assert isinstance(console.file, StringIO)
    assert "reading text" in console.file.getvalue() and "\x1b[3" not in console.file.getvalue()


def test_durations_and_curves_are_said_shortly() -> None:
    assert [spoken(seconds) for seconds in (7, 61, 3600, 90_000)] == ["0:07", "1:01", "1:00:00", "1 day 1:00:00"]
    assert sparkline([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 8) == "█▇▆▅▄▃▂▁"
    assert sparkline([], 8) == "" and sparkline([1.0, 1.0], 8) == "▁▁"
