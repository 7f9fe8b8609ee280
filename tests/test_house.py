"""The house: who imports whom, and where mechanisms are named. Read from the source; nothing of it is imported."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REGISTRY = "mla.attention.contract"
# Tables that may name mechanisms too: defaults of the config, layouts of patterns, conversions from one to another.
TABLES = ("mla.config", "mla.pattern", "mla.interop.convert")
PACKAGE = "mla"  # also a mechanism's name, which is looked for where mechanisms are written


def modules(root: Path = ROOT) -> dict[str, ast.Module]:
    """Module name -> syntax tree, of every file of the package."""
    trees = {}
    for path in sorted((root / "mla").rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def imported(node: ast.AST, known: dict[str, ast.Module]) -> Iterator[str]:
    """Modules of the package that one import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in known)
    elif isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            if inner in known or node.module in known:
                yield inner if inner in known else node.module


def circles(trees: dict[str, ast.Module]) -> list[tuple[str, str]]:
    """Pairs of modules that import each other, at any depth and wherever in the file."""
    reached: dict[str, set[str]] = {
        name: {m for node in ast.walk(tree) for m in imported(node, trees)} - {name} for name, tree in trees.items()
    }
    while True:  # until nothing is added: what is imported by what is imported
        wider = {name: direct.union(*(reached[m] for m in direct)) for name, direct in reached.items()}
        if wider == reached:
            return [(a, b) for a in trees for b in reached[a] if a < b and a in reached[b]]
        reached = wider


def late_imports(trees: dict[str, ast.Module]) -> list[str]:
    """Imports of the package's own modules within functions."""
    found = []
    for name, tree in trees.items():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                found += [f"{name}.{function.name}: {m}" for n in ast.walk(function) for m in imported(n, trees)]
    return found


def registered(trees: dict[str, ast.Module]) -> dict[str, str]:
    """Mechanism -> the module it lives in, read from the registry's literal."""
    for node in trees[REGISTRY].body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["REGISTRY"]:
            return {name: where.split(":")[0] for name, where in ast.literal_eval(node.value).items()}
    raise AssertionError("no registry")


def names_out_of_place(trees: dict[str, ast.Module]) -> list[str]:
    """Mechanisms named by a string outside their own files, the registry and the tables.

    Docstrings may speak of them, and a mechanism may look up its base class: `mechanism("gqa")` at the top of its file.
    """
    homes, found = registered(trees), []
    for module, tree in trees.items():
        writes_mechanisms = module in homes.values()
        allowed = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for top in tree.body if writes_mechanisms else ():
            for call in ast.walk(top) if isinstance(top, ast.Assign) else ():
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "mechanism":
                    allowed.update(map(id, call.args))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in allowed:
                continue
            its_place = module in (REGISTRY, *TABLES, homes.get(node.value))
            if node.value in homes and not its_place and (node.value != PACKAGE or writes_mechanisms):
                found.append(f"{module}:{node.lineno}: {node.value!r}")
    return found


def test_no_two_modules_import_each_other() -> None:
    assert circles(modules()) == []


def test_no_module_of_the_package_is_imported_within_a_function() -> None:
    assert late_imports(modules()) == []


def test_mechanisms_are_named_in_their_files_and_the_registry_alone() -> None:
    assert names_out_of_place(modules()) == []


def test_nothing_below_the_report_imports_it() -> None:
    above = ("mla.report", "mla.sweep", "mla.programs", "mla.__main__")
    trees = modules()
    for name, tree in trees.items():
        if not name.startswith(above):
            assert not [m for node in ast.walk(tree) for m in imported(node, trees) if m.startswith(above)], name


@pytest.mark.parametrize("rule", ["circle", "late", "name"])
def test_each_rule_sees_what_breaks_it(rule: str, tmp_path: Path) -> None:
    """A small house that breaks one rule."""
    files = {
        "attention/contract.py": 'REGISTRY = {"mha": "mla.attention.heads:Config:Mixer"}',
        "attention/heads.py": 'NAME = "mha"',
        "below.py": {"circle": "import mla.above", "late": "", "name": 'if kind == "mha": pass'}[rule],
        "above.py": "def f():\n    from mla import below" if rule != "name" else "",
    }
    for name, text in files.items():
        path = tmp_path / "mla" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    trees = modules(tmp_path)
    seen = {"circle": circles(trees), "late": late_imports(trees), "name": names_out_of_place(trees)}
    assert seen.pop(rule), rule
    assert rule == "circle" or not any(seen.values())
