"""Whether all machines of a job reach the first one, tried before anything expensive starts.

The first machine listens; every other one says its number until it is answered, and answers come once all are there.
So a pod that still waits for a machine holds the others, and a blocked port is found in a minute, not in a hang.
"""

import socket
import struct
import time
from contextlib import closing, suppress

_NUMBER = struct.Struct("!4sI")
_HELLO, _ANSWER = b"mspc", b"all"


def reach(host: str, port: int, nodes: int, node: int, patience: float = 60.0) -> str | None:
    """None once all `nodes` machines have met at the first, which is `host`; else what is wrong, after `patience` s."""
    end = time.monotonic() + patience
    return _wait(port, nodes, end) if node == 0 else _ask(host, port, node, end)


def _wait(port: int, nodes: int, end: float) -> str | None:
    missing = set(range(1, nodes))
    family = socket.AF_INET6 if (both := socket.has_dualstack_ipv6()) else socket.AF_INET
    held: list[socket.socket] = []
    try:
        server = socket.create_server(("", port), family=family, backlog=max(nodes, 1), dualstack_ipv6=both)
    except OSError as error:
        return f"port {port} cannot be opened here: {error.strerror}"
    with closing(server):
        try:
            while missing and (left := end - time.monotonic()) > 0:
                server.settimeout(left)
                with suppress(OSError):
                    guest, _ = server.accept()
                    held.append(guest)
                    guest.settimeout(5.0)
                    hello, number = _NUMBER.unpack(_read(guest, _NUMBER.size))
                    if hello == _HELLO:
                        missing.discard(number)
            if not missing:
                for guest in held:
                    with suppress(OSError):
                        guest.sendall(_ANSWER)
                return None
            first = ", ".join(map(str, sorted(missing)[:8])) + (", ..." if len(missing) > 8 else "")
            return f"{len(missing)} of {nodes} machines did not reach this one at port {port}: {first}"
        finally:
            for guest in held:
                guest.close()


def _ask(host: str, port: int, node: int, end: float) -> str | None:
    problem = "nothing was tried"
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(left, 10.0)) as line:
                line.sendall(_NUMBER.pack(_HELLO, node))
                line.settimeout(max(end - time.monotonic(), 0.1))
                if _read(line, len(_ANSWER)) == _ANSWER:
                    return None
                problem = "another program listens there"
        except OSError as error:
            problem = error.strerror or str(error)
        time.sleep(min(1.0, max(end - time.monotonic(), 0.0)))
    return f"the first machine, {host}, was not reached at port {port}: {problem}"


def _read(line: socket.socket, count: int) -> bytes:
    """That many bytes. Raises OSError where the other side says less."""
    content = b""
    while len(content) < count:
        if not (part := line.recv(count - len(content))):
            raise OSError("the other side closed the connection")
        content += part
    return content
