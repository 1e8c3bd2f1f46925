"""All machines of a job meet at the first one, or each is told what is wrong."""

import json
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner

from modelspec.cli import app
from modelspec.launch.reach import reach

NANO = str(Path(__file__).parents[2] / "specs/deepseek-v3-nano.yaml")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def met(nodes: int, present: Sequence[int], port: int, patience: float) -> list[str | None]:
    with ThreadPoolExecutor(len(present)) as pool:
        return list(pool.map(lambda node: reach("localhost", port, nodes, node, patience), present))


def test_machines_that_all_reach_the_first_go_on() -> None:
    assert met(4, [3, 1, 2, 0], free_port(), 20) == [None] * 4
    assert reach("localhost", free_port(), 1, 0, 1) is None


def test_a_machine_that_is_missing_is_named_and_no_one_waits_for_ever() -> None:
    port = free_port()
    first, second = met(3, [0, 1], port, 1.5)
    assert first == f"1 of 3 machines did not reach this one at port {port}: 2"
    assert second is not None and f"the first machine, localhost, was not reached at port {port}" in second


def test_strangers_at_the_port_do_not_count() -> None:
    port = free_port()

    def stranger() -> None:
        for _ in range(200):
            try:
                with socket.create_connection(("localhost", port), timeout=1) as line:
                    line.sendall(b"GET / HTTP/1.0\r\n\r\n")
                    return
            except OSError:
                continue

    with ThreadPoolExecutor(3) as pool:
        head = pool.submit(reach, "localhost", port, 2, 0, 20)
        pool.submit(stranger).result()
        other = pool.submit(reach, "localhost", port, 2, 1, 20)
        assert (head.result(), other.result()) == (None, None)


def test_a_port_in_use_and_a_name_that_nobody_has_are_told() -> None:
    with socket.create_server(("", 0)) as taken:
        told = reach("localhost", taken.getsockname()[1], 2, 0, 1)
    assert told is not None and "cannot be opened here" in told
    nobody = reach("nobody.invalid", 29500, 2, 1, 0.5)
    assert nobody is not None and "nobody.invalid, was not reached" in nobody


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--head", "here"], "is not like node-0:29500"), (["--head", "here:1", "--node", "1"], "numbered from 0 to 0")],
)
def test_doctor_refuses_a_meeting_that_cannot_be(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["doctor", NANO, "--device", "cpu", *arguments])
    assert done.exit_code == 2 and message in " ".join(done.stderr.replace("│", " ").split())


def test_doctor_says_whether_the_machines_met(tmp_path: Path) -> None:
    arguments = ["doctor", NANO, "--device", "cpu", "--out", str(tmp_path / "run"), "--format", "json"]
    fine = CliRunner().invoke(app, [*arguments, "--head", f"localhost:{free_port()}"])
    assert fine.exit_code == 0
    assert json.loads(fine.stdout)["lines"][-1]["subject"] == "network"
    port = free_port()
    missing = CliRunner().invoke(app, [*arguments, "--head", f"localhost:{port}", "--nodes", "2", "--patience", "1"])
    assert missing.exit_code == 3
    assert "1 of 2 machines did not reach this one" in json.loads(missing.stdout)["lines"][-1]["message"]
