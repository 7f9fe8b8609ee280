"""Writes the tables of docs/*.md: of mechanisms, codecs, policies, MLPs, tasks, conversions and config files that are there.

    python docs/tables.py      or: make docs

A table stands between `<!-- table NAME -->` and `<!-- end -->`. Its rows come from the code: the first paragraph of a
class's docstring, the fields `Paper`, `Remembers`, `Elements` and `Use` in that of a mechanism's config, `Floor`, `Window`
and `Source` in that of a task, the docstring of a config file. tests/test_docs.py fails while a page is not what this
would write.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mla import config as configs  # noqa: E402
from mla.attention import contract  # noqa: E402
from mla.cache import codecs, eviction  # noqa: E402
from mla.commands import load_config  # noqa: E402
from mla.data import tasks  # noqa: E402
from mla.interop import convert  # noqa: E402
from mla.layers import mlp  # noqa: E402
from mla.registry import load  # noqa: E402

FIELDS = ("Paper", "Remembers", "Elements", "Use")  # in the docstring of a mechanism's config
TASK_FIELDS = ("Floor", "Window", "Source")  # in the docstring of a task
CHANNELS = 128  # of the vector whose coded bytes are given


def told(cls: type, names: Sequence[str]) -> dict[str, str]:
    """The lines `Name: ...` of a class's docstring, all of which must be there."""
    found = dict(re.findall(rf"^({'|'.join(names)}): (.+)", inspect.getdoc(cls) or "", re.MULTILINE))
    if missing := [name for name in names if name not in found]:
        raise SystemExit(f"{cls.__module__}.{cls.__name__}: its docstring has no line `{missing[0]}: ...`")
    return found


def paragraph(text: str | None, number: int = 0) -> str:
    """One paragraph of a docstring on one line, arXiv numbers linked, without the full stop of a single sentence."""
    line = " ".join((text or "").split("\n\n")[number].split())
    return re.sub(r"(?<![\w.])(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", line).removesuffix(".")


