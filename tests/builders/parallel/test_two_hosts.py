"""Two hosts, played by two network namespaces with a cable between them: trained across, cut, and gone on with."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import pytest

from tests.builders.parallel.started import rows, sets, settings, small_folder, wait_for_step

# The hosts' names for this process, so that two runs of this test do not share a cable.
HOSTS = tuple(f"ms{os.getpid()}{side}" for side in "ab")
ADDRESSES = ("10.213.77.1", "10.213.77.2")
# Seconds. A step takes a tenth of one, but for a busy machine.
PATIENCE = 12


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture(scope="module")
def cable() -> Iterator[None]:
    """Two namespaces, each with its own loopback and one end of a cable."""
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", HOSTS[0], "netns", HOSTS[0], "type", "veth", "peer", "name", HOSTS[1], "netns", HOSTS[1])
        for host, address in zip(HOSTS, ADDRESSES, strict=True):
            ip("-n", host, "address", "add", f"{address}/24", "dev", host)
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "link", "set", host, "up")
        yield
    except (OSError, subprocess.CalledProcessError) as error:
        why = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        print(f"two hosts are not played: network namespaces are not permitted: {why}")
        pytest.skip(f"network namespaces are not permitted: {why}")
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", host], check=False, capture_output=True)


@dataclass
class Host:
    """What one host runs, and the file that takes what is said there."""

    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text("utf-8", errors="replace")

    def ended(self, timeout: float) -> int:
        """The exit code of its launcher, which ends within `timeout` seconds."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.said) from None


@contextmanager
def hosts(folder: Path, *arguments: str) -> Iterator[list[Host]]:
    """`modelspec train` with one rank on each host, by torchrun. What it started ends with the block."""
    meeting = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "pair")
    program = ("-m", "modelspec", "train", "small.yaml", "--device", "cpu", "--world", "2", "--out", "run", *arguments)
    started = []
    try:
        for host, address in zip(HOSTS, ADDRESSES, strict=True):
            # The hosts share the name of this machine: neither can tell by itself which of them is the first.
            first = f"--rdzv-conf=is_host={int(address == ADDRESSES[0])}"
            at = ("--rdzv-endpoint", f"{ADDRESSES[0]}:29400", "--local-addr", address, first)
            launcher = [sys.executable, "-m", "torch.distributed.run", *meeting, *at]
            log = folder / f"{host}-{'-'.join(arguments)[-10:]}.log"
            with log.open("wb") as file:
                process = subprocess.Popen(
                    ["ip", "netns", "exec", host, *launcher, *program],
                    cwd=folder,
                    env=settings(folder),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            started.append(Host(process, log))
        yield started
    finally:
        for each in started:
            _kill_session(each.process.pid)
            each.process.wait()


@pytest.mark.usefixtures("cable")
def test_a_cut_cable_ends_both_hosts_with_a_message_and_the_run_goes_on(tmp_path: Path) -> None:
    run = small_folder(tmp_path) / "run"
    long = (*sets("training.stages.0.steps=100000", "parallelism.expert=2"), "--hang-timeout", str(PATIENCE))
    with hosts(tmp_path, *long) as (first, second):
        wait_for_step(run, 4)
        ip("-n", HOSTS[0], "link", "set", HOSTS[0], "down")
        cut = monotonic()
        assert first.ended(60) == 1
        assert f"no progress for {PATIENCE} s: rank 1 is silent, stopped or out of reach; rank 0 is wait" in first.said
        # torchrun on the second host asks the first one's store without end; what it started has ended.
        while "does not answer" not in second.said:
            assert monotonic() - cut < 60, second.said
            sleep(0.1)
        assert f"rank 1: no progress for {PATIENCE} s in " in second.said
        for host in (first, second):
            assert "Traceback" not in host.said.partition("error: ")[0]
    ip("-n", HOSTS[0], "link", "set", HOSTS[0], "up")
    last = max(int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*"))
    with hosts(tmp_path, *long, "--resume", "--steps", str(last + 1)) as pair:
        for host in pair:
            assert host.ended(60) == 0, host.said
    assert max(step for step, name in rows(run) if name == "loss") == last + 1


def _kill_session(leader: int) -> None:
    """Kills a process that began a session, and all in it: a rank has a group of its own."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ProcessLookupError):
            if os.getsid(int(entry.name)) == leader:
                os.kill(int(entry.name), signal.SIGKILL)
