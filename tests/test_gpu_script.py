"""`make gpu` is ready for a machine with a GPU: a dry run has been through all of it, and its report adds up."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.gpu import __main__ as script
from benchmarks.gpu import report, timing
from benchmarks.gpu.worker import SECTIONS

ROOT = Path(__file__).parents[1]
# What the machine with a GPU lacks, and the packages that would pull it in.
ABSENT = ("pydantic", "ruamel", "jsonschema", "click", "rich", "modelspec.schema", "modelspec.builders")
BLOCKER = f"""
import sys
import time

class Absent:
    def find_spec(self, name, path=None, target=None):
        if any(name == each or name.startswith(each + ".") for each in {ABSENT!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}: it is absent here", name=name)

sys.meta_path.insert(0, Absent())
"""


def row(section: str, operation: str, shape: str, side: str, seconds: float | None, **more: Any) -> report.Row:
    made: report.Row = {
        "section": section,
        "operation": operation,
        "shape": shape,
        "side": side,
        "ours": side == "ours",
    }
    made |= {"flops": 0.0, "bytes": 0.0, "format": "fp8", **more}
    return made if seconds is None else made | {"seconds": seconds}


# A copy at 4 TB/s, a BF16 product at 800 TFLOP/s: in FP8 the least is 1 ms of 1.6 TFLOP.
ROWS = [
    row("ceilings", "copy", "1x1", "torch", 1e-3, bytes=4e9),
    row("ceilings", "BF16 product", "1x1", "torch", 1e-3, flops=8e11, format="bf16"),
    row("dense", "fprop", report.DENSE, "ours", 2e-3, flops=1.6e12, bytes=1e9),
    row("dense", "fprop", report.DENSE, "BF16", 3e-3, flops=1.6e12, bytes=1e9, format="bf16"),
    row("dense", "fprop", report.DENSE, "FP8 blocks", None, absent="RuntimeError: no such recipe"),
    row("quantise", "quantize", "32768x7168", "ours", 1e-3, bytes=3.8e9),
    row("configs", "fprop", report.DENSE, "large", 2e-3, flops=1.6e12),
    row("configs", "fprop", report.DENSE, "square", 1e-3, flops=1.6e12),
    row("configs", "fprop", report.DENSE, "deep", None, failed="error 0.3, at most 0.005"),
]


def test_a_dry_run_goes_through_everything_with_torch_and_the_kernels_alone(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"in {len(SECTIONS)} sections, 0 failed" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_3(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--sections", "ceilings"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "No GPU here" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_python_without_triton_and_a_folder_that_is_a_file_are_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never() -> bool:
        raise AssertionError("a GPU was looked for")

    monkeypatch.setattr(script, "has_gpu", never)
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "file" / "results")])
    assert script.main() == 3
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'file'} is no folder that can be written to\n")
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])
    monkeypatch.setattr(script, "find_spec", lambda name: None if name == "triton" else name)
    assert script.main() == 3
    told = capsys.readouterr().out
    assert told.startswith("needs torch and triton: ") and "lacks triton;" in told and told.count("\n") == 1


def test_a_section_that_hangs_leaves_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = json.dumps({"section": "dense", "operation": "fprop", "passed": True})
    program = f"import sys, time; open(sys.argv[2], 'a').write({told!r} + chr(10)); time.sleep(60)"
    worker = tmp_path / "worker.py"
    worker.write_text(program)
    real = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        return real([sys.executable, str(worker), *command[2:]], **options)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(script, "LEAST", 1)
    _, rows, cut = script.full_run(["dense", "moe"], tmp_path, 3)
    assert [each["operation"] for each in rows] == ["fprop"]
    assert cut == ["dense: ended after 3 seconds", "moe: skipped, the time was over"]


def test_the_least_time_is_the_larger_of_bytes_and_products() -> None:
    top = report.ceilings(ROWS)
    assert top is not None
    assert top == report.Ceilings(4e12, 8e14)
    assert top.least(ROWS[2]) == pytest.approx(1e-3)
    assert top.least(ROWS[3]) == pytest.approx(2e-3)
    assert top.least(ROWS[5]) == pytest.approx(0.95e-3)
    assert report.ceilings(ROWS[1:]) is None


def test_goals_are_met_missed_or_not_measured() -> None:
    told = dict(zip(((goal.operation, goal.unit) for goal in report.GOALS), report.goals(ROWS), strict=True))
    assert told["fprop", "TFLOP/s"].endswith(": 800 TFLOP/s, MISSED")
    assert told["fprop", "x"].endswith(": not measured")
    assert told["quantize", "TB/s"].endswith(": 3.8 TB/s, met")
    assert told["wgrad", "TFLOP/s"].endswith(": not measured")


def test_the_table_sets_each_time_beside_the_least_and_the_others() -> None:
    _, dense, quantise, configs = report.table(ROWS)
    assert "ours 2.000 ms 800 TFLOP/s, least 1.000 ms (50%) | BF16 3.000 ms (1.50x) | FP8 blocks: absent" in dense
    assert "ours 1.000 ms 3.80 TB/s, least 0.950 ms (95%)" in quantise
    assert "square 1.000 ms (0.50x) | deep: FAILED error 0.3" in configs


def test_the_fastest_configuration_that_is_right_wins() -> None:
    assert report.winners(ROWS) == {f"configs: fprop {report.DENSE}": "square"}
    assert report.failures(ROWS) == [f"configs fprop {report.DENSE} deep error 0.3, at most 0.005"]


def test_every_goal_has_a_case_that_measures_it() -> None:
    from benchmarks.gpu import dense, grouped, moe, quantizers

    shapes = {
        "fprop": dense.FPROP,
        "wgrad": dense.WGRAD,
        "grouped fprop": grouped.FPROP,
        "grouped dgrad": grouped.DGRAD,
        "grouped wgrad": grouped.WGRAD,
        "quantize": quantizers.SHAPES,
        "quantize_both": quantizers.SHAPES,
        "MoE forward and backward": (moe.SHAPE,),
    }
    for goal in report.GOALS:
        assert goal.shape in {"x".join(map(str, shape)) for shape in shapes[goal.operation]}, goal


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("AMD Instinct MI300X", "mi300x"),
        ("A thing", "a-thing"),
    ],
)
def test_files_are_named_after_the_device(device: str, name: str) -> None:
    assert report.short_name(device) == name


def test_results_are_written_for_the_table_of_configurations(tmp_path: Path) -> None:
    script.written(tmp_path, {"device": "NVIDIA H200"}, ROWS, ["moe: died with status -9"])
    configs = json.loads((tmp_path / "h200-configs.json").read_text())
    assert configs["winners"] == {f"configs: fprop {report.DENSE}": "square"}
    kernels = json.loads((tmp_path / "h200-kernels.json").read_text())
    assert {each["section"] for each in kernels["rows"]} == {"ceilings", "dense", "quantise"}
    assert kernels["cut"] == ["moe: died with status -9"]


class Clock:
    """An event of a device that has done all of its work already."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "Clock") -> float:
        return (end.at - self.at) * 1e3


def test_sides_are_timed_in_turns_once_they_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(timing, "SECONDS", 1e-3)

    def unwritten(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    def absent(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not on this device\nand more")

    place = timing.Place(torch.device("cpu"), dry=False)
    sides = [
        timing.Side("right", lambda x: x * 2, timing.distance, 1e-3, bytes=1e6),
        timing.Side("wrong", lambda x: x * 4, timing.distance, 1e-3, bytes=1e6),
        timing.Side("unwritten", unwritten, timing.distance, 1e-3, bytes=1e6),
        timing.Side("absent", absent, timing.distance, 1e-3, bytes=1e6, ours=False),
    ]
    case = timing.Case("double", "8x16", place.matrices(8, 16), lambda x: x + x, sides)
    right, wrong, nan, missing = timing.measured(case, place)
    assert right["error"] == 0
    assert 0 < right["quartiles"][0] <= right["seconds"] <= right["quartiles"][1]
    assert wrong["failed"] == "error 1, at most 0.001"
    assert nan["failed"] == "error nan, at most 0.001"
    assert missing["absent"] == "RuntimeError: not on this device"
    assert not any("seconds" in each for each in (wrong, nan, missing))


def test_a_run_on_a_gpu_writes_files_and_ends_with_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(sections: list[str], file: Path, seconds: float, dry: bool) -> str | None:
        machine = {"machine": {"device": "NVIDIA H200", "torch": "2.11", "triton": "3.6"}}
        lines = [machine, *(each for each in ROWS if each["section"] in sections and "failed" not in each)]
        with file.open("a") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)
        return None

    monkeypatch.setattr(script, "has_gpu", lambda: True)
    monkeypatch.setattr(script, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])
    assert script.main() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h200-configs.json", "h200-kernels.json"]
    told = capsys.readouterr().out
    assert told.count("NVIDIA H200, torch 2.11, triton 3.6; 0 tests passed") == 1
    assert "winner: configs: fprop" in told
    assert told.splitlines()[-1].startswith("goal: MoE forward and backward")
