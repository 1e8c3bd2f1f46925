"""Runs a function on several processes of a gloo group on loopback, as a test's way to have a cluster.

One launch costs seconds, so a function proves many things one after another. torch is imported once for all launches,
by a server that ranks are forked from: 8 ranks that import it for themselves take 25 s of a processor.
"""

import multiprocessing as mp
import os
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from queue import Empty
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 240


def run_ranks(function: Callable[..., None], world: int, *args: Any, timeout: float = TIMEOUT) -> None:
    """Calls function(*args) on `world` ranks; raises AssertionError with the tracebacks of those that failed.

    The function is one of a module's top level. All ranks are ended once `timeout` seconds have passed.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["modelspec.builders.parallel.learner"])
    queue = context.Queue()
    port = _free_port()
    ranks = [
        context.Process(target=_rank, args=(rank, world, port, queue, function, args), daemon=True)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        end = monotonic() + timeout
        while any(process.is_alive() for process in ranks) and monotonic() < end and queue.empty():
            ranks[0].join(0.05)
        # A rank that failed takes the others' connections with it: they have this long to say so.
        for process in ranks:
            process.join(max(min(end - monotonic(), 5.0), 0.0))
        hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        failures: list[str] = []
        with suppress(Empty):
            while True:
                failures.append(queue.get(timeout=0.1))
        died = [f"rank {rank}: exit code {p.exitcode}" for rank, p in enumerate(ranks) if p.exitcode not in (0, None)]
    finally:
        for process in ranks:
            process.kill()
    assert not failures, "\n".join(failures)
    assert not hung, f"ranks {hung} ran longer than {timeout} s"
    assert not died, "\n".join(died)


def _rank(rank: int, world: int, port: int, queue: Any, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    try:
        function(*args)
    except BaseException:
        queue.put(f"--- rank {rank}\n{traceback.format_exc()}")
        queue.close()
        queue.join_thread()
        # Others may wait for this rank in a collective: no farewell.
        os._exit(1)
    dist.barrier()
    dist.destroy_process_group()
    # gloo's threads now and then abort a process that ends in the ordinary way.
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
