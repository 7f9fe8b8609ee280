"""README.md and docs/: tables are current, links and names lead somewhere, and every command would be accepted."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from mla import commands, config
from mla.attention.contract import REGISTRY

ROOT = Path(__file__).resolve().parent.parent
tables: Any = commands.load_module(str(ROOT / "docs/tables.py"))
PAGES = tables.pages()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)

every_page = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def spans(text: str) -> list[str]:
    """What stands in `code` outside fences."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links of a page that lead nowhere."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        place = page.parent / path if path else page
        if not place.exists() or (anchor and anchor not in anchors(read(place))):
            found.append(target)
    return found


def missing_names(text: str) -> list[str]:
    """Files, modules and config fields in `code` or in a command that are not there."""
    found = []
    code = [*spans(text), *(line for _, block in FENCE.findall(text) for line in block.splitlines())]
    for path in re.findall(
        r"(?<![\w./])((?:mla|configs|tests|docs|results|notebooks|benchmarks)/[a-z][\w./]*)", "\n".join(code)
    ):
        if not (ROOT / path).exists():
            found.append(path)
    for module in re.findall(r"python -m ([\w.]+)", "\n".join(code)):
        path = module.replace(".", "/")
        if module.startswith("mla") and not any((ROOT / file).exists() for file in (f"{path}.py", f"{path}/__main__.py")):
            found.append(module)
    for field in re.findall(r"(?<![\w-])config\.([a-z_0-9.]*[a-z_0-9])(?![\w.*]|\()", "\n".join(spans(text))):
        node: Any = config.Config()
        if field in ("py", "json") or field.startswith("model.mechanism."):
            continue
        for part in field.split("."):
            if not hasattr(node, part):
                found.append(f"config.{field}")
                break
            node = getattr(node, part)
    return found


def commands_of(text: str) -> list[list[str]]:
    """Command lines, split: lines of fences and spans that start with a program of this repository."""
    lines = [line for kind, block in FENCE.findall(text) if kind != "python" for line in block.splitlines()]
    python = r"(?:\.venv/bin/)?python (?:[\w/]+\.py\b|-m mla)"
    shown = re.compile(rf"(?:\w+=\S+ )?(?:{python}|(?:train|eval|sweep)\.py +-|(?:make|mla) +\w)")
    return [shlex.split(line, comments=True) for line in [*lines, *spans(text)] if shown.match(line)]


def flags_of(program: str) -> set[str]:
    """Names of the flags that a program of mla/programs/ defines."""
    source = read(ROOT / f"mla/programs/{program}.py")
    found = re.findall(r"(?:DEFINE_\w+|define_path)\(\s*\"(\w+)\"|define_(workdir|config)(?:_file)?\(", source)
    return {name for pair in found for name in pair if name}


def refusal(words: list[str]) -> str:
    """Why a command line would be refused before anything is run; empty: it would not."""
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", read(ROOT / "Makefile"), re.MULTILINE)
        return "" if words[1] in targets else f"no target {words[1]}"
    if words[:3] == ["python", "-m", "mla"]:
        words = words[2:]
    if words == ["mla", "--help"]:
        return ""
    if words[:2] == ["python", "-m"]:
        return ""  # `missing_names` looks for the module
    program, *arguments = words[1:] if words[0] in ("mla", "python", ".venv/bin/python") else words
    if "/" in program:
        options = [word.partition("=")[0] for word in arguments]
        source = read(ROOT / program) if (ROOT / program).exists() else ""
        return "" if source and all(f'"{option}"' in source for option in options) else f"{program} takes no {options}"
    program = program.removesuffix(".py")
    if not (ROOT / f"mla/programs/{program}.py").exists():
        return f"no program {program}"
    if arguments in ([], ["--help"]):
        return ""
    flags = [word for word in arguments if word.startswith("--") and not word.startswith("--config.")]
    given = dict(flag.removeprefix("--").partition("=")[::2] for flag in flags)  # a switch is given ""
    if unknown := given.keys() - flags_of(program):
        return f"no --{sorted(unknown)[0]}"
    overrides = [word for word in arguments if word.startswith("--config.")]
    if program == "report":
        return ""
    if program == "sweep":
        sweep = commands.load_module(given["config"].partition(":")[0])
        if "workdirs" not in read(Path(sweep.__file__)):  # such a one reads finished runs
            list(sweep.get_runs(given["config"].partition(":")[2]))
        return ""
    folder = given.get("workdir", "").rpartition("/")[2]
    base = "tasks.py:mqar+" if any(word.startswith("--config.eval.task") for word in overrides) else "quick.py:"
    spec = given.get("config") or f"configs/{base}{folder if folder in REGISTRY else 'mla'}"  # of the run in the folder
    free = commands.EVALUATION if program == "eval" else ()
    config.validate(commands.override(commands.load_config(spec), overrides, free))
    return ""


