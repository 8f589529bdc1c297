"""For the site: docstrings are written for ``help()``, in reST; what is not Markdown as well is put into Markdown."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe

_ROOT = Path(__file__).parent.parent
_TREE = ast.parse((_ROOT / "aioresult" / "__init__.py").read_text(encoding="utf-8"))
#: The names of ``aioresult.__all__``: each has its place in docs/reference/api.md, and is linked to it.
_PUBLIC = next(
    frozenset(ast.literal_eval(node.value))
    for node in _TREE.body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
)

_LITERAL = re.compile(r"^( *)(.*?):?:\n\n((?:\1 {2,}.*\n?|\n)+)", re.M)
_TABLE = re.compile(r"^( *)=+(?: =+)+\n(?:(.*)\n\1=+(?: =+)+\n)?((?:\1[^=\n].*\n)+)\1=+(?: =+)+$", re.M)
_REFERENCE = re.compile(r"(?<![`\w\[])`([A-Za-z_.]+)`(?![`\]])")
_RAISES = re.compile(r"^( *):raises (\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.M)


def _fenced(found: re.Match[str]) -> str:
    indent, said, block = found.groups()
    first = f"{indent}{said}:\n\n" if said else ""
    lines = block.rstrip().splitlines()
    inner = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    shown = "\n".join((indent + line[inner:]).rstrip() for line in lines)
    language = "python" if re.search(r"\b(?:async|await|import|def)\b", block) else "text"
    return f"{first}{indent}```{language}\n{shown}\n{indent}```\n\n"


def _table(found: re.Match[str]) -> str:
    """A simple table of two columns; a line without a first column goes on with the row before it."""
    indent, head, body = found.groups()
    column = found[0].strip().index(" ") + 1
    rows = [[head[len(indent) :][:column], head[len(indent) :][column:]] if head else ["", ""]]
    for line in body.splitlines():
        first, rest = line[len(indent) :][:column].strip(), line[len(indent) :][column:].strip()
        if first:
            rows.append([first, rest])
        else:
            rows[-1][1] += f" {rest}"
    drawn = [f"{indent}| {first.strip()} | {rest.strip()} |" for first, rest in rows]
    return "\n".join([drawn[0], f"{indent}|---|---|", *drawn[1:]])


def _linked(found: re.Match[str]) -> str:
    name = found[1].removeprefix("aioresult.")
    return f"[`{found[1]}`][aioresult.{name}]" if name in _PUBLIC else found[0]


def markdown(text: str) -> str:
    """``text``, a docstring, with reST's literal blocks, simple tables and references in Markdown's form."""
    text = _RAISES.sub(
        lambda found: "\n".join(f"{found[1]}:raises {name}: {found[3]}" for name in found[2].split(", ")), text
    )
    text = _TABLE.sub(_table, _LITERAL.sub(_fenced, text))
    return _REFERENCE.sub(_linked, text)


class Docstrings(griffe.Extension):
    """Called by griffe for each object that it finds."""

    def on_instance(self, *, obj: griffe.Object, agent: Any, **_: Any) -> None:
        if obj.docstring is None and obj.is_attribute and (said := _comment(obj)):
            obj.docstring = griffe.Docstring(
                said, parent=obj, parser=agent.docstring_parser, parser_options=agent.docstring_options
            )
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def _comment(attribute: griffe.Object) -> str:
    """The lines above an attribute that begin with ``#:``, its docstring."""
    lines = attribute.filepath.read_text(encoding="utf-8").splitlines() if isinstance(attribute.filepath, Path) else []
    said: list[str] = []
    for line in reversed(lines[: (attribute.lineno or 1) - 1]):
        if not line.strip().startswith("#: "):
            break
        said.insert(0, line.strip().removeprefix("#: "))
    return "\n".join(said)
