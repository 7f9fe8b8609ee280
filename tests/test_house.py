"""The house: who imports whom, and where mechanisms are named. Read from the source; nothing of it is imported."""

from __future__ import annotations

import ast
import re
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


def relative_imports(trees: dict[str, ast.Module]) -> list[str]:
    """Imports that name no module, so that the other rules would not see them."""
    return [
        f"{name}:{node.lineno}"
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]


def registered(trees: dict[str, ast.Module]) -> dict[str, str]:
    """Mechanism -> the module it lives in, read from the registry's literal."""
    for node in trees[REGISTRY].body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["REGISTRY"]:
            return {name: where.split(":")[0] for name, where in ast.literal_eval(node.value).items()}
    raise AssertionError("no registry")


def names_out_of_place(trees: dict[str, ast.Module]) -> list[str]:
    """Mechanisms named by a string, or by a word of one, outside their own files, the registry and the tables.

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
            for name in homes:
                is_package = name == PACKAGE and not (writes_mechanisms and node.value == name)
                named = re.search(rf"\b{name}\b", node.value) and not is_package
                if named and module not in (REGISTRY, *TABLES, homes[name]):
                    found.append(f"{module}:{node.lineno}: {name!r} in {node.value!r}")
    return found


def mechanisms_imported(trees: dict[str, ast.Module]) -> list[str]:
    """Imports of mechanisms' files outside the tables. Another mechanism may import classes, to inherit from or to hold."""
    homes, found = set(registered(trees).values()), []
    for module, tree in trees.items():
        for node in ast.walk(tree) if module not in TABLES else ():
            for home in homes.intersection(imported(node, trees)) - {module}:
                classes = {top.name for top in trees[home].body if isinstance(top, ast.ClassDef)}
                assert isinstance(node, ast.Import | ast.ImportFrom)
                if module not in homes or not classes.issuperset(alias.name for alias in node.names):
                    found.append(f"{module}:{node.lineno}: {home}")
    return found


def test_no_two_modules_import_each_other() -> None:
    assert circles(modules()) == []


def test_no_module_of_the_package_is_imported_within_a_function() -> None:
    assert late_imports(modules()) == []


def test_no_import_is_relative() -> None:
    assert relative_imports(modules()) == []


def test_mechanisms_are_imported_by_the_registry_and_the_tables_alone() -> None:
    assert mechanisms_imported(modules()) == []


def test_mechanisms_are_named_in_their_files_and_the_registry_alone() -> None:
    assert names_out_of_place(modules()) == []


def test_nothing_below_the_report_imports_it() -> None:
    above = ("mla.report", "mla.sweep", "mla.programs", "mla.compile", "mla.__main__")
    trees = modules()
    for name, tree in trees.items():
        if not name.startswith(above):
            assert not [m for node in ast.walk(tree) for m in imported(node, trees) if m.startswith(above)], name


def test_no_part_of_a_model_and_no_data_imports_training_or_evaluation() -> None:
    above = ("mla.training", "mla.evaluation")
    trees = modules()
    for name, tree in trees.items():
        if name.startswith(("mla.data", "mla.ops", "mla.layers", "mla.attention", "mla.cache")):
            assert not [m for node in ast.walk(tree) for m in imported(node, trees) if m.startswith(above)], name


BROKEN = {  # rule -> what breaks it, and the check that sees it
    "circle": ("below.py", "import mla.above", circles),
    "late": ("below.py", "", late_imports),
    "name": ("below.py", 'if kind == "mha": pass', names_out_of_place),
    "word": ("below.py", 'HELP = f"{a} or mha, as you like"', names_out_of_place),
    "relative": ("below.py", "from . import above", relative_imports),
    "mechanism": ("below.py", "from mla.attention.heads import Mixer", mechanisms_imported),
    "sibling": ("attention/shared.py", "from mla.attention.heads import project", mechanisms_imported),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_each_rule_sees_what_breaks_it(rule: str, tmp_path: Path) -> None:
    """A small house that breaks one rule."""
    file, text, check = BROKEN[rule]
    files = {
        "attention/contract.py": 'REGISTRY = {"mha": "mla.attention.heads:C:Mixer", "mqa": "mla.attention.shared:C:Mixer"}',
        "attention/heads.py": 'NAME = "mha"\nclass Mixer: pass\ndef project(): pass',
        "attention/shared.py": "from mla.attention.heads import Mixer\nclass Shared(Mixer): pass",
        "below.py": '"""As mha does."""\nHELP = "amha mha_wide"',
        "above.py": "def f():\n    from mla import below" if rule in ("circle", "late") else "",
    }
    files[file] += f"\n{text}"
    for name, written in files.items():
        path = tmp_path / "mla" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(written)
    trees = modules(tmp_path)
    seen = {other for _, _, other in BROKEN.values() if other(trees)}
    assert seen == {check} | ({late_imports} if rule == "circle" else set())
