"""What is here to train on: versions, device, memory, disk, launcher, and the files that a spec names.

Looked at once, and returned as a value that `modelspec.doctor` compares with the spec.
"""

import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from glob import iglob
from importlib import metadata
from pathlib import Path

from modelspec import schema


@dataclass(frozen=True, slots=True)
class Device:
    """What computes: `capability` is CUDA's, None for a CPU; `memory` in bytes; `error` says why it is not there."""

    name: str
    count: int
    memory: int
    capability: tuple[int, int] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Environment:
    """What is here. `packages` maps each package that modelspec requires to its version, None where it is missing.

    `files` maps each path or glob that the spec names to how many files it finds, `vocabularies` a tokenizer file to
    its size, or to what is wrong with it. `world` is the number of processes that a launcher started, None without one.
    `untrained` holds what this version does not train yet of the spec, `uncomputable` what has no kernel, so that
    it cannot even be built: path, message and help.
    """

    python: tuple[int, int]
    packages: Mapping[str, str | None]
    least: Mapping[str, str]
    device: Device
    compiler: bool
    folder: str
    free: int
    world: str | None = None
    files: Mapping[str, int] = field(default_factory=dict)
    vocabularies: Mapping[str, int | str] = field(default_factory=dict)
    untrained: tuple[tuple[str, str, str], ...] = ()
    uncomputable: tuple[tuple[str, str, str], ...] = ()


def environment(spec: schema.ModelSpec, device: str | None, folder: Path) -> Environment:
    """What is here now, of all that matters to a spec; `folder` is where runs will be written."""
    required = _required()
    packages = {name: _version(name) for name in required}
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.isdir(path))
    tokenizer = spec.data.tokenizer if spec.data else None
    sources = spec.data.sources or () if spec.data else ()
    globs = [source.files for source in sources if not isinstance(source, schema.PythonStdlib)]
    return Environment(
        python=sys.version_info[:2],
        packages=packages,
        least=required,
        device=_seen_device(device) if packages["torch"] else Device(device or "cpu", 0, 0, error="torch is missing"),
        compiler=any(map(shutil.which, ("c++", "g++", "clang++", os.environ.get("CXX", "g++")))),
        folder=str(folder),
        free=shutil.disk_usage(existing).free,
        world=os.environ.get("WORLD_SIZE"),
        files={each: sum(1 for _ in iglob(each, recursive=True)) for each in globs},
        vocabularies={tokenizer.path: _vocabulary(tokenizer.path)}
        if isinstance(tokenizer, schema.TokenizerFile)
        else {},
        untrained=_untrained(spec) if packages["torch"] else (),
        uncomputable=_uncomputable(spec) if packages["torch"] else (),
    )


def _untrained(spec: schema.ModelSpec) -> tuple[tuple[str, str, str], ...]:
    from modelspec.builders.requirements import unsupported

    # The compiler has a line of its own, and so has what cannot be built.
    told = {"parallelism.compile", *(path for path, _, _ in _uncomputable(spec))}
    return tuple((each.path, each.message, each.help) for each in unsupported(spec) if each.path not in told)


def _uncomputable(spec: schema.ModelSpec) -> tuple[tuple[str, str, str], ...]:
    from modelspec.builders.fp8 import uncomputable

    return tuple(uncomputable(spec))


def _required() -> dict[str, str]:
    """Each package that modelspec needs on this platform, with the least version."""
    found = {}
    for requirement in metadata.requires("modelspec") or ():
        name, _, marker = requirement.partition(";")
        matched = re.match(r"([\w.-]+)\s*>=\s*([\d.]+)", name)
        if matched and "extra" not in marker and ("linux" not in marker or sys.platform == "linux"):
            found[matched[1]] = matched[2]
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _seen_device(name: str | None) -> Device:
    import torch

    wanted = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return Device(wanted, 0, 0, error=re.split(r"\.\s|\n", str(error))[0] or "not available")
    if device.type == "meta":
        return Device(wanted, 0, 0, error="it holds shapes and no values, so nothing can be trained on it")
    # Torch takes any index here and computes on the only CPU.
    if device.type == "cpu" and device.index:
        return Device(wanted, 0, 0, error="the processor is one device, cpu, however many cores it has")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = (properties.major, properties.minor)
        return Device(properties.name, torch.cuda.device_count(), properties.total_memory, capability)
    return Device(platform.processor() or platform.machine(), 1, usable_memory())


def usable_memory() -> int:
    """The memory of the machine in bytes, or less where the process is held in a group with a limit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return min(memory, int(Path(file).read_text()))
        except (OSError, ValueError):
            continue
    return memory


def _vocabulary(path: str) -> int | str:
    from modelspec.builders import tokenizer
    from modelspec.builders.errors import Misuse

    try:
        return tokenizer.size(tokenizer.read(Path(path)))
    except Misuse as error:
        return str(error)
