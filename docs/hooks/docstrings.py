r"""Docstrings as the site shows them.

They are written for `help()`. Three things in them are not Markdown: formulas as Sphinx has them,
`::` before a block of code, and the heading `Example:`, which griffe only knows in the plural.
Besides, a public name in backticks becomes a link, and the fields of a named tuple become a list.
"""

import re
from inspect import cleandoc
from textwrap import dedent

import griffe

INLINE = re.compile(r":math:`([^`]+)`")
DISPLAYED = re.compile(r"^( *)\.\. math::(.*)\n((?:\1 +\S.*\n|\n(?=\1 +\S))*)", re.MULTILINE)
VARIADIC = griffe.ParameterKind.var_positional, griffe.ParameterKind.var_keyword


class Docstrings(griffe.Extension):
    """Makes Markdown of docstrings."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """Change the docstrings of all modules, once they are read."""
        self._names = set(map(str, pkg.exports))
        self._change(pkg)

    def _change(self, thing: griffe.Object) -> None:
        for member in thing.members.values():
            if not member.is_alias:
                self._change(member)
        if thing.docstring is None:
            return
        text = as_markdown(cleandoc(thing.docstring.value), self._names, thing.path)
        if thing.is_class and "NamedTuple" in map(str, thing.bases):
            fields = {name: a for name, a in thing.attributes.items() if a.docstring is not None}
            text += "\n\nAttributes:" if fields else ""
            for name, field in fields.items():
                text += f"\n    {name}: {' '.join(field.docstring.value.split())}"
                field.docstring = None
        elif thing.is_function:
            for parameter in thing.parameters:
                if parameter.kind in VARIADIC:
                    parameter.default = None  # which griffe takes for an empty tuple
        thing.docstring.value = text


def as_markdown(text: str, names: set[str], path: str) -> str:
    """Return the docstring of what is at `path`, with formulas, headings and links for griffe."""
    text = DISPLAYED.sub(displayed, text + "\n")
    text = INLINE.sub(lambda found: f"${' '.join(found[1].split())}$", text)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)

    def linked(found: re.Match[str]) -> str:
        if found[1] not in names or found[1] in path.split("."):
            return found[0]
        return f"[{found[0]}][renyi_kd.{found[1]}]"

    return re.sub(r"(?<!`)`(\w+)`(?!`)", linked, text)


def displayed(found: re.Match[str]) -> str:
    """Return a formula that Sphinx would set on a line of its own."""
    indent, first, rest = found.groups()
    formula = " ".join((first + "\n" + dedent(rest)).split())
    if "&" in formula:
        formula = rf"\begin{{aligned}} {formula} \end{{aligned}}"
    return f"{indent}$$\n{indent}{formula}\n{indent}$$\n\n"
