"""Where a process finds its place, which network it speaks over, and what the parent of `--nproc` makes of the ends of
its ranks; these are played by small programs.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from time import monotonic, sleep

import pytest

from modelspec.beat import LOST
from modelspec.builders.errors import EnvironmentFailed, Misuse
from modelspec.builders.parallel import start
from modelspec.builders.parallel.start import Place, device_of, place
from modelspec.cli import processes
from modelspec.cli.processes import run_processes
from tests.builders.parallel.started import ROOT, sets, settings, small_folder


def test_a_place_is_read_from_the_environment_of_a_launcher() -> None:
    assert place({}) is None
    assert place({"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}) == Place(5, 8, 1)
    assert place({"WORLD_SIZE": "8", "RANK": "5"}) == Place(5, 8, 5)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "abc", "RANK": "0"}, "WORLD_SIZE='abc'"),
        ({"WORLD_SIZE": "2"}, "RANK=''"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK='-1'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 of WORLD_SIZE=2"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "RANK=0 of WORLD_SIZE=0"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
    ],
)
def test_an_environment_that_is_no_place_is_misuse(environment: dict[str, str], words: str) -> None:
    with pytest.raises(Misuse) as raised:
        place(environment)
    assert words in str(raised.value) and raised.value.exit_code == 2


def test_a_rank_takes_the_gpu_with_its_number_and_any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert [device_of("cuda", Place(rank, 8, rank % 4)) for rank in (0, 5)] == ["cuda:0", "cuda:1"]
    assert device_of("cpu", Place(5, 8, 1)) == "cpu" and device_of("cuda:3", Place(5, 8, 1)) == "cuda:3"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert device_of("cuda", Place(3, 8, 3)) == "cuda:0"


def test_gloo_speaks_over_the_network_of_the_first_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    assert start._interface("127.0.0.1") == start._interface("localhost") == "lo"
    assert start._interface("no.such.host.invalid") is None
    # A name that means the machine itself is of no use to others.
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert start._interface("127.0.0.1") is None


def test_others_that_never_come_are_an_error_with_their_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        monkeypatch.setattr(start, "_ARRIVAL", timedelta(seconds=1))
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
        wanted = f"rank 1 cannot join the others at 127.0.0.1:{taken.getsockname()[1]}"
        with (
            pytest.raises(EnvironmentFailed, match=wanted),
            start.joined(Place(1, 2, 1), "cpu", timedelta(seconds=1), lambda words: None),
        ):
            pass


def test_a_device_that_a_rank_lacks_is_named_before_it_meets_the_others() -> None:
    with (
        pytest.raises(EnvironmentFailed, match="device cuda:77: "),
        start.joined(Place(0, 2, 0), "cuda:77", timedelta(seconds=1), lambda words: None),
    ):
        pass


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_no_place_to_meet_is_misuse(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv(missing)
    with (
        pytest.raises(Misuse, match="where ranks meet"),
        start.joined(Place(0, 2, 0), "cpu", timedelta(seconds=1), lambda words: None),
    ):
        pass


RANK = """
import json, os, signal, sys, time
rank, role, folder = int(os.environ["RANK"]), sys.argv[1 + int(os.environ["RANK"])], os.environ["MODELSPEC_RANKS"]
beat = {"begun": 4, "finished": 0, "doing": "step 4", "where": "f.py:1, f", "collective": "all_reduce", "tick": 1}
open(f"{folder}/rank-{rank}.beat", "w").write(json.dumps(beat))
signal.signal(signal.SIGUSR1, lambda *_: print("stacks", flush=True))
def stop(number, frame):
    print("saved", number, flush=True)
    sys.exit(128 + number)
match role:
    case "killed":
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    case "waits" | "obeys":
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        time.sleep(60)
    case "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    case "listens":
        import socket
        print(socket.socket(fileno=int(os.environ["MODELSPEC_STORE"])).getsockname()[0], file=open("address", "w"))
    case _:
        print("this is rank", rank, flush=True)
        sys.exit(int(role))