def link(name: str, module: str) -> str:
    """`name` in code letters, linked to the file of a module."""
    return f"[`{name}`](../{module.replace('.', '/')}.py)"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; columns whose header ends in `bytes` stand to the right."""
    rule = ["---:" if column.endswith("bytes") else "---" for column in header]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def mechanisms() -> str:
    """Every registered mechanism. Bytes: by its formula in bf16, at the sizes of configs/small.py."""

    def row(name: str) -> list[str]:
        cls, _ = contract.mechanism(name)
        said = told(cls, FIELDS)
        config = load_config(f"{ROOT / 'configs/small.py'}:{name}")
        terms = config.model.mechanism[name].cache_formula(configs.around(config))
        size, window = f"{sum(term.growth(2) for term in terms):,.0f}", max(term.window or 0 for term in terms)
        if size == "0":
            held = sum(term.bytes_at(window * term.stride, 2) for term in terms)
            size = f"0; {'at most ' * bool(window)}{held:,} in all"
        paper, remembers, elements, use = (paragraph(said[field]) for field in FIELDS)
        return [link(name, cls.__module__), paper, remembers, elements.replace("kv_lora_rank", "`kv_lora_rank`"), size, use]

    header = ("name", "paper", "remembers, a token and layer", "elements", "bytes", "when to use it")
    return table(header, map(row, contract.REGISTRY))


def codec_table() -> str:
    """Every registered codec, those of one class together; of those with two forms the name that chooses between them."""
    forms = {form for pair in codecs.BY_STREAM.values() for form in pair}
    of_class: dict[str, list[str]] = {}
    for name in [*(name for name in codecs.REGISTRY if name not in forms), *codecs.BY_STREAM]:
        registered, *_ = codecs.BY_STREAM.get(name, (name,))
        of_class.setdefault(codecs.REGISTRY[registered][0], []).append(name)

    def size(name: str) -> str:
        """Bytes that a vector takes, scales included."""
        made = codecs.codec(name)
        assert made is not None
        return str(made.unit_bytes((CHANNELS,)) // made.unit)

    def row(where: str) -> list[str]:
        module, cls = where.split(":")
        names = of_class[where]
        said = paragraph(getattr(importlib.import_module(module), cls).__doc__)
        return [", ".join(link(name, module) for name in names), ", ".join(map(size, names)), said]

    return table(("`codec`", f"{CHANNELS} channels, bytes", "stored"), map(row, of_class))


def policies() -> str:
    """Every registered eviction policy with its settings and their defaults."""

    def row(name: str) -> list[str]:
        module, cls = eviction.REGISTRY[name].split(":")
        made: Any = getattr(importlib.import_module(module), cls)
        settings = ", ".join(f"`{f.name}={_spelt(f.default)}`" for f in dataclasses.fields(made) if not f.metadata)
        return [link(name, module), paragraph(made.__doc__), made.when, settings]

    return table(("`evict`", "what stays, of `budget_tokens` a layer", "when", "settings"), map(row, eviction.REGISTRY))


def _spelt(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def mlps() -> str:
    """Every registered MLP with its fields and their defaults."""

    def row(name: str) -> list[str]:
        cls, _ = mlp.mlp(name)
        fields = ", ".join(f"`{field.name}={_spelt(field.default)}`" for field in dataclasses.fields(cls))
        return [link(name, mlp.REGISTRY[name].split(":")[0]), paragraph(cls.__doc__), fields]

    return table(("`mlp`", "what it computes", "fields"), map(row, mlp.REGISTRY))


def task_table() -> str:
    """Every registered task: what it asks, what sets its levels, its fields by default, and what the floor is with them."""

    def row(name: str) -> list[str]:
        cls = load(tasks.REGISTRY[name])[0]
        said = told(cls, TASK_FIELDS)
        shown = [field for field in dataclasses.fields(cls) if field.default != -1]  # -1: not set
        fields = ", ".join(f"`{field.name}={_spelt(field.default)}`" for field in shown)
        floor, window, source = (paragraph(said[field]) for field in TASK_FIELDS)
        asked = paragraph(inspect.getdoc(cls))
        levels = "x".join(f"`{axis}`" for axis in cls.axes)
        return [link(name, cls.__module__), asked, levels, fields, floor, f"{cls().floor_bytes():.4g}", window, source]

    header = (
        "name",
        "what is to be said",
        "level",
        "fields",
        "floor",
        "by default, bytes",
        "what a window reaches",
        "source",
    )
    return table(header, map(row, tasks.REGISTRY))


def conversions() -> str:
    """Every conversion of a trained model."""
    rows = [
        (f"`{a}`", f"`{b}`", f"`--as_mechanism={b}`", link(function.__name__, function.__module__))
        for (a, b), function in convert.CONVERSIONS.items()
    ]
    return table(("trained as", "turned into", "flag", "how"), rows)


def config_files(folder: str) -> str:
    """Every config file of a folder: the first paragraph of its docstring, and its hardware and time."""

    def row(path: Path) -> list[str]:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        time = re.search(r"(?:Hardware and time|Time(?: and [\w ]+)?): (.+?)(?=\n[A-Z]\w+[\w ]*:|\n\n|$)", text, re.DOTALL)
        where = path.relative_to(ROOT).as_posix()
        return [f"[`{where}`](../{where})", paragraph(text), paragraph(time[1]) if time else ""]

    return table(("file", "what it runs", "time"), map(row, sorted((ROOT / folder).glob("*.py"))))


TABLES: dict[str, Callable[[], str]] = {
    "mechanisms": mechanisms,
    "codecs": codec_table,
    "policies": policies,
    "mlps": mlps,
    "tasks": task_table,
    "conversions": conversions,
    "configs": lambda: config_files("configs"),
    "sweeps": lambda: config_files("configs/sweeps"),
}


def written(text: str) -> str:
    """A page with its tables as the code has them now."""
    return re.sub(
        r"(<!-- table (\w+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


def pages() -> list[Path]:
    """README.md and docs/*.md."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    for page in pages():
        before = page.read_text(encoding="utf-8")
        if (after := written(before)) != before:
            page.write_text(after, encoding="utf-8")
            print(f"written: {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