@every_page
def test_tables_are_current(page):
    assert tables.written(read(page)) == read(page), "run `make docs`"


@every_page
def test_links_and_names_lead_somewhere(page):
    text = read(page)
    assert (broken_links(page, text), missing_names(text)) == ([], [])


@every_page
def test_commands_would_be_accepted(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands_of(read(page)):
        assert not refusal(words), shlex.join(words)


@pytest.mark.parametrize("page", [page for page in PAGES if ">>> " in read(page)], ids=lambda page: page.name)
def test_examples_give_what_they_say(page, monkeypatch):
    import doctest

    monkeypatch.chdir(ROOT)
    blocks = "\n".join(block for kind, block in FENCE.findall(read(page)) if kind == "python")
    test = doctest.DocTestParser().get_doctest(blocks, {}, page.name, str(page), 0)
    assert doctest.DocTestRunner().run(test).failed == 0


def test_every_page_is_linked_from_the_readme_which_stays_short():
    readme = read(ROOT / "README.md")
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name}" not in readme] == []
    assert len(readme.splitlines()) <= 120


def results(folder: str) -> dict[str, dict[str, Any]]:
    """Name of a run -> its row of a results folder."""
    lines = read(ROOT / "results" / folder / "results.jsonl").splitlines()
    return {row["run"]: row for row in map(json.loads, lines)}


def test_quoted_figures_are_those_of_the_results():
    readme, page = read(ROOT / "README.md"), read(ROOT / "docs/cache.md")
    for run, row in results("quick").items():
        cache = row["cache"]
        sizes = (cache["bytes_per_token"], cache["constant_bytes"], cache["bytes_at"]["8192"])
        assert f"| {row['perplexity']:.3f} | {' | '.join(f'{size:,}' for size in sizes)} |" in readme, run
    tricks = ("int8", "int4", "kivi2_32", "streaming-64", "heavy_hitter-64", "int4-streaming-64")
    grid = results("cache_grid")
    for row in (grid[f"gqa-{trick}"] for trick in tricks):
        size, losses = row["cache"]["bytes_after_window"] / row["context"], row["decoded"]
        change = losses["loss"] - losses["loss_full_cache"]
        assert f"| {size:,.0f} | {change:+.4f} |" in page, row["run"]


def test_what_is_wrong_is_found():
    """The checks above can fail."""
    page = ROOT / "docs/cache.md"
    assert broken_links(page, "[a](nowhere.md) [b](#the-list) [c](mechanisms.md#the-list) [d](#a-worked-example)") == [
        "nowhere.md",
        "#the-list",
    ]
    assert missing_names("`configs/tiny.py:mla` `configs/quick.py:mla` `config.eval.splits` `config.eval.split`") == [
        "configs/tiny.py",
        "config.eval.splits",
    ]
    assert refusal(["python", "eval.py", "--workdir=runs/mla", "--sample=3"]) == "no --sample"
    with pytest.raises(commands.UserError, match="fixed by the trained model"):
        refusal(["python", "eval.py", "--workdir=runs/mla", "--config.steps=3"])
    shown = "```\nmake docs\npython eval.py --workdir=a  # said\n```\nafter `train.py --config=b`, `make`"
    assert commands_of(shown) == [["make", "docs"], ["python", "eval.py", "--workdir=a"], ["train.py", "--config=b"]]
    text = read(ROOT / "docs/mechanisms.md")
    stale = text.replace("| the baseline |", "| the best |")
    assert stale != text and tables.written(stale) == text
