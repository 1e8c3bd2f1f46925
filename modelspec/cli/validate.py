"""validate: every error of every spec, each with its place, its reason and what helps."""

import glob
import os
from typing import TYPE_CHECKING

import click

from modelspec.amount import amount
from modelspec.cli.git import since as changes_since
from modelspec.cli.options import allow_outside, diagnostics_json, output_format, overrides, size

if TYPE_CHECKING:
    from modelspec.diagnostics import Diagnostic, SpecError
    from modelspec.fix import Fixed
    from modelspec.policy import Policy
    from modelspec.report import Result
    from modelspec.resolve import Resolved
    from modelspec.schema import ModelSpec

# A glob that matches more is a mistake, such as one that starts at the root of a disk.
MAX_SPECS = 10_000


@click.command(name="validate")
@click.argument("specs", nargs=-1, required=True, metavar="SPEC...")
@overrides
@output_format("text", "json", "github", "sarif", "junit")
@click.option("--strict", is_flag=True, help="Warnings count as errors.")
@click.option("--policy", "policy_file", metavar="FILE", help="Rules as JSON Schema over the resolved spec.")
@click.option("--changed-since", "since", metavar="REF", help="Only specs that changed, or what they extend.")
@click.option("--fix", is_flag=True, help="First correct misspelt keys and words that can mean one thing only.")
@allow_outside
def command(
    specs: tuple[str, ...],
    overrides: tuple[str, ...],
    output: str,
    strict: bool,
    policy_file: str | None,
    since: str | None,
    fix: bool,
    allow_outside: bool,
) -> None:
    """Check specs: every error in one pass, with file, line and column.

    SPEC is a file, modelspec:NAME or a glob in quotes, such as 'specs/**/*.yaml'. Exits 0 if all specs are valid, 1 if
    one is not, 2 if one cannot be read.
    """
    from modelspec.diagnostics import SpecError
    from modelspec.report import Result

    names = _expanded(specs)
    try:
        policy = _policy(policy_file, allow_outside)
    except SpecError as error:
        results = [Result.unreadable(policy_file or "", error)]
    else:
        check = _Check(overrides, strict, policy, allow_outside)
        results = [check.result(name) for name in names]
        if since is not None:
            results = _changed(results, since)
        if fix:
            edits = [edit for result in results for edit in _corrected(result, allow_outside)]
            for edit in edits:
                click.echo(f"{edit.place}: fixed: {edit.old!r} is now {edit.new!r}", err=output != "text")
            if edits:
                # All of them: a spec may extend one that was corrected.
                results = [check.result(result.spec) for result in results]
    code = max((result.exit_code for result in results), default=0)
    match output:
        case "text":
            _print(results)
            if not results:
                click.echo(f"no spec changed since {since}")
        case "json":
            click.echo(diagnostics_json(code == 0, [each for result in results for each in result.diagnostics]))
        case "github":
            from modelspec.report import github

            click.echo(github.render(results))
        case "junit":
            from modelspec.report import junit

            click.echo(junit.render(results))
        case "sarif":
            from importlib.metadata import version

            from modelspec.report import sarif

            click.echo(sarif.render(results, version("modelspec")))
    raise click.exceptions.Exit(code)


def _policy(file: str | None, allow_outside: bool) -> "Policy | None":
    if file is None:
        return None
    from modelspec.policy import read_policy

    return read_policy(file, allow_outside=allow_outside)


class _Check:
    """How every spec of one call is checked."""

    def __init__(self, overrides: tuple[str, ...], strict: bool, policy: "Policy | None", allow_outside: bool) -> None:
        self.overrides = overrides
        self.policy = policy
        self.allow_outside = allow_outside
        self.wrong = ("error", "warning") if strict else ("error",)
        # Why the policy could not be applied: once it has run for too long it is not run again.
        self.unusable: SpecError | None = None

    def result(self, name: str) -> "Result":
        from modelspec.diagnostics import SpecError
        from modelspec.plan import parameters
        from modelspec.report import Result, errors
        from modelspec.resolve import resolve
        from modelspec.validate import check, in_order

        try:
            resolved = resolve(name, self.overrides, allow_outside=self.allow_outside)
            sources = resolved.documents | ({self.policy.file: self.policy.text} if self.policy else {})
            spec, diagnostics = check(resolved)
            if spec is not None and self.policy is not None:
                diagnostics = in_order((*diagnostics, *self.violations(self.policy, spec, resolved)), resolved)
        except SpecError as error:
            return Result.unreadable(name, error)
        if spec is None or any(each.severity in self.wrong for each in diagnostics):
            number = sum(each.severity in self.wrong for each in diagnostics)
            return Result(name, diagnostics, 1, errors(number), sources)
        counts = parameters(spec)
        told = f"valid: {spec.name}, {size(counts)}, {amount(counts.active)} active for one token"
        return Result(name, diagnostics, 0, told, sources)

    def violations(self, policy: "Policy", spec: "ModelSpec", resolved: "Resolved") -> "list[Diagnostic]":
        from modelspec.diagnostics import SpecError
        from modelspec.policy import violations

        if self.unusable is None:
            try:
                return violations(policy, spec, resolved)
            except SpecError as error:
                self.unusable = error
        raise self.unusable


def _expanded(specs: tuple[str, ...]) -> list[str]:
    """The names with globs written out, each once. Raises UsageError for a glob that matches nothing."""
    names: dict[str, None] = {}
    for spec in specs:
        if not glob.has_magic(spec) or os.path.lexists(spec):
            names[spec] = None
            continue
        matches = sorted(match for match in glob.iglob(spec, recursive=True) if not os.path.isdir(match))
        if not matches:
            raise click.UsageError(f"{spec} matches no file")
        if len(names) + len(matches) > MAX_SPECS:
            raise click.UsageError(f"{spec} matches more than {MAX_SPECS:,} files")
        names |= dict.fromkeys(matches)
    return list(names)


def _changed(results: "list[Result]", since: str) -> "list[Result]":
    """The results of specs that changed, by any file that they were judged by; those that cannot be read all stay."""
    from modelspec.document import SET
    from modelspec.resolve import ships

    changes = changes_since(since, os.curdir)

    def is_changed(file: str) -> bool:
        # What ships comes with a version, not with a commit.
        return changes.is_known_to_be_changed(file) if ships(file) else changes.is_changed(file)

    return [result for result in results if not result.whole or any(map(is_changed, result.sources.keys() - {SET}))]


def _corrected(result: "Result", allow_outside: bool) -> "tuple[Fixed, ...]":
    from modelspec.fix import fix_file

    mine = any(each.fix and each.place.file == result.spec for each in result.diagnostics)
    return fix_file(result.spec, allow_outside=allow_outside) if mine else ()


def _print(results: "list[Result]") -> None:
    """What was found, as text for people: on stderr what is wrong, on stdout the rest."""
    from modelspec.diagnostics import render

    for result in results:
        for diagnostic in result.diagnostics:
            click.echo(render(diagnostic, result.sources.get) + "\n", err=bool(result.exit_code))
        name = result.spec or "''"
        click.echo(f"{name}: {result.summary}", err=bool(result.exit_code))
