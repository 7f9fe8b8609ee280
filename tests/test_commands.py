"""Bad input: one line on stderr that names what is wrong, a non-zero exit status, and nothing written."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import train as program
from mla import commands
from mla.attention.contract import REGISTRY
from mla.config import Config, create
from mla.errors import UserError
from tests.programs import Outcome, status
from tests.rows import make_row

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Any:
    """run("--flag=value", ...): train.py in this process."""

    def invoke(*arguments: object) -> Outcome:
        capfd.readouterr()
        status = commands.invoke(program.main, ["train.py", *map(str, arguments)], program.CONFIG)
        return Outcome(status, *capfd.readouterr())

    return invoke


@pytest.fixture(scope="module")
def trained(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps."""
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    arguments = [f"--config={config_file}:mha", f"--workdir={workdir}", "--config.steps=2"]
    arguments += ["--config.optimizer.warmup_steps=1", "--config.checkpoint.every_steps=1"]
    assert commands.invoke(program.main, ["train.py", *arguments], program.CONFIG) == 0
    return workdir


def refused(outcome: Outcome, *words: str) -> None:
    assert outcome.status == 1
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert outcome.err.startswith("error: ") and "Traceback" not in outcome.out
    for word in words:
        assert word in outcome.err


LONG = "x" * 300

# What is wrong -> (variant, overrides, words of the line).
BAD_FIELDS = {
    "unknown field": ("mla", ["model.mechanism.kv_lora_rnk=8"], ["no such field", "model.mechanism.kv_lora_rank?"]),
    "unknown group": ("mla", ["modle.d_model=8"], ["config.modle.d_model: no such field", "did you mean config.model?"]),
    "field of another group": ("mla", ["learning_rate=1"], ["did you mean config.optimizer.learning_rate?"]),
    "field of another mechanism": ("mha", ["model.mechanism.kv_lora_rank=8"], ["no such field"]),
    "field of a field": ("mla", ["steps.more=8"], ["config.steps is a int and has no fields"]),
    "group": ("mla", ["model=8"], ["config.model: is a group of fields", "d_model"]),
    "mechanism": ("mla", ["model.mechanism=mha"], ["config.model.mechanism: is a group of fields"]),
    "text for a whole number": ("mla", ["steps=many"], ["config.steps: 'many' is no whole number"]),
    "fraction for a whole number": ("mla", ["batch_size=1.5"], ["config.batch_size: '1.5' is no whole number"]),
    "text for a number": ("mla", ["optimizer.learning_rate=fast"], ["config.optimizer.learning_rate: 'fast' is no number"]),
    "number for a truth value": ("mla", ["model.qk_norm=7"], ["config.model.qk_norm: '7' is no truth value"]),
    "numbers for a pattern": ("mla", ["model.pattern=(1,2)"], ["config.model.pattern: '(1,2)' is no"]),
    "no value": ("mla", ["steps"], ["--config.steps: write --config.steps=VALUE"]),
    "not a number": (
        "mla",
        ["optimizer.learning_rate=nan"],
        ["config.optimizer.learning_rate: nan is not a positive number"],
    ),
    "no steps": ("mla", ["steps=0"], ["config.steps: 0 is not a positive number"]),
    "warm-up without end": ("mla", ["optimizer.warmup_steps=6"], ["config.optimizer.warmup_steps: 6 leaves nothing"]),
    "unknown variant": ("mlaa", [], ["unknown mechanism 'mlaa': did you mean 'mla'?"]),
    "heads that do not divide": ("mha", ["model.num_heads=3"], ["config.model.mechanism.head_dim", "16", "3 heads"]),
    "key heads that do not divide": (
        *("gqa", ["model.mechanism.num_kv_heads=3", "model.num_heads=4"]),
        ["config.model.mechanism.num_kv_heads: 3 does not divide num_heads 4"],
    ),
    "odd RoPE dimension": ("mla", ["model.mechanism.qk_rope_head_dim=3"], ["qk_rope_head_dim: 3"]),
    "odd head dimension": ("mha", ["model.mechanism.head_dim=5"], ["config.model.mechanism.head_dim: 5 is odd"]),
    "pattern of another mechanism": (
        "mla",
        ["model.pattern=mha", "model.mechanism.kv_lora_rank=4"],
        ["config.model.mechanism.kv_lora_rank: no such field"],
    ),
    "pattern longer than the model": ("mla", ["model.pattern=mla,mla"], ["config.model.pattern: has 2 entries"]),
    "mesh too large": ("mla", ["mesh.data=16"], ["config.mesh", "does not fit 8 cpu device(s)"]),
    "mesh that leaves a rest": ("mla", ["mesh.tensor=3"], ["config.mesh", "does not fit 8 cpu device(s)"]),
    "batch that does not split": ("mla", ["batch_size=6"], ["config.batch_size: 6", "mesh.data x mesh.fsdp = 8"]),
    "accumulation that does not divide": ("mla", ["optimizer.accumulate_steps=3"], ["3 does not divide batch_size 8"]),
    "missing file": ("mla", ["data.corpus=no/such.txt"], ["no/such.txt"]),
    "missing tokenizer": ("mla", ["data.tokenizer=no/tokenizer.json"], ["no/tokenizer.json"]),
    "restart that never comes": (
        "mla",
        ["optimizer.restart.warmup_steps=2"],
        ["warmup_steps: 2 has no effect without"],
    ),
    "restart at no step": ("mla", ["optimizer.restart.at="], ["config.optimizer.restart.at: '' "]),
    "YaRN beyond all measure": (
        *("mla", ["eval.yarn.factor=1e30"]),
        ["config.eval.yarn.factor: 1e+30 has no effect in windows of 16 tokens", "such as 32\n"],
    ),
    "start with too long a name": ("mla", [f"init_from={LONG}"], [f"/{LONG}/config.json: cannot be read (File name too"]),
    "corpus with too long a name": (
        "mla",
        [f"data.corpus=/{LONG}"],
        [f"config.data.corpus: no file or folder at '/{LONG[:90]}"],
    ),
    "cache with too long a name": ("mla", [f"data.cache_dir=/{LONG}"], [f"/{LONG}", "File name too long"]),
    "tokenizer with too long a name": ("mla", [f"data.tokenizer=/{LONG}"], ["config.data.tokenizer", "File name too long"]),
    "nothing to start from": ("mla", ["init_from=no/such/run"], ["no/such/run: holds no training run"]),
}


