"""JUnit's XML: a test case per spec, for servers that count passes and failures.

There is no standard, only a schema that most follow: `testsuite` with `testcase`s that hold `failure` (the spec is not
valid) or `error` (it could not be read). A case has one of them, with all findings in its text, since many readers
show no more than the first.
"""

from xml.etree import ElementTree

from modelspec.diagnostics import Diagnostic
from modelspec.diagnostics import render as as_text
from modelspec.report import Result

_KINDS = {1: "failure", 2: "error"}


def render(results: list[Result]) -> str:
    """The whole document."""
    counts = {
        "tests": len(results),
        "failures": sum(result.exit_code == 1 for result in results),
        "errors": sum(result.exit_code > 1 for result in results),
    }
    attributes = {"name": "modelspec validate", **{name: str(count) for name, count in counts.items()}}
    root = ElementTree.Element("testsuites", attributes)
    suite = ElementTree.SubElement(root, "testsuite", attributes)
    for result in results:
        case = ElementTree.SubElement(suite, "testcase", classname="modelspec.validate", name=_legal(result.spec))
        told = "\n\n".join(as_text(diagnostic, result.sources.get) for diagnostic in result.diagnostics)
        if result.exit_code:
            first = _first(result)
            kind = ElementTree.SubElement(
                case, _KINDS[min(result.exit_code, 2)], type=first.code, message=_legal(first.message)
            )
            kind.text = _legal(told)
        else:
            ElementTree.SubElement(case, "system-out").text = _legal("\n\n".join(filter(None, (told, result.summary))))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False)


def _first(result: Result) -> Diagnostic:
    """The gravest finding, of several the first."""
    return min(result.diagnostics, key=lambda each: ("error", "warning", "info").index(each.severity))


def _legal(text: str) -> str:
    """The text without characters that XML cannot hold."""
    return "".join(c if c in "\n\t" or (c.isprintable() and c not in "\ufffe\uffff") else "\ufffd" for c in text)
