"""Copied blocks equal their sources and documents name the right lines: `python tests/copies.py [--fix] [root]`.

    # Copied from grpo_gr00t.py:Task            above a function, class or assignment of a script
    `grpo_gr00t.py:123` (`rollout`)             in README.md or docs/*.md: the line where it is defined

Names may be dotted (`Gr00tActor.act`, `Args.clip`). `--fix` takes the source's text, or the right line number, over.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from pathlib import Path

COPY = re.compile(r"^( *)# Copied from (\S+\.py):(\S+)$")
REFERENCE = re.compile(r"`([\w./-]+\.py):(\d+)` \(`([\w.]+)`\)")


def names_of(node: ast.AST) -> list[str]:
    """Names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def find(tree: ast.AST, name: str) -> ast.stmt | None:
    """The statement that defines a name, which may be dotted."""
    node: ast.AST | None = tree
    for part in name.split("."):
        node = next((child for child in getattr(node, "body", []) if part in names_of(child)), None)
    return node


def span(node: ast.stmt) -> slice:
    """Lines of a statement, decorators included."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return slice(first - 1, node.end_lineno)


def check_copies(root: Path, fix: bool = False) -> list[str]:
    """What is wrong with the copied blocks, one line each; those that `fix` can repair it repairs and leaves out."""
    problems = []
    for file in sorted([*root.glob("*.py"), *root.glob("benchmarks/*.py")]):
        lines = file.read_text().split("\n")
        for i in reversed([i for i, line in enumerate(lines) if COPY.match(line)]):  # from below: lines above stay put
            indent, source, name = COPY.match(lines[i]).groups()
            where = f"{file.relative_to(root)}:{i + 1} ({source}:{name})"
            if not (root / source).is_file():
                problems.append(f"{where}: no file {source}")
                continue
            text = (root / source).read_text()
            original = find(ast.parse(text), name)
            below = [n for n in ast.walk(ast.parse("\n".join(lines))) if isinstance(n, ast.stmt) and span(n).start == i + 1]
            if original is None or not below:
                problems.append(f"{where}: no {name} in {source}" if original is None else f"{where}: nothing below it")
                continue
            here = span(max(below, key=lambda n: n.end_lineno))
            wanted = textwrap.indent(textwrap.dedent("\n".join(text.split("\n")[span(original)])), indent).split("\n")
            if lines[here] == wanted:
                continue
            if fix:
                lines[here] = wanted
                file.write_text("\n".join(lines))
            else:
                problems.append(f"{where}: differs from its source")
    return problems


def check_references(root: Path, fix: bool = False) -> list[str]:
    """What is wrong with the line numbers in documents, one line each."""
    problems = []
    for file in sorted([*root.glob("README.md"), *root.glob("docs/*.md")]):

        def checked(match: re.Match, file: Path = file) -> str:
            source, line, name = match.groups()
            path = root / source
            node = find(ast.parse(path.read_text()), name) if path.is_file() else None
            if node is None:
                problems.append(f"{file.relative_to(root)}: {match[0]}: no {name} in {source}")
            elif node.lineno != int(line):
                if fix:
                    return f"`{source}:{node.lineno}` (`{name}`)"
                problems.append(f"{file.relative_to(root)}: {match[0]}: it is at line {node.lineno}")
            return match[0]

        text = file.read_text()
        found = REFERENCE.sub(checked, text)
        if found != text:
            file.write_text(found)
    return problems


def check(root: Path, fix: bool = False) -> list[str]:
    """Copies first: repairing them moves lines."""
    if fix:  # a copy may be the source of another one
        for _ in range(3):
            check_copies(root, fix)
    return check_copies(root) + check_references(root, fix)


if __name__ == "__main__":
    rest = [a for a in sys.argv[1:] if a != "--fix"]
    found = check(Path(rest[0]) if rest else Path(__file__).resolve().parents[1], "--fix" in sys.argv)
    print("\n".join(found) or "copies and line references are right")
    sys.exit(bool(found))
