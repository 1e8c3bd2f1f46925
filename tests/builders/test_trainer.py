"""Training runs: they resume bit for bit, stop when asked, refuse what would mislead, and leave a whole folder."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from modelspec import schema
from modelspec.builders import checkpoint, trainer
from modelspec.builders.errors import EnvironmentFailed, Misuse, Refused, Stopped
from modelspec.builders.events import Evaluated, Event, Finished, Preparing, Saved, Started, StepDone, Warned
from modelspec.builders.learner import Learner
from modelspec.builders.plot import write_plot
from modelspec.builders.requirements import unsupported
from modelspec.builders.run import opened
from modelspec.builders.session import Watch
from modelspec.builders.trainer import dry_run, train
from modelspec.timeline import timeline

ROPE: dict[str, Any] = {"theta": 10000.0, "layout": "interleaved"}
YARN = {
    "type": "yarn", "factor": 4.0, "original_max_position": 16, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
SPEC: dict[str, Any] = {
    "spec_version": 1,
    "name": "tiny",
    "model": {
        "vocab_size": 280,
        "hidden_size": 16,
        "max_position": 64,
        "init": {"std": 0.05},
        "norm": {"type": "rmsnorm", "eps": 1e-6},
        "attention": {
            "mla": {
                "type": "mla", "num_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4,
                "qk_rope_head_dim": 4, "v_head_dim": 4, "latent_norm_eps": 1e-6, "rope": ROPE,
            }
        },
        "ffn": {
            "moe": {
                "type": "moe", "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 8,
                "activation": {"type": "swiglu"}, "shared_experts": {"num": 1},
                "router": {
                    "score": "sigmoid", "selection": {"type": "topk", "bias": True}, "renormalize": True, "scale": 2.5,
                },
            }
        },
        "layers": [{"attention": "mla", "ffn": "moe"}],
        "mtp": {"depth": 1},
    },
    "precision": {"optimizer_states": "bfloat16"},
    "training": {
        "optimizer": {"type": "adamw", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
        "gradient_clip": 1.0,
        "losses": {"mtp": 0.3, "balance": {"sequence": 1e-4}},
        "router_bias_update_speed": 0.01,
        "stages": [
            {
                "name": "main", "steps": 6, "sequence_length": 16, "batch_size": 4,
                "learning_rate": [{"until_steps": 4, "ramp": [0.0, 1e-2]}, {"value": 5e-3}],
            }
        ],
        "evaluation": {"every_steps": 2, "tokens": 200},
        "checkpoint": {"every_steps": 2, "keep_last": 2},
    },
    "data": {"tokenizer": {"type": "bpe_trained", "vocab_size": 280}},
}  # fmt: skip

MakeSpec = Callable[..., schema.ModelSpec]
Kind = TypeVar("Kind", bound=Event)


@pytest.fixture
def make_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeSpec:
    """A tiny spec over text of its own; keyword arguments like training__gradient_clip change values."""
    monkeypatch.setenv("MODELSPEC_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} times {number % 7} makes {number * (number % 7)}\n" for number in range(600)))

    def make(**changes: Any) -> schema.ModelSpec:
        data = json.loads(json.dumps(SPEC))
        data["data"]["sources"] = [{"type": "text", "files": str(text)}]
        for path, value in changes.items():
            *parents, key = path.split("__")
            place = data
            for parent in parents:
                place = place[int(parent)] if isinstance(place, list) else place.setdefault(parent, {})
            place[key] = value
        return schema.ModelSpec.model_validate(data)

    return make


class Log(list[Event]):
    """An observer that remembers, and may ask to stop."""

    def watch(self, stop: Callable[[], bool] = lambda: False) -> Watch:
        return Watch(self.append, lambda: 15 if stop() else None)

    def of(self, kind: type[Kind]) -> list[Kind]:
        return [event for event in self if isinstance(event, kind)]


def _rows(out: Path) -> list[dict[str, Any]]:
    timing = ("seconds", "tokens_per_second")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in timing} for row in rows]


def _tensors(out: Path, step: int) -> dict[str, bytes]:
    folder = out / "checkpoints" / f"step-{step}"
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}


def _steps(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


TWO_STAGES = [
    {"name": "short", "steps": 2, "sequence_length": 16, "batch_size": 4, "learning_rate": 1e-2},
    {"name": "long", "steps": 4, "sequence_length": 32, "batch_size": 2, "learning_rate": 1e-3, "rope_scaling": YARN},
]


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, 3),
        ({"parallelism__microbatch_size": 2, "precision__optimizer_states": "float32"}, 4),
        ({"training__stages": TWO_STAGES}, 3),
        ({"training__stages": TWO_STAGES}, 2),
    ],
    ids=["whole batch", "microbatches", "inside the second stage", "between stages"],
)
def test_a_resumed_run_is_the_unbroken_run_bit_for_bit(
    tmp_path: Path, make_spec: MakeSpec, changes: dict[str, Any], first: int
) -> None:
    spec = make_spec(**changes)
    train(spec, tmp_path / "unbroken")
    train(spec, tmp_path / "broken", steps=first)
    finished = train(spec, tmp_path / "broken", resume=True)
    assert finished.step == 6 and not finished.already
    assert _tensors(tmp_path / "unbroken", 6) == _tensors(tmp_path / "broken", 6)
    rows = [row for row in _rows(tmp_path / "broken") if "val_loss" not in row or row["step"] % 2 == 0]
    assert rows == _rows(tmp_path / "unbroken")


def test_a_run_leaves_metrics_plot_tokenizer_spec_and_the_last_checkpoints(tmp_path: Path, make_spec: MakeSpec) -> None:
    log = Log()
    train(make_spec(), tmp_path / "run", watch=log.watch())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints", "loss.png", "metrics.jsonl", "spec.yaml", "tokenizer.json",
    ]  # fmt: skip
    assert _steps(tmp_path / "run") == ["step-4", "step-6"]
    rows = _rows(tmp_path / "run")
    assert [row["step"] for row in rows if "val_loss" not in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "val_loss" in row] == [2, 4, 6]
    assert {"step", "tokens", "loss", "lm_loss", "mtp_loss", "balance_loss", "grad_norm", "learning_rate"} <= rows[
        0
    ].keys()
    assert [row["learning_rate"] for row in rows if "loss" in row] == pytest.approx(
        [2.5e-3, 5e-3, 7.5e-3, 1e-2, 5e-3, 5e-3]
    )
    (started,) = log.of(Started)
    assert log.of(Finished)[0].evaluation == log.of(Evaluated)[-1]
    assert started.unigram_loss == log.of(Evaluated)[-1].unigram_loss


def test_the_model_learns_to_beat_the_unigram_baseline(tmp_path: Path, make_spec: MakeSpec) -> None:
    stage = {"name": "main", "steps": 60, "sequence_length": 32, "batch_size": 8, "learning_rate": 1e-2}
    finished = train(make_spec(training__stages=[stage], training__evaluation__every_steps=60), tmp_path / "run")
    assert finished.evaluation is not None
    assert finished.evaluation.val_loss < 0.7 * finished.evaluation.unigram_loss


def test_microbatches_give_the_gradients_and_counts_of_the_whole_batch(make_spec: MakeSpec) -> None:
    first = next(timeline(make_spec().training or pytest.fail()))
    torch.manual_seed(0)
    batch = torch.randint(0, 280, (4, 17))
    gradients, losses, loads = [], [], []
    for size in (4, 1):
        spec = make_spec(parallelism__microbatch_size=size)
        assert spec.training is not None
        learner = Learner(spec, spec.training, torch.device("cpu"))
        values, counts = learner._accumulate(first, batch)
        gradients.append([p.grad for p in learner.model.parameters() if p.grad is not None])
        losses.append(values)
        loads.append(counts)
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-7)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert loads[0].keys() == loads[1].keys() == {"layers.0.ffn.router", "mtp.0.block.ffn.router"}
    for name, load in loads[0].items():
        assert torch.equal(load, loads[1][name])
    assert int(loads[0]["layers.0.ffn.router"].sum()) == 4 * 16 * 2


def test_gradients_that_are_not_finite_skip_the_step_and_its_bias_update(make_spec: MakeSpec) -> None:
    spec = make_spec()
    assert spec.training is not None
    learner = Learner(spec, spec.training, torch.device("cpu"))
    with torch.no_grad():
        learner.model.norm.weight[0] = float("inf")
    before = {name: tensor.clone() for name, tensor in checkpoint.model_tensors(learner.model).items()}
    done = learner.step(next(timeline(spec.training)), torch.randint(0, 280, (4, 17)))
    assert done.skipped
    assert all(torch.equal(before[name], tensor) for name, tensor in checkpoint.model_tensors(learner.model).items())
    assert not learner.optimizer.state


def test_numbers_that_are_not_finite_are_null_in_the_metrics(tmp_path: Path) -> None:
    with opened(tmp_path / "run", resume=False, overwrite=False) as run:
        run.log(Evaluated(1, float("nan"), float("inf"), 2.0))
    assert _rows(tmp_path / "run") == [{"step": 1, "val_loss": None, "val_bits_per_byte": None, "unigram_loss": 2.0}]


def test_a_stop_saves_and_the_resumed_run_ends_the_same(tmp_path: Path, make_spec: MakeSpec) -> None:
    spec, log = make_spec(), Log()
    train(spec, tmp_path / "unbroken")
    with pytest.raises(Stopped) as stopped:
        train(spec, tmp_path / "run", watch=log.watch(lambda: len(log.of(StepDone)) == 3))
    assert stopped.value.exit_code == 143
    assert _steps(tmp_path / "run") == ["step-2", "step-3"]
    train(spec, tmp_path / "run", resume=True)
    assert _tensors(tmp_path / "run", 6) == _tensors(tmp_path / "unbroken", 6)
    assert _rows(tmp_path / "run") == _rows(tmp_path / "unbroken")


def test_a_stop_during_evaluation_saves_the_step_before_it(tmp_path: Path, make_spec: MakeSpec) -> None:
    log, asked = Log(), count()
    spec = make_spec()
    with pytest.raises(Stopped):
        # One question before each of the two steps; the next comes from the evaluation after the second.
        train(spec, tmp_path / "run", watch=log.watch(lambda: bool(log.of(Started)) and next(asked) == 2))
    assert [event.step for event in log.of(StepDone)] == [1, 2] and not log.of(Evaluated)
    assert _steps(tmp_path / "run") == ["step-2"]
    train(spec, tmp_path / "run", resume=True)
    assert [row["step"] for row in _rows(tmp_path / "run")] == [1, 2, 2, 3, 4, 4, 5, 6, 6]


def test_a_stop_during_the_last_evaluation_is_made_up_for_on_resume(tmp_path: Path, make_spec: MakeSpec) -> None:
    log, spec = Log(), make_spec(training__evaluation__every_steps=100)
    with pytest.raises(Stopped):
        train(spec, tmp_path / "run", watch=log.watch(lambda: len(log.of(StepDone)) == 6))
    assert _steps(tmp_path / "run") == ["step-4", "step-6"] and not (tmp_path / "run" / "loss.png").exists()
    finished = train(spec, tmp_path / "run", resume=True)
    assert finished.evaluation is not None and finished.evaluation.step == 6 and not finished.already
    assert (tmp_path / "run" / "loss.png").exists()


def test_a_stop_while_text_is_prepared_leaves_no_run(tmp_path: Path, make_spec: MakeSpec) -> None:
    log = Log()
    with pytest.raises(Stopped):
        train(make_spec(), tmp_path / "run", watch=log.watch(lambda: bool(log.of(Preparing))))
    assert list((tmp_path / "run").iterdir()) == []


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path, make_spec: MakeSpec) -> None:
    done = train(make_spec(), tmp_path / "run")
    before = _rows(tmp_path / "run")
    again = train(make_spec(), tmp_path / "run", resume=True)
    assert again.already and again.evaluation == done.evaluation and again.step == 6
    assert _rows(tmp_path / "run") == before


def test_a_run_without_a_checkpoint_starts_again_and_says_so(tmp_path: Path, make_spec: MakeSpec) -> None:
    spec = make_spec()
    train(spec, tmp_path / "run", steps=2)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    log = Log()
    train(spec, tmp_path / "run", steps=2, resume=True, watch=log.watch())
    assert "starts at step 0" in log.of(Warned)[0].message
    assert [row["step"] for row in _rows(tmp_path / "run")] == [1, 2, 2]


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_the_same(tmp_path: Path, make_spec: MakeSpec) -> None:
    spec, log = make_spec(), Log()
    train(spec, tmp_path / "run")
    expected = _tensors(tmp_path / "run", 6)
    path = tmp_path / "run" / "checkpoints" / "step-6" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    train(spec, tmp_path / "run", resume=True, watch=log.watch())
    assert "step-6 is passed over: optimizer.safetensors does not match" in log.of(Warned)[0].message
    assert log.of(Started)[0].first_step == 4
    assert _tensors(tmp_path / "run", 6) == expected
    assert [row["step"] for row in _rows(tmp_path / "run")] == [1, 2, 2, 3, 4, 4, 5, 6, 6]


@pytest.mark.parametrize(
    "line",
    ['{"step": 6, "val_loss": "low"}', '{"step": 6, "val_loss": 1.0}', "[" * 100_000, "[1]", '{"step": 6}'],
    ids=["text", "part", "depth", "list", "little"],
)
def test_a_line_of_metrics_that_no_run_wrote_is_passed_over(tmp_path: Path, make_spec: MakeSpec, line: str) -> None:
    spec = make_spec()
    finished = train(spec, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as metrics:
        metrics.write(line + "\n")
    again = train(spec, tmp_path / "run", resume=True)
    assert again.already and again.evaluation == finished.evaluation


def test_metrics_that_cannot_be_read_are_named(tmp_path: Path, make_spec: MakeSpec) -> None:
    train(make_spec(), tmp_path / "run", steps=1)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    with pytest.raises(EnvironmentFailed, match=r"cannot read .*metrics\.jsonl: Is a directory"):
        train(make_spec(), tmp_path / "run", resume=True)


def test_a_run_may_go_on_with_fewer_stages(tmp_path: Path, make_spec: MakeSpec) -> None:
    train(make_spec(training__stages=TWO_STAGES), tmp_path / "run", steps=3)
    one = make_spec(training__stages=[TWO_STAGES[0] | {"steps": 4}])
    assert train(one, tmp_path / "run", resume=True, allow_changed=True).step == 4


@pytest.mark.parametrize("resume, overwrite", [(False, False), (True, False), (False, True)])
def test_a_folder_that_holds_no_run_is_never_touched(
    tmp_path: Path, make_spec: MakeSpec, resume: bool, overwrite: bool
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "spec.yaml").write_text("name: mine\n")
    with pytest.raises(Misuse, match=r"home is not empty"):
        train(make_spec(), tmp_path / "home", resume=resume, overwrite=overwrite)
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["spec.yaml"]


def test_overwrite_deletes_what_the_run_wrote_and_nothing_else(tmp_path: Path, make_spec: MakeSpec) -> None:
    train(make_spec(), tmp_path / "run", steps=4)
    (tmp_path / "run" / "notes.md").write_text("mine")
    (tmp_path / "run" / "checkpoints" / "kept").write_text("mine")
    train(make_spec(training__seed=1), tmp_path / "run", steps=2, overwrite=True)
    assert (tmp_path / "run" / "notes.md").read_text() == "mine"
    assert _steps(tmp_path / "run") == ["kept", "step-2"]
    assert [row["step"] for row in _rows(tmp_path / "run")] == [1, 2, 2]


def test_a_folder_that_cannot_have_its_name_is_named(tmp_path: Path, make_spec: MakeSpec) -> None:
    with pytest.raises(EnvironmentFailed, match=r"cannot write .*: File name too long"):
        train(make_spec(), tmp_path / ("x" * 300))


def test_a_folder_in_use_or_a_file_is_refused(tmp_path: Path, make_spec: MakeSpec) -> None:
    with opened(tmp_path / "run", resume=False, overwrite=False), pytest.raises(Misuse, match="another process"):
        train(make_spec(), tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(Misuse, match="is a file"):
        train(make_spec(), tmp_path / "file")
    with pytest.raises(EnvironmentFailed, match="cannot write"):
        train(make_spec(), tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"training__gradient_clip": 2.0}, r"training\.gradient_clip: 1\.0 -> 2\.0 \(convergence\)"),
        ({"precision__optimizer_states": "float32"}, r"precision\.optimizer_states: .*\(precision\)"),
    ],
    ids=["convergence", "precision"],
)
def test_a_changed_recipe_needs_permission(
    tmp_path: Path, make_spec: MakeSpec, change: dict[str, Any], named: str
) -> None:
    train(make_spec(), tmp_path / "run", steps=2)
    with pytest.raises(Refused, match=rf"--allow-changed(?s:.*){named}"):
        train(make_spec(**change), tmp_path / "run", resume=True)
    assert train(make_spec(**change), tmp_path / "run", resume=True, allow_changed=True).step == 6


def test_a_change_that_breaks_checkpoints_is_refused_with_or_without_permission(
    tmp_path: Path, make_spec: MakeSpec
) -> None:
    train(make_spec(), tmp_path / "run", steps=2)
    for allow in (False, True):
        with pytest.raises(Refused, match=r"do not fit(?s:.*)model\.hidden_size: 16 -> 8"):
            train(make_spec(model__hidden_size=8), tmp_path / "run", resume=True, allow_changed=allow)


def test_changes_of_execution_and_of_names_pass(tmp_path: Path, make_spec: MakeSpec) -> None:
    train(make_spec(), tmp_path / "run", steps=2)
    changed = make_spec(summary="another", parallelism__microbatch_size=2, training__checkpoint__every_steps=3)
    assert train(changed, tmp_path / "run", resume=True).step == 6
    assert "summary: another" in (tmp_path / "run" / "spec.yaml").read_text()


def test_an_edited_spec_of_a_run_is_refused(tmp_path: Path, make_spec: MakeSpec) -> None:
    train(make_spec(), tmp_path / "run", steps=2)
    path = tmp_path / "run" / "spec.yaml"
    path.write_text(path.read_text().replace("gradient_clip: 1.0", "gradient_clip: 9.0"))
    with pytest.raises(Misuse, match="was edited"):
        train(make_spec(), tmp_path / "run", resume=True)


def test_changed_text_needs_permission_and_keeps_the_tokenizer(tmp_path: Path, make_spec: MakeSpec) -> None:
    spec = make_spec()
    train(spec, tmp_path / "run", steps=2)
    before = (tmp_path / "run" / "tokenizer.json").read_text()
    (tmp_path / "text.txt").write_text("quite another text, of other words\n" * 400)
    with pytest.raises(Refused, match=r"not what the run was trained on until step 2"):
        train(spec, tmp_path / "run", resume=True)
    train(spec, tmp_path / "run", steps=4, resume=True, allow_changed=True)
    assert (tmp_path / "run" / "tokenizer.json").read_text() == before
    assert train(spec, tmp_path / "run", resume=True).step == 6


def test_a_disk_that_fills_ends_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    log = Log()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 0 if log.of(Saved) else 2**40))
    with pytest.raises(EnvironmentFailed, match=r"checkpoints: [\d,]+ bytes are needed and 0 are free"):
        train(make_spec(), tmp_path / "run", watch=log.watch())
    monkeypatch.undo()
    monkeypatch.setenv("MODELSPEC_CACHE", str(tmp_path / "cache"))
    assert _steps(tmp_path / "run") == ["step-2"]
    assert train(make_spec(), tmp_path / "run", resume=True).step == 6


def test_a_disk_without_room_for_a_checkpoint_is_found_before_training(
    tmp_path: Path, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2**20))
    with pytest.raises(EnvironmentFailed, match=r"1,048,576 are free"):
        train(make_spec(), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_run_that_computes_again_writes_the_same_weights(tmp_path: Path, make_spec: MakeSpec) -> None:
    train(make_spec(), tmp_path / "kept", steps=2)
    for name, items in (("parts", ["norm", "mla_up_projection", "swiglu"]), ("layers", ["layer", "norm"])):
        train(make_spec(parallelism={"recompute": items}), tmp_path / name, steps=2)
        assert _rows(tmp_path / name) == _rows(tmp_path / "kept")
        assert _tensors(tmp_path / name, 2) == _tensors(tmp_path / "kept", 2)


def test_a_dry_run_takes_one_step_and_leaves_nothing(tmp_path: Path, make_spec: MakeSpec) -> None:
    tried = dry_run(make_spec())
    assert tried.step.tokens == 64 and tried.peak_memory > 2**20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "text.txt"]


def test_everything_that_keeps_a_spec_from_being_trained_is_named_at_once(make_spec: MakeSpec) -> None:
    spec = make_spec(
        data={"packing": {"document_mask": True}, "fill_in_middle": {"rate": 0.1, "format": "psm"}},
        precision={"gradients": "bfloat16"},
    )
    assert [found.path for found in unsupported(spec)] == [
        "data.sources", "data.tokenizer", "data.packing.document_mask", "data.fill_in_middle", "precision.gradients",
    ]  # fmt: skip
    assert [found.path for found in unsupported(make_spec(training=None))] == ["training"]
    assert unsupported(make_spec()) == []
    with pytest.raises(Refused, match=r"tiny cannot be trained(?s:.*)help: set data\.tokenizer\.vocab_size=280"):
        dry_run(make_spec(data__tokenizer__vocab_size=300))


def test_a_spec_for_more_processes_is_no_business_of_one(make_spec: MakeSpec) -> None:
    with pytest.raises(Misuse, match=r"parallelism\.world_size is 2 and this is one process: .*--nproc 2"):
        dry_run(make_spec(parallelism={"world_size": 2}))


def test_a_launchers_other_world_is_refused(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(Misuse, match=r"the launcher started 4 processes and parallelism\.world_size is 1"):
        dry_run(make_spec())


def test_a_tokenizer_file_larger_than_the_embedding_is_refused(tmp_path: Path, make_spec: MakeSpec) -> None:
    train(make_spec(), tmp_path / "run", steps=1)
    file = {"type": "file", "path": str(tmp_path / "run" / "tokenizer.json")}
    assert dry_run(make_spec(data__tokenizer=file)).step.step == 1
    with pytest.raises(Refused, match=r"280 tokens do not fit the 270 rows"):
        dry_run(make_spec(data__tokenizer=file, model__vocab_size=270))


@pytest.mark.parametrize(("device", "kind"), [("nonsense", Misuse), ("cuda:77", EnvironmentFailed)])
def test_a_device_that_is_none_or_not_there_is_named(make_spec: MakeSpec, device: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=device):
        dry_run(make_spec(), device=device)


def test_determinism_is_asked_for_while_training_only(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    step = Learner.step

    def spy(self: Learner, *arguments: Any) -> StepDone:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return step(self, *arguments)

    monkeypatch.setattr(Learner, "step", spy)
    dry_run(make_spec(training__deterministic=True))
    assert seen == [True] and not torch.are_deterministic_algorithms_enabled()


def test_the_plot_is_a_png_and_needs_a_step(tmp_path: Path) -> None:
    write_plot(tmp_path / "none.png", "empty", [])
    assert not (tmp_path / "none.png").exists()
    rows = [{"step": step, "lm_loss": 5.0 / step, "mtp_loss": 6.0 / step} for step in range(1, 100)]
    write_plot(tmp_path / "loss.png", "a run", [*rows, {"step": 99, "val_loss": 0.1, "unigram_loss": 4.0}])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_running_out_of_memory_is_one_clear_error(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        torch.empty(2**60)

    monkeypatch.setattr(Learner, "step", fail)
    with pytest.raises(EnvironmentFailed, match=r"out of memory(?s:.*)microbatch_size"):
        dry_run(make_spec())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A short sample and no drawing; and one thread: tiny operations only wait for one another on more."""
    monkeypatch.setattr(trainer, "_SAMPLE_TOKENS", 4)
    monkeypatch.setattr(trainer, "write_plot", lambda path, title, rows: path.write_bytes(b"drawn"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_device_without_values_is_refused_before_anything_is_written(make_spec: MakeSpec, tmp_path: Path) -> None:
    with pytest.raises(Misuse, match="meta holds no values"):
        train(make_spec(), tmp_path / "run", device="meta")
    assert not (tmp_path / "run").exists()
