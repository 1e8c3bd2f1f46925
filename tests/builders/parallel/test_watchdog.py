"""Ranks that hang: which are behind, what is said once, and what becomes of threads; most of it within one process."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from time import monotonic, sleep
from types import FrameType

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from modelspec.beat import Beat
from modelspec.builders.parallel import watchdog as module
from modelspec.builders.parallel.pulse import Pulse, named, whereabouts
from modelspec.builders.parallel.watchdog import Watchdog, another, described
from modelspec.builders.parallel.world import World
from tests.builders.parallel.started import ROOT

# A rank of a job without a launcher: joins, takes steps, and does in the third what its role says.
WORKER = """
import os, signal, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from modelspec.builders.errors import EnvironmentFailed
from modelspec.builders.parallel.start import Lost, joined, place

def end(words):
    print(words or "", flush=True)
    os._exit(3)

def stuck():
    time.sleep(60)

here = place(os.environ)
role = dict(zip(range(9), sys.argv[1:])).get(here.rank)
try:
    with joined(here, "cpu", timedelta(seconds=4), end) as world:
        for step in range(1, 4):
            world.pulse.begin(f"step {step}")
            if step == 3:
                match role:
                    case "fails":
                        raise EnvironmentFailed("the disk is full")
                    case "stops":
                        os.kill(os.getpid(), signal.SIGSTOP)
                    case "sleeps":
                        stuck()
            dist.all_reduce(torch.ones(1))
except Lost as lost:
    print(lost if lost.speaks else "", flush=True)
    sys.exit(3)
except EnvironmentFailed as error:
    print(f"mine: {error}", flush=True)
    sys.exit(3)
"""


@pytest.fixture
def store() -> Iterator[Store]:
    yield TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watchdogs of this process wait for less than those of a cluster."""
    monkeypatch.setattr(module, "_SILENT", 1.0)
    monkeypatch.setattr(module, "_STACKS", 0.2)


class Watched:
    """A rank of one process's threads: its pulse, its watchdog and what that says when it ends the rank."""

    def __init__(self, store: Store, rank: int, size: int, folder: Path, patience: float = 1.0) -> None:
        self.said: list[str | None] = []
        self.ended = threading.Event()
        self.pulse = Pulse()
        self.pulse.keep_stacks(folder / "logs" / f"rank-{rank}.log")
        self.watchdog = Watchdog(
            another(store), rank, size, self.pulse, timedelta(seconds=patience), self.end, "rank 0's store"
        )
        self.watchdog.start()

    def end(self, words: str | None) -> None:
        self.said.append(words)
        self.ended.set()

    def close(self) -> None:
        """Ends the threads."""
        self.watchdog.stop()
        self.pulse.close()


def test_ranks_that_do_not_get_on_end_with_one_message_and_a_stack_each(store: Store, tmp_path: Path) -> None:
    ranks = [Watched(store, rank, 3, tmp_path) for rank in range(3)]
    for rank in ranks:
        rank.pulse.begin("step 7")
    for rank in ranks[:2]:
        rank.pulse.begin("step 8")
    for rank in ranks:
        assert rank.ended.wait(20)
    (said,) = [words for rank in ranks for words in rank.said if words is not None]
    assert said.startswith("no progress for 1 s: rank 2 is behind in step 7, at ")
    assert "ranks 0, 1 are waiting in step 8" in said
    assert str(tmp_path / "logs") in said and "--resume" in said
    for number, rank in enumerate(ranks):
        rank.close()
        assert "in wait" in (tmp_path / "logs" / f"rank-{number}.log").read_text()


def test_a_rank_whose_beats_do_not_come_any_more_is_silent_and_another_speaks(store: Store, tmp_path: Path) -> None:
    ranks = [Watched(store, rank, 3, tmp_path) for rank in range(3)]
    sleep(0.5)
    ranks[0].watchdog.stop()
    for rank in ranks[1:]:
        assert rank.ended.wait(20)
    assert not ranks[0].said and ranks[2].said == [None]
    (said,) = ranks[1].said
    assert said is not None and "rank 0 is silent, stopped or out of reach; ranks 1, 2 are waiting" in said
    for rank in ranks:
        rank.close()


def test_progress_of_one_rank_is_progress_of_all(store: Store, tmp_path: Path) -> None:
    ranks = [Watched(store, rank, 2, tmp_path) for rank in range(2)]
    end = monotonic() + 3
    while monotonic() < end:
        ranks[0].pulse.finish()
        sleep(0.1)
    assert not any(rank.ended.is_set() for rank in ranks)
    before = threading.active_count()
    for rank in ranks:
        rank.close()
    assert threading.active_count() == before - 4
    assert not (tmp_path / "logs").exists()


