"""schema: the language as JSON Schema, for editors and for checks by other programs."""

import json

import click


@click.command(name="schema")
@click.option("--resolved", is_flag=True, help="Of a spec as it resolves: strict, without extends and like.")
@click.option("--hardware", is_flag=True, help="Of a hardware file instead of a spec.")
def command(resolved: bool, hardware: bool) -> None:
    """Print the language as JSON Schema 2020-12.

    By default of a spec file as people write it, which may extend others: for editors.
    """
    from modelspec import json_schema

    if hardware:
        schema = json_schema.hardware(resolved=resolved)
    else:
        schema = json_schema.resolved() if resolved else json_schema.authoring()
    click.echo(json.dumps(schema, indent=2, ensure_ascii=False))