"""


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """run_processes with small programs in the place of ranks, each with its role."""
    (tmp_path / "modelspec.py").write_text(RANK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(processes, "_GRACE", 1.0)
    monkeypatch.setattr(processes, "_LAST", 1.0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "spec.yaml").touch()

    def run(*roles: str, stop: Callable[[], int | None] = lambda: None) -> int:
        return run_processes(roles, len(roles), tmp_path / "run", stop)

    return run


def test_ranks_that_end_well_end_well(played: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert played("0", "0") == 0
    assert capfd.readouterr() == ("this is rank 0\n", "")
    assert Path("run/logs/rank-1.log").read_text() == "this is rank 1\n"


@pytest.mark.parametrize(
    ("roles", "code", "words"),
    [
        (("0", "waits", "killed"), 3, "rank 2 was killed by SIGKILL in step 4, in all_reduce (f.py:1, f); the other"),
        ((str(LOST), "killed", str(LOST)), 3, "rank 1 was killed by SIGKILL"),
        (("deaf", "killed"), 3, "rank 1 was killed by SIGKILL"),
        ((str(LOST), "1"), 1, "rank 1 failed in step 4, in all_reduce (f.py:1, f):\nthis is rank 1\n"),
        ((str(LOST), "2", "waits"), 2, "this is rank 1"),
        ((str(LOST), str(LOST)), 3, "the ranks lost each other"),
    ],
)
def test_the_rank_that_failed_first_is_named_and_gives_the_code(
    played: Callable[..., int], capfd: pytest.CaptureFixture[str], roles: tuple[str, ...], code: int, words: str
) -> None:
    began = monotonic()
    assert played(*roles) == code
    assert monotonic() - began < 20
    said = capfd.readouterr().err
    assert words in said and said.count("rank 1 failed") + said.count("was killed") <= 1


def test_what_all_ranks_raise_is_said_once(played: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert played("2", "2") == 2
    assert capfd.readouterr() == ("this is rank 0\n", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_to_each_rank_once(
    played: Callable[..., int], capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    began = monotonic()
    assert played("obeys", "obeys", stop=lambda: number if monotonic() - began > 1 else None) == 128 + number
    assert capfd.readouterr() == (f"saved {int(number)}\n", "")
    assert Path("run/logs/rank-1.log").read_text() == f"saved {int(number)}\n"


def test_sigusr1_goes_to_all_ranks_and_ends_none(played: Callable[..., int]) -> None:
    began = monotonic()
    ask = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    ask.start()
    played("obeys", "obeys", stop=lambda: signal.SIGTERM if monotonic() - began > 2 else None)
    ask.join()
    assert Path("run/logs/rank-1.log").read_text() == "stacks\nsaved 15\n"


def test_ranks_meet_on_loopback(played: Callable[..., int]) -> None:
    assert played("listens", "0") == 0
    assert Path("address").read_text() == "127.0.0.1\n"


def test_stacks_of_all_ranks_are_written_on_request_and_ranks_whose_parent_was_killed_save(tmp_path: Path) -> None:
    run = small_folder(tmp_path) / "run"
    command = [sys.executable, "-m", "modelspec", "train", "small.yaml", "--device", "cpu", "--nproc", "2"]
    long = ("--out", "run", *sets("training.stages.0.steps=100000", "training.checkpoint=null"))
    with (tmp_path / "said").open("wb") as file:
        parent = subprocess.Popen([*command, *long], cwd=tmp_path, env=settings(tmp_path), stdout=file, stderr=file)
    children: list[str] = []
    try:
        _wait(lambda: (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) > 2)
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        parent.send_signal(signal.SIGUSR1)
        logs = [run / "logs" / f"rank-{rank}.log" for rank in range(2)]
        _wait(lambda: all("in stepped" in log.read_text() or "in train" in log.read_text() for log in logs))
        parent.kill()
        parent.wait()
        _wait(lambda: not any(map(_lives, children)))
    finally:
        parent.kill()
        parent.wait()
        for child in children:
            if _lives(child):
                os.kill(int(child), signal.SIGKILL)
    (saved,) = (run / "checkpoints").glob("step-*")
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert saved.name == f"step-{steps[-1]}"
    assert "stopped by a signal" in (tmp_path / "said").read_text()


def _lives(process: str) -> bool:
    """Whether a process has not ended; who adopted it may not have noticed yet."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def _wait(done: Callable[[], bool]) -> None:
    end = monotonic() + 60
    while not done():
        assert monotonic() < end
        sleep(0.1)


def test_who_starts_and_watches_the_ranks_does_not_load_torch() -> None:
    program = "import sys, modelspec.cli.processes; assert not {'torch', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