@pytest.mark.parametrize("case", BAD_FIELDS, ids=lambda case: case.replace(" ", "_"))
def test_bad_fields(case: str, run: Any, config_file: Path, tmp_path: Path) -> None:
    variant, overrides, words = BAD_FIELDS[case]
    workdir = tmp_path / "run"
    refused(run(f"--config={config_file}:{variant}", f"--workdir={workdir}", *(f"--config.{o}" for o in overrides)), *words)
    assert not workdir.exists()


def test_wandb_that_is_not_installed(run: Any, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    refused(run(f"--config={config_file}", f"--workdir={tmp_path / 'run'}", "--config.log.wandb=true"), "config.log.wandb")
    assert not (tmp_path / "run").exists()


def test_bad_flags(run: Any, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config, workdir = f"--config={config_file}", f"--workdir={tmp_path / 'run'}"
    refused(run(config), "--workdir is missing")
    refused(run(workdir), "--config is missing", "FILE[:VARIANT]")
    refused(run(config, workdir, "--wrkdir=x"), "--wrkdir: no such flag; did you mean --workdir?")
    refused(run(config, workdir, "--steps=3"), "--steps: no such flag; did you mean --config.steps?")
    refused(run(config, workdir, "extra"), "unexpected argument 'extra'")
    refused(run("--config=configs/quik.py", workdir), "configs/quik.py: no such file; did you mean 'configs/quick.py'?")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config(variant='mla'):\n    return 1 / 0\n", [":2: ZeroDivisionError: division by zero"]),
        ("\n\nimport nothing_of_this_name\n", [":3: ModuleNotFoundError"]),
        ("def get_config(\n", [":1: SyntaxError"]),
        ("x = 1\n", ["defines no get_config()"]),
        ("def get_config():\n    return {'steps': 3}\n", ["returned dict, not mla.config.Config"]),
        ("import mla.config\ndef get_config():\n    return mla.config.create('mla', stps=3)\n", ["config.stps", "'steps'"]),
    ],
)
def test_config_files_that_fail(text: str, words: list[str], run: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(text)
    refused(run(f"--config={path}", f"--workdir={tmp_path / 'run'}"), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty"]),
        (b"too short", ["config.context"]),
        (b"\xff\xfe caf\xe9" * 100, ["UTF-8"]),
    ],
    ids=["empty", "short", "undecodable"],
)
def test_bad_corpus(content: bytes, words: list[str], run: Any, config_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(content)
    outcome = run(f"--config={config_file}", f"--workdir={tmp_path / 'run'}", f"--config.data.corpus={path}")
    refused(outcome, *words)
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------------- folders


TWO_STEPS = ("--config.steps=2", "--config.optimizer.warmup_steps=1", "--config.checkpoint.every_steps=1")


def test_a_workdir_of_another_config(run: Any, config_file: Path, trained: Path, snapshot: Any) -> None:
    before = snapshot(trained)
    arguments = (f"--config={config_file}:mha", f"--workdir={trained}", *TWO_STEPS)
    other = run(*arguments, "--config.optimizer.learning_rate=0.5")
    refused(other, str(trained), "config.optimizer.learning_rate is 0.003 there and 0.5 here")
    refused(run(f"--config={config_file}:mla", *arguments[1:]), 'config.name is "mha" there and "mla" here')
    free = run(*arguments, "--config.log.every_steps=9", "--config.data.cache_dir=" + os.environ["MLA_DATA_DIR"])
    assert free.status == 0 and "finished" in free.out
    assert snapshot(trained) == before


def test_workdirs_that_are_no_run(run: Any, config_file: Path, tmp_path: Path, snapshot: Any) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "metrics.jsonl").write_text("precious\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"name": "ml')
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    (tmp_path / "link").symlink_to("nowhere")
    for name, words in (
        ("folder", ["config.json: cannot be read (Is a directory)"]),
        ("link", ["link: leads nowhere"]),
        (LONG, [f"{LONG}: File name too long; choose another --workdir"]),
        (f"new/{LONG}/run", ["File name too long; choose another --workdir"]),
        ("long/" * 1000, ["File name too long; choose another --workdir"]),
        ("/proc/nothing/run", ["/proc/nothing/run: cannot be made ("]),
        ("thesis", ["holds 'metrics.jsonl' but no config.json"]),
        ("broken", ["config.json: is damaged"]),
        ("file", ["is a file"]),
        ("file/below", ["file"]),
    ):
        before = snapshot(tmp_path)
        refused(run(f"--config={config_file}", f"--workdir={tmp_path / name}"), *words)
        assert snapshot(tmp_path) == before


def test_changed_and_deleted_corpus(
    run: Any, config_file: Path, corpus: Path, tmp_path: Path, snapshot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path is kept from the root; tokens that are prepared serve while the corpus is away, and no others."""
    from mla.evaluation.evaluate import _data
    from mla.workdir import read_config

    mine, workdir = Path(shutil.copytree(corpus, tmp_path / "corpus")), tmp_path / "run"
    arguments = [f"--config={config_file}:mha", f"--workdir={workdir}", *TWO_STEPS]
    monkeypatch.chdir(tmp_path)
    assert run(*arguments, "--config.data.corpus=corpus").status == 0
    config = read_config(workdir)
    assert config.data.corpus == str(mine)
    monkeypatch.chdir("/")
    arguments = [*arguments, f"--config.data.corpus={mine}"]

    mine.rename(tmp_path / "away")
    outcome = run(*arguments)
    assert outcome.status == 0 and "finished" in outcome.out
    sha256 = json.loads((workdir / "environment.json").read_text())["corpus_sha256"]
    assert _data(workdir, config).sha256 == sha256
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, corpus=str(tmp_path / "nowhere.txt")))
    with pytest.raises(UserError, match=f"no file or folder at '{tmp_path}/nowhere.txt'"):
        _data(workdir, other)

    (tmp_path / "away").rename(mine)
    (mine / "0.txt").write_text("something else entirely\n")
    before = snapshot(workdir)
    refused(run(*arguments), "config.data.corpus has changed since this run began")
    assert snapshot(workdir) == before


# ---------------------------------------------------------------------------------------------------- paths and prompts


@pytest.fixture
def evaluate(capfd: pytest.CaptureFixture[str]) -> Any:
    """evaluate("--flag=value", ...): eval.py in this process."""
    found = importlib.import_module("eval")

    def invoke(*arguments: object) -> Outcome:
        capfd.readouterr()
        status = commands.invoke(found.main, ["eval.py", *map(str, arguments)], found.CONFIG)
        return Outcome(status, *capfd.readouterr())

    return invoke


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$HOME, and the folder in which commands run is another one."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_home_folder_is_meant_by_a_tilde_in_every_flag(
    run: Any, evaluate: Any, home: Path, config_file: Path, trained: Path
) -> None:
    shutil.copy(config_file, home / "tiny.py")
    shutil.copytree(trained, home / "run")
    outcome = run("--config=~/tiny.py:mha", "--workdir=~/run", *TWO_STEPS)
    assert outcome.status == 0 and "finished" in outcome.out, outcome.err
    started = run("--config=~/tiny.py:mha", "--workdir=~/run", *TWO_STEPS, "--config.init_from=~/start")
    refused(started, f'config.init_from is "" there and "{home}/start" here')
    (home / "prompt.txt").write_bytes("the\r\ncache é\n".encode())
    outcome = evaluate("--workdir=~/run", "--prompt_file=~/prompt.txt", "--sample_tokens=3", "--temperature=0")
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith("the\r\ncache é\n") and len(outcome.out) <= len("the\r\ncache é\n") + 4
    refused(evaluate("--workdir=~/run", "--out=~/no/such/folder.json"), f"no folder {home}/no/such")
    refused(evaluate("--workdir=~/nothing"), f"{home}/nothing: holds no training run")
    assert not list(Path().iterdir())  # no folder is called ~


def test_sweeps_know_the_home_folder_too(
    home: Path, config_file: Path, trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from mla.sweep import tasks as sweep

    shutil.copytree(trained, home / "start")
    runs = "[('a', '~/tiny.py:mha', {'config.init_from': '~/start'}), ('b', '', {}, '', '~/start')]"
    (home / "runs.py").write_text(f"def get_runs(variant=''):\n    return {runs}\n")
    shutil.copy(config_file, home / "tiny.py")
    first, second = sweep.tasks("~/runs.py", home)
    assert not first.refusal and first.config is not None and first.config.init_from == str(home / "start")
    assert not second.refusal and second.trained == str(home / "start")
    assert status("report", "~/no/results.jsonl") == 1
    assert f"{home}/no/results.jsonl" in capfd.readouterr().err


@pytest.mark.parametrize(
    "flag", ["--workdir=~/x", "--config=~/x.py", "--config.init_from=~/x", "--workdir=~nobody_at_all/x"]
)
def test_no_home_folder_is_one_line(flag: str, run: Any, home: Path, config_file: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", "")
    others = [f"--config={config_file}", f"--workdir={home}/run"]
    outcome = run(*(other for other in others if other.partition("=")[0] != flag.partition("=")[0]), flag)
    refused(outcome, flag.partition("=")[0].lstrip("-"), flag.partition("=")[2], "write the path in full")
    assert not (home / "run").exists() and not list(Path().iterdir())


def test_prompts(evaluate: Any, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workdir, few = f"--workdir={trained}", "--sample_tokens=4"
    one = evaluate(workdir, few, "--prompt=the cache", "--seed=7", "--top_k=5", "--top_p=0.9")
    assert one.status == 0 and one.out.startswith("the cache") and "sample" not in one.out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the cache"), encoding="ascii"))
    three = evaluate(workdir, few, "--prompt_file=-", "--seed=7", "--top_k=5", "--top_p=0.9", "--num_samples=3")
    assert three.status == 0
    assert three.out.startswith(f"----- sample 1 of 3\n{one.out}----- sample 2 of 3\nthe cache")

    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    bad, none = f"--prompt_file={tmp_path}/bad.txt", f"--prompt_file={tmp_path}/none.txt"
    refused(evaluate(workdir, bad), "--prompt_file=", "bad.txt: is not UTF-8 text (byte 3)")
    refused(evaluate(workdir, none), "none.txt: cannot be read (No such file or directory)")
    refused(evaluate(workdir, f"--prompt_file={tmp_path}"), "cannot be read (Is a directory)")
    refused(evaluate(workdir, bad, "--prompt=x"), "--prompt_file is given beside --prompt")
    refused(evaluate(workdir, "--prompt=x\udcff"), "--prompt: is not UTF-8 text")
    refused(evaluate(workdir, "--prompt=x", f"--out={tmp_path}/x.json"), "leave out --as_mechanism and --out")
    refused(evaluate(workdir, "--top_k=3"), "--top_k has no effect without --prompt or --prompt_file")
    refused(
        evaluate(workdir, "--prompt=x", "--sample_tokens=1000000000000"), "--sample_tokens: 1000000000000 is not a positive"
    )
    refused(evaluate(workdir, "--prompt=x", "--sample_tokens=2147483000"), "not enough memory", "lower --sample_tokens")
    large = evaluate(workdir, f"--out={tmp_path}/x.json", "--config.eval.decode_tokens=2147483000")
    refused(large, "not enough memory: the cache of", "lower config.eval.decode_batch or config.eval.decode_tokens")
    assert not large.out.count("loss") and not (tmp_path / "x.json").exists()  # before anything is evaluated
    refused(evaluate(workdir, "--prompt=x", "--seed=99999999999"), "--seed: 99999999999 is not from 0 to 4294967295")
    refused(evaluate(workdir, "--prompt=x", "--temperature=nan"), "--temperature: nan is not a number from 0 up")


def test_paths_that_cannot_be_are_one_line_in_every_program(
    run: Any, evaluate: Any, config_file: Path, trained: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("rows.jsonl").write_text(json.dumps(make_row("a", "mha", 1.0, 64)) + "\n")
    Path("sweep.py").write_text(f"def get_runs(variant=''):\n    return [('a', '', {{}}, '', {LONG!r})]\n")
    for odd in (LONG, f"new/{LONG}", "file/below", "/proc/nothing/x"):
        refused(run(f"--config={odd}", "--workdir=run"), odd, "no such file")
        refused(evaluate(f"--workdir={odd}"), odd)
        refused(evaluate(f"--workdir={trained}", f"--out={odd}"), odd)
        refused(evaluate(f"--workdir={trained}", f"--prompt_file={odd}"), odd, "cannot be read")
        capfd.readouterr()
        refused(Outcome(status("report", odd), *capfd.readouterr()), odd)
        refused(Outcome(status("report", "rows.jsonl", f"--out={odd}"), *capfd.readouterr()))
        refused(Outcome(status("sweep", "--config=sweep.py", f"--workdir={odd}"), *capfd.readouterr()))
    assert status("sweep", "--config=sweep.py", "--workdir=sweep") == 1
    assert f"error: a failed: {LONG}: holds no checkpoint" in capfd.readouterr().err
    assert sorted(p.name for p in Path().iterdir()) == ["file", "rows.jsonl", "sweep", "sweep.py"]


def test_an_evaluation_replaces_nothing_else(evaluate: Any, trained: Path, tmp_path: Path, snapshot: Any) -> None:
    run, other = (Path(shutil.copytree(trained, tmp_path / name)) for name in ("run", "other"))
    row = make_row("a", "mha", 1.0, 64)
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "schema.json").write_text('"schema"')
    for folder in (run, other):
        (folder / "eval.json").write_text(json.dumps({key: row[key] for key in row if key != "run"}))
    before = snapshot(tmp_path)
    few, kept = "--config.eval.tokens=64", "is kept for that run's evaluation by its own config; choose another name"
    refused(evaluate(f"--workdir={run}", few, f"--out={run}/eval.json"), f"--out={run}/eval.json: {kept}")
    refused(evaluate(f"--workdir={run}", f"--out={other}/eval.json"), f"--out={other}/eval.json: {kept}")
    for name in ("results.jsonl", "schema.json", "run/config.json", "run/metrics.jsonl"):
        refused(evaluate(f"--workdir={run}", f"--out={tmp_path}/{name}"), "is there and holds no evaluation")
    alone = evaluate(f"--workdir={run}", "--config.eval.decode_tokens=0", "--config.eval.decode_batch=3")
    refused(alone, "config.eval.decode_batch: has no effect while config.eval.decode_tokens is 0; leave it out")
    assert snapshot(tmp_path) == before


def test_closed_streams_lead_nowhere(
    run: Any, evaluate: Any, trained: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    refused(evaluate(f"--workdir={trained}", "--prompt_file=-"), "--prompt_file=-: the standard input is closed")
    monkeypatch.setattr(sys, "stdout", None)
    refused(run("--wrkdir=x"), "--wrkdir: no such flag")
    monkeypatch.setattr(sys, "stderr", None)
    assert run("--wrkdir=x") == Outcome(1, "", "")


def test_bytes_that_are_no_text_are_refused_in_every_flag(run: Any, config_file: Path, tmp_path: Path) -> None:
    good = [f"--config={config_file}", f"--workdir={tmp_path}/run"]
    for flag in (
        "--workdir=/tmp/\udcff",
        "--config=\udcff.py",
        "--config.name=\udce9",
        "--config.data.corpus=\udcff",
        "\udcff",
    ):
        refused(run(*good, flag), f"{flag.partition('=')[0]}: is not UTF-8 text".replace("\udcff", "?"))
    assert not (tmp_path / "run").exists()


def test_a_terminal_without_the_letters_gets_them_spelt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(commands.flags, "FLAGS", commands.flags.FlagValues())
    assert commands.invoke(lambda: print("é日\udcff"), ["program"]) == 0
    terminal.flush()
    assert terminal.buffer.getvalue() == b"\\xe9\\u65e5\\udcff\n"  # type: ignore[attr-defined]


def test_what_memory_cannot_hold_is_one_line(
    run: Any, config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [f"--config={config_file}:mha", f"--workdir={tmp_path}/run"]
    for size in (10**9, 2**31 - 4):
        refused(run(*arguments, f"--config.model.d_model={size}"), "not enough memory: the state of a model of", "d_model")
    refused(run(*arguments, "--config.context=2147483647"), "config.data.corpus: too short")
    refused(run(*arguments, "--config.batch_size=2147483640"), "config.data.corpus: too short")
    assert not (tmp_path / "run").exists()

    def beyond_xla() -> None:
        import jax.numpy as jnp

        jnp.zeros((10**6, 10**6, 10**3)).block_until_ready()

    def beyond_python() -> None:
        bytearray(2**60)

    monkeypatch.setattr(commands.flags, "FLAGS", commands.flags.FlagValues())
    for main in (beyond_xla, beyond_python):
        capfd.readouterr()
        outcome = Outcome(commands.invoke(main, ["program"]), *capfd.readouterr())
        refused(outcome, "not enough memory: ", "Lower the batch")
    with pytest.raises(RuntimeError, match="a defect"):
        commands.invoke(lambda: (_ for _ in ()).throw(RuntimeError("a defect")), ["program"])


# ------------------------------------------------------------------------------------------------- the real process


def process(*arguments: str, before: Sequence[str] = ()) -> Outcome:
    command = [*before, sys.executable, "train.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=240)
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_the_real_process_says_one_line() -> None:
    closed = ["sh", "-c", 'exec "$@" <&- >&-', "sh"]
    refused(
        process("--config=configs/quick.py:mla", "--workdir=/nowhere", "--config.stepps=3", before=closed), "config.steps?"
    )


def test_help_lists_flags_and_fields() -> None:
    outcome = process("--help")
    assert outcome.status == 0 and not outcome.err
    for word in (
        "--config: FILE[:VARIANT]",
        "--workdir: ",
        "--config.optimizer.learning_rate=0.001",
        "configs/quick.py:mla",
    ):
        assert word in outcome.out


def test_the_real_process_on_a_full_disk(config_file: Path, trained: Path, tmp_path: Path) -> None:
    """Background threads write the checkpoint: their complaints must not reach the terminal either."""
    from mla.training.checkpoint import steps_in

    workdir = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(workdir / "checkpoints" / "2")
    kept = {p: p.read_bytes() for p in (workdir / "checkpoints" / "1").rglob("*") if p.is_file()}

    arguments = (f"--config={config_file}:mha", f"--workdir={workdir}", *TWO_STEPS)
    outcome = process(*arguments, before=["sh", "-c", 'ulimit -f 8; exec "$@"', "sh"])  # blocks of 512 or 1024 bytes
    refused(outcome, "checkpoint of step 2 could not be written: File too large", "checkpoint of step 1 is intact")
    assert steps_in(workdir) == [1]
    assert {p: p.read_bytes() for p in (workdir / "checkpoints" / "1").rglob("*") if p.is_file()} == kept


# ---------------------------------------------------------------------------------------------------------- overrides


def test_overrides_are_typed_and_leave_the_original_alone() -> None:
    config: Any = create("mla", {"kv_lora_rank": 8})
    arguments = ["--config.steps=7", "--config.optimizer.learning_rate=1", "--config.model.qk_norm=true"]
    arguments += ["--config.model.mechanism.kv_lora_rank=12", "--config.model.mechanism.yarn.factor=2"]
    arguments += ["--config.steps=9", "--config.data.corpus=a=b c", "--config.model.pattern=local=mla"]
    changed: Any = commands.override(config, arguments)
    assert type(changed) is Config
    assert (changed.steps, changed.optimizer.learning_rate, changed.model.qk_norm) == (9, 1.0, True)
    assert isinstance(changed.optimizer.learning_rate, float)
    own: Any = changed.model.mechanism["local"]
    assert (own.kv_lora_rank, own.yarn.factor) == (12, 2.0)
    assert changed.data.corpus == "a=b c" and changed.model.pattern == ("local=mla",)
    assert (config.steps, config.model.mechanism["mla"].kv_lora_rank) == (200, 8)


def test_a_pattern_is_overridden_before_the_fields_of_its_mechanisms() -> None:
    arguments = ["--config.model.mechanism.kv_lora_rank=12", "--config.model.pattern=mla"]
    changed: Any = commands.override(create("mha"), arguments)
    assert changed == commands.override(create("mha"), arguments[::-1])
    assert changed.model.mechanism["mla"].kv_lora_rank == 12


def test_overrides_of_a_mixed_pattern() -> None:
    config: Any = create("sliding_window*3,mha", {"sliding_window": {"window": 4}})
    changed = commands.override(config, ["--config.model.mechanism.sliding_window.window=5"])
    assert changed.model.mechanism["sliding_window"].window == 5
    again = commands.override(config, ["--config.model.pattern=sliding_window*2,mha"])
    assert again.model.pattern == ("sliding_window", "sliding_window", "mha")
    with pytest.raises(UserError, match="is no repeat count"):
        commands.override(config, ["--config.model.pattern=mha*x"])


def test_overrides_can_be_limited_to_groups() -> None:
    config = create("mla")
    assert commands.override(config, ["--config.eval.cache.budget_tokens=3"], ("eval",)).eval.cache.budget_tokens == 3
    with pytest.raises(UserError, match=r"config\.steps: is fixed by the trained model; config\.eval\.\* can be set here"):
        commands.override(config, ["--config.steps=3"], ("eval",))


def test_config_from_workdir(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As in eval.py: the config is the workdir's, and evaluation's fields can be set."""
    workdir = commands.define_workdir("folder of a run")
    config = commands.define_config_from_workdir(workdir)
    seen = []

    def main() -> None:
        seen.append(config.value)

    argv = ["eval.py", f"--workdir={trained}"]
    assert commands.invoke(main, [*argv, "--config.eval.tokens=77"], config) == 0
    assert (seen[0].steps, seen[0].name, seen[0].eval.tokens) == (2, "mha", 77)
    capfd.readouterr()
    assert commands.invoke(main, [*argv, "--config.steps=3"], config) == 1
    assert "is fixed by the trained model" in capfd.readouterr().err
    assert commands.invoke(main, ["eval.py", f"--workdir={trained}/checkpoints"], config) == 1
    assert "holds no training run" in capfd.readouterr().err
    assert commands.invoke(main, [*argv, "--config.eval.tokens=77"]) == 1
    assert "takes no config overrides" in capfd.readouterr().err
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["quick", "small"])
@pytest.mark.parametrize(
    "variant", [*REGISTRY, "sliding_window*3,mha", "chunked*3,chunked_global", "gqa/2", "mla/2", "yoco"]
)
def test_shipped_configs_are_valid(name: str, variant: str) -> None:
    from mla.config import validate

    config = commands.load_config(f"{ROOT}/configs/{name}.py:{variant}")
    validate(config)
    assert config.name == variant