def test_a_rank_says_why_it_leaves_and_one_of_the_others_tells(store: Store, tmp_path: Path) -> None:
    ranks = [Watched(store, rank, 3, tmp_path, patience=60) for rank in range(3)]
    ranks[2].pulse.begin("step 5")
    sleep(1.2)
    ranks[2].watchdog.leave("the disk is full")
    told = [rank.watchdog.lost() for rank in ranks[:2]]
    assert [words for words, _ in told] == ["rank 2 has ended in step 5: the disk is full"] * 2
    assert [speaks for _, speaks in told] == [True, False]
    for rank in ranks:
        rank.close()


def beat(begun: int, collective: str | None = "all_reduce", left: str | None = None) -> Beat:
    return Beat(begun, 0, f"step {begun}", "f.py:1, f", collective, 1, left)


@pytest.mark.parametrize(
    ("beats", "words"),
    [
        (
            {0: beat(3), 1: beat(2)},
            "rank 1 is behind in step 2, in all_reduce (f.py:1, f); rank 0 is waiting in step 3",
        ),
        ({0: beat(3), 1: beat(3, None)}, "rank 1 is behind in step 3, at f.py:1, f; rank 0 is waiting"),
        ({0: beat(3), 1: beat(3)}, "ranks 0, 1 are waiting in step 3, in all_reduce (f.py:1, f)"),
        ({0: beat(3), 1: beat(3, left="why")}, "rank 1 has ended; rank 0 is waiting"),
        ({1: beat(3)}, "rank 0 is silent, stopped or out of reach; rank 1 is waiting"),
    ],
)
def test_those_behind_are_told_from_those_that_wait(beats: dict[int, Beat], words: str) -> None:
    assert described(beats, 2).startswith(words)


def test_of_many_ranks_the_first_are_named() -> None:
    assert named(range(2048)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2040 more"


def test_a_stack_in_torch_names_the_collective_and_a_place_of_ours(tmp_path: Path) -> None:
    frames: list[FrameType] = []

    def note(*arguments: object) -> None:
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        raise ValueError

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.distributed.distributed_c10d._rank_not_in_group", note)
            with pytest.raises(ValueError):
                World(size=2).barrier()
    finally:
        dist.destroy_process_group()
    place, collective = whereabouts(frames[1:])
    assert collective == "barrier"
    assert place.startswith("builders/parallel/world.py:") and place.endswith(", barrier")


def test_beats_come_back_as_they_were_sent() -> None:
    pulse = Pulse()
    pulse.begin("step 1")
    sent = pulse.beat()
    assert Beat.read(sent.dumped()) == sent
    assert json.loads(sent.dumped())["doing"] == "step 1"


def run_workers(folder: Path, *roles: str) -> list["subprocess.Popen[str]"]:
    """A process for each role, none of them under a launcher."""
    (folder / "worker.py").write_text(WORKER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": str(len(roles)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    settings = os.environ | place | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, str(folder / "worker.py"), *roles]
    return [
        subprocess.Popen(command, env=settings | {"RANK": str(rank)}, text=True, stdout=subprocess.PIPE)
        for rank in range(len(roles))
    ]


def test_a_stopped_rank_and_one_that_sleeps_end_the_job_by_the_watchdog(tmp_path: Path) -> None:
    ranks = run_workers(tmp_path, "", "sleeps", "stops")
    try:
        said = [rank.communicate(timeout=60)[0] for rank in ranks[:2]]
        assert [rank.returncode for rank in ranks[:2]] == [3, 3]
        assert ranks[2].poll() is None
    finally:
        for rank in ranks:
            rank.kill()
    assert "rank 2 is silent, stopped or out of reach" in said[0]
    assert "rank 0 is waiting in step 3, in all_reduce" in said[0] and "rank 1 is waiting in step 3, at" in said[0]
    assert not said[1].strip()
    ranks[2].communicate(timeout=10)


def test_the_reason_of_a_rank_that_fails_is_told_with_the_collective_that_another_lost_it_in(tmp_path: Path) -> None:
    ranks = run_workers(tmp_path, "", "fails")
    try:
        said = [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [3, 3]
    assert said[0].startswith("rank 0: step 3, all_reduce (")
    assert "rank 1 has ended in step 3: the disk is full" in said[0] and "--resume" in said[0]
    assert said[1] == "mine: the disk is full\n"
