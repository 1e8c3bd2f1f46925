"""validate: every error of every spec, each with its place, its reason and what helps."""

import click

from modelspec.cli.options import amount, diagnostics_json, output_format, overrides, size


@click.command(name="validate")
@click.argument("specs", nargs=-1, required=True, metavar="SPEC...")
@overrides
@output_format("text", "json")
@click.option("--strict", is_flag=True, help="Warnings count as errors.")
def command(specs: tuple[str, ...], overrides: tuple[str, ...], output: str, strict: bool) -> None:
    """Check specs: every error in one pass, with file, line and column.

    Exits 0 if all specs are valid, 1 if one is not, 2 if one cannot be read.
    """
    from modelspec.diagnostics import Diagnostic, SpecError, render
    from modelspec.plan import parameters
    from modelspec.resolve import resolve
    from modelspec.validate import check

    found: list[Diagnostic] = []
    code = 0
    for path in specs:
        try:
            resolved = resolve(path, overrides)
            spec, diagnostics = check(resolved)
            sources, failed = resolved.documents, 1
        except SpecError as error:
            spec, diagnostics, sources, failed = None, error.diagnostics, error.sources, error.exit_code
        wrong = [each for each in diagnostics if each.severity == "error" or (strict and each.severity == "warning")]
        found += diagnostics
        if wrong:
            code = max(code, failed)
        if output == "text":
            for diagnostic in diagnostics:
                click.echo(render(diagnostic, sources.get) + "\n", err=bool(wrong))
            if wrong or spec is None:
                click.echo(f"{path}: {len(wrong)} error{'s' * (len(wrong) != 1)}", err=True)
            else:
                counts = parameters(spec)
                click.echo(f"{path}: valid: {spec.name}, {size(counts)}, {amount(counts.active)} active for one token")
    if output == "json":
        click.echo(diagnostics_json(code == 0, found))
    raise click.exceptions.Exit(code)
