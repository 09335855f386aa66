"""Copies by rule: what a script takes over from the one it descends from has the same text.

    PARENT = "grpo_gr00t.py"                    # a script says so at its top level
    DIFFERS = {"Args", "ChunkEnv.reset"}        # and what is different in it

Every top-level function or class that the parent has, too, is the parent's text, unless its name stands in DIFFERS. With a
dotted name only that member of a class may differ, be new or be missing; all others are the parent's, while the class's
first line and docstring are free. A name in DIFFERS that does not differ is reported as well: the list stays true.
With several parents, PARENT = ("a.py", "b.py"), the text of any of them will do.

    python tests/copies.py [--fix] [script.py ...]     # the scripts in CHILDREN, or others

`--fix` takes the parent's text over; members that are new or missing, and texts of which there are two, are left to you.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHILDREN = (
    "ppo_gr00t_frozen.py",
    "ppo_gr00t_lora.py",
    "grpo_gr00t_lora.py",
    "sft_gr00t.py",
    "ppo_isaac_rgb.py",
)  # parents first
REFERENCE = re.compile(r"`([\w./-]+\.py)(:\d+)?` \(`([\w.]+)`\)")  # `file.py` (`name`), in documents
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def names_of(node: ast.AST) -> list[str]:
    """Names that a statement defines."""
    if isinstance(node, Definition):
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


def definitions(text: str) -> dict[str, slice]:
    """Lines of the top-level functions and classes, and of the members of classes under dotted names."""
    found = {}
    for node in (node for node in ast.parse(text).body if isinstance(node, Definition)):
        found[node.name] = span(node)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}": span(member) for member in node.body for name in names_of(member)}
    return found


def declared(text: str, name: str):
    """The value of a top-level literal; None where there is none."""
    node = find(ast.parse(text), name)
    return ast.literal_eval(node.value) if node else None


def check_copies(script: Path, fix: bool = False) -> list[str]:
    """What is wrong with a script's copies, one line each; those that `fix` can repair it repairs and leaves out."""
    text = script.read_text()
    named, differs = declared(text, "PARENT"), set(declared(text, "DIFFERS") or ())
    parents = named if isinstance(named, tuple) else (named,)
    if not all(parent and (script.parent / parent).is_file() for parent in parents):
        return [f"{script.name}: PARENT is {named!r}, the name of no script beside it"]
    lines, own, theirs = text.split("\n"), definitions(text), {}
    for original in ((script.parent / parent).read_text() for parent in parents):
        for name, where in definitions(original).items():
            theirs.setdefault(name, []).append(original.split("\n")[where])
    open_classes = {name.partition(".")[0] for name in differs if "." in name}

    def free(name: str) -> bool:
        return name in differs or name in open_classes or name.partition(".")[0] in differs - open_classes

    def same(name: str) -> bool:
        return name in own and lines[own[name]] in theirs.get(name, ())

    problems = []
    for name in sorted(differs):
        if name not in own and name not in theirs:
            problems.append(f"{script.name}: {name} of DIFFERS does not exist")
        elif "." not in name and (name not in own or name not in theirs):
            problems.append(f"{script.name}: {name} of DIFFERS is no copy: only one of the two scripts has it")
        elif same(name):
            problems.append(f"{script.name}: {name} of DIFFERS does not differ")
    both = [name for name in own if name in theirs and "." not in name]
    members = [name for name in [*own, *theirs] if "." in name and name.partition(".")[0] in open_classes & set(both)]
    drifted = [name for name in dict.fromkeys([*both, *members]) if not free(name) and not same(name)]
    for name in sorted(drifted, key=lambda name: own[name].start if name in own else 0, reverse=True):  # lines above stay put
        texts = theirs.get(name, ())
        if fix and name in own and texts and all(text == texts[0] for text in texts):
            lines[own[name]] = texts[0]
        else:
            whose = " and ".join(f"{parent}'s" for parent in parents)
            problems.append(f"{script.name}: {name} differs from {whose}, and does not stand in DIFFERS")
    if fix:
        script.write_text("\n".join(lines))
    return problems


def check_references(root: Path) -> list[str]:
    """What is wrong with `file.py` (`name`) in README.md and docs/, one line each."""
    problems = []
    for file in sorted([*root.glob("README.md"), *root.glob("docs/*.md")]):
        for match in REFERENCE.finditer(file.read_text()):
            source, line, name = match.groups()
            path = root / source
            if not path.is_file() or find(ast.parse(path.read_text()), name) is None:
                problems.append(f"{file.relative_to(root)}: {match[0]}: no {name} in {source}")
            elif line:
                problems.append(f"{file.relative_to(root)}: {match[0]}: line numbers go stale; leave it out")
    return problems


if __name__ == "__main__":
    named = [Path(a) for a in sys.argv[1:] if a != "--fix"] or [ROOT / name for name in CHILDREN]
    wrong = [line for script in named for line in check_copies(script, "--fix" in sys.argv)]
    print("\n".join(wrong) or "copies are true")
    sys.exit(bool(wrong))
