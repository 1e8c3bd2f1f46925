"""Shell scripts that say a value in no other way than quoted, and the lines that several of them share."""

from collections.abc import Iterable, Iterator
from shlex import quote

from modelspec.launch.job import Job


def command(words: Iterable[str]) -> str:
    """Words as one line of the shell, each of them literal."""
    return " ".join(map(quote, words))


def continued(words: Iterable[str], indent: str = "    ") -> str:
    """One command of the shell in several lines."""
    return f" \\\n{indent}".join(words)


def preamble(job: Job, flags: str = "euo") -> Iterator[str]:
    """Environment, interpreter and the shell's strictness.

    What is set already outside counts, except what the job itself was given.
    """
    if job.before:
        # Before `set -u`, which the scripts of modules and environments do not bear.
        yield from ("set -e", *job.before, "set +e")
    yield f"set -{flags} pipefail"
    for name, value in job.environment.items():
        yield f"export {name}={quote(value)}"
    for name, value in job.variables().items():
        yield f'export {name}="${{{name}:-{value}}}"'
    if "OMP_NUM_THREADS" not in job.environment:
        share = f"cores / {job.processes} > 0 ? cores / {job.processes} : 1"
        yield "cores=$(nproc)"
        yield f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-$(({share}))}}"'
    yield f"python=${{PYTHON:-{quote(job.python)}}}"
    yield f"logs={quote(job.at('logs'))}/$(uname -n)"
    if job.device == "cuda":
        yield 'export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-$logs/nccl-trace-rank-}"'
    yield 'mkdir -p "$logs"'


def torchrun(job: Job, rendezvous: Iterable[str], indent: str = "    ") -> str:
    """The command that starts the processes of this machine, which all end with the first that fails."""
    return continued(
        (
            '"$python" -m torch.distributed.run',
            f"--nnodes={job.nodes} --nproc-per-node={job.processes} --max-restarts=0",
            *rendezvous,
            '--log-dir="$logs" --tee=3',
            command(job.train(job.at("spec.yaml"))),
        ),
        indent,
    )


def script(lines: Iterable[str]) -> str:
    """The text of a script."""
    return "".join(f"{line}\n" for line in lines)
