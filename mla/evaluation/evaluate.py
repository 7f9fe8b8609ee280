"""One trained model into one eval.json: quality, cache bytes, speed, and where they were measured."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from jax.sharding import Mesh

from mla import config as configs
from mla import model as models
from mla import processes
from mla import workdir as workdirs
from mla.cache.plan import WHOLE, CachePlan
from mla.config import Config
from mla.data.corpora import require_apart
from mla.data.prepared import TokenData, prepare, unigram_perplexity
from mla.data.tokenizers import Tokenizer
from mla.errors import UserError
from mla.evaluation.contract import SCHEMA, Subject
from mla.evaluation.measures import REGISTRY
from mla.evaluation.plan import cache_plan
from mla.evaluation.sample import Sampling, prompt_ids, sample
from mla.interop import convert
from mla.model import Model
from mla.sharding import make_mesh, prepare_devices, require_whole_heads
from mla.training.checkpoint import Loaded, identity, load_model
from mla.workdir import EVAL_FILE

T = TypeVar("T", TokenData, Tokenizer)
# Fields that change no figure of an evaluation.
INDIFFERENT = (
    *("data.cache_dir", "eval.batch_size", "eval.tolerance"),
    *("mesh.distributed", "mesh.join_seconds", "mesh.silence_seconds"),
)
LONGEST_LABEL = 100  # characters of what a file name says about an evaluation


def evaluate_model(
    config: Config,
    model: Model,
    mesh: Mesh,
    data: TokenData,
    train_tokens: int,
    say: Callable[[str], None] = print,
    plan: CachePlan = WHOLE,
) -> dict[str, Any]:
    """The content of eval.json, for a model that was trained on `train_tokens` tokens.

    Keys (a figure that was not measured is absent):
      schema, name, mechanism, seed, context (tokens of a window), train_tokens;
      params: {total, active (those that one token is multiplied with, where they are fewer), embedding, attention, mlp,
      mha_total, mismatch (relative to mha_total)};
      baseline: {unigram_perplexity}; corpus: {name, sha256, tokenizer, split}; environment; config: all fields, as in
      config.json;
      and what each of `measures.REGISTRY` that applies to text and model has to say: see there.

    Raises:
      UserError: what a measure refuses, such as a cache that is not what it should be.
    """
    subject = Subject(config, model, mesh, data, plan)
    applying = [measure for measure in REGISTRY.values() if measure.applies(subject)]
    for measure in applying:
        measure.require(subject)
    row = _described(config, data, train_tokens)
    for measure in applying:
        if figures := measure.measure(subject):
            say(measure.said(figures, config))
            _merge(row, figures)
    return row


def _merge(row: dict[str, Any], figures: dict[str, Any]) -> None:
    """Adds keys to an object, and to the objects in it where both have them."""
    for key, value in figures.items():
        if isinstance(value, dict) and isinstance(row.get(key), dict):
            _merge(row[key], value)
        else:
            row[key] = value


def _described(config: Config, data: TokenData, train_tokens: int) -> dict[str, Any]:
    """The keys of eval.json that say what was evaluated and where; see `evaluate_model`."""
    sizes = models.sizes(config, data.vocab_size)
    row = {
        "schema": SCHEMA,
        "name": config.name,
        "mechanism": configs.describe(config.model),
        "seed": config.seed,
        "context": config.evaluated_context,
        "train_tokens": train_tokens,
        "params": {
            "total": sizes.total,
            **({"active": sizes.active} if sizes.active != sizes.total else {}),
            "embedding": sizes.embedding,
            "attention": sizes.attention,
            "mlp": sizes.mlp,
            "mha_total": sizes.mha_total,
            "mismatch": sizes.mismatch,
        },
        "corpus": {
            "name": config.data.corpus,
            "sha256": data.sha256,
            "tokenizer": data.tokenizer.name,
            "split": config.eval.split,
        },
        "environment": workdirs.environment(),
        "config": configs.to_dict(config),
    }
    if config.eval.split == "validation" and data.task is None:
        row["baseline"] = {"unigram_perplexity": unigram_perplexity(data)}
    return row


def _data(workdir: Path, config: Config) -> TokenData:
    """The tokens to evaluate on, by the run's own tokenizer.

    All of another corpus is its documents as they are: in their order, and a lone one is not cut for validation.
    """
    run = workdirs.read_config(workdir)
    require_apart(config.data.corpus, workdir, "--workdir")
    fields = ("corpus", "text_field", "validation_fraction")
    if all(getattr(config.data, field) == getattr(run.data, field) for field in fields):
        kept = workdirs.kept_tokenizer(workdir, run.data)
        data = prepare(config.data, sha256=workdirs.known_corpus(config, workdir), tokenizer=kept)
        workdirs.check_corpus(workdir, data.sha256)
        return data
    unsplit = dataclasses.replace(config.data, validation_fraction=0.0)
    return prepare(unsplit if config.eval.split == "all" else config.data, tokenizer=_tokenizer(workdir))


def _tokenizer(workdir: Path) -> Tokenizer:
    """The run's own: the copy it keeps, or in folders of earlier versions that of its prepared corpus."""
    run = workdirs.read_config(workdir)
    kept = workdirs.read_tokenizer(workdir, run.data)
    return kept or prepare(run.data, sha256=workdirs.known_corpus(run, workdir)).tokenizer


def _open(workdir: str | os.PathLike[str], config: Config, find: Callable[[], T]) -> tuple[Mesh, T, Loaded]:
    """Devices, what `find` gives and the trained model: all that can be refused, before anything is computed."""
    prepare_devices(config.mesh)
    processes.require_same(config)
    mesh = make_mesh(config.mesh)
    require_whole_heads(config, mesh)
    found = find()
    loaded = load_model(workdir, mesh, configs.for_evaluation(config))
    if loaded.vocab_size != found.vocab_size:
        raise UserError(
            f"{workdir}: the model has {loaded.vocab_size} tokens, config.data.tokenizer={config.data.tokenizer} has"
            f" {found.vocab_size}"
        )
    return mesh, found, loaded


def evaluate(workdir: str | os.PathLike[str], config: Config, out: str = "", as_mechanism: str = "") -> dict[str, Any]:
    """Evaluates the last checkpoint of a workdir and writes eval.json into it, or the file `out` instead.

    Where the config differs from the run's, the row's name and the file's, eval-<label>.json, say how: see `label`.

    Args:
      workdir: of a training run.
      config: its config, with other fields of `mla.commands.EVALUATION` where these were asked for.
      as_mechanism: turn the trained model into this mechanism first, see `mla.interop.convert`.

    Raises:
      UserError: no checkpoint, data that are missing or have changed, a mesh that does not fit, a file that cannot be
        written, a broken cache.
    """
    configs.validate(config)
    run = workdirs.read_config(workdir)
    if not config.eval.decode_tokens and config.eval.decode_batch != run.eval.decode_batch:
        raise UserError("config.eval.decode_batch: has no effect while config.eval.decode_tokens is 0; leave it out")
    told = label(run, config, as_mechanism)
    default = Path(workdir) / (f"eval-{told}.json" if told else EVAL_FILE)
    path = Path(out) if out else default
    _require_writable(path, out, default)
    if as_mechanism:
        convert.check(as_mechanism)
    mesh, data, loaded = _open(workdir, config, lambda: _data(Path(workdir), config))
    main = processes.primary()
    say = print if main else lambda _: None
    say(f"{workdir}: step {loaded.step} of {config.steps}, {config.name}")
    model, conversion = loaded.model, None
    if as_mechanism:
        config, model, conversion = convert.converted(config, model, loaded.vocab_size, as_mechanism, mesh)
        say(f"as {as_mechanism}: {convert.told(conversion)}")
    plan = cache_plan(config, model, data.tokenizer, say)
    row = evaluate_model(config, model, mesh, data, int(loaded.progress["tokens"]), say, plan)
    row["checkpoint"] = identity(workdir, loaded.step)
    if told:
        row["name"] = f"{loaded.config.name}-{told}"
    if conversion:
        row["conversion"] = conversion
    if main:
        workdirs.write_json(path, row)
        print(f"wrote {path}")
    return row


def label(run: Config, config: Config, as_mechanism: str = "") -> str:
    """How an evaluation differs from its run's own, to be part of a file name; empty where it does not.

    `as_mechanism`, then field=value of each field that differs, without the field's first group: split=all-cache.codec=int4.
    Of a path the last part is said. A hash follows where that is not all there is to say, so that no two evaluations share
    a label.
    """
    changes = [
        (field, value)
        for field, _, value in workdirs.differences(configs.to_dict(run), configs.to_dict(config))
        if field not in INDIFFERENT
    ]
    parts, whole = [as_mechanism] if as_mechanism else [], True
    for field, value in changes:
        text = value if isinstance(value, str) else json.dumps(value)
        short = re.sub(r"[^\w.+=]+", "_", text.rstrip("/").rpartition("/")[2], flags=re.ASCII)
        whole = whole and short == text
        parts.append(f"{field.partition('.')[2] or field}={short}")
    told = "-".join(parts)
    if whole and len(told) <= LONGEST_LABEL:
        return told
    digest = hashlib.sha256(json.dumps([as_mechanism, changes]).encode()).hexdigest()[:8]
    return f"{told[:LONGEST_LABEL]}-{digest}"


def _require_writable(path: Path, out: str, default: Path) -> None:
    """Refuses a file that cannot be written, or that an evaluation should not replace, before the evaluation runs.

    Args:
      path: the file.
      out: how it was asked for; '': not at all.
      default: the file that this evaluation is written to otherwise.
    """
    where = f"--out={out}" if out else str(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{where}: is a folder" if os.path.isdir(path) else f"{where}: is no file")
    if not os.path.isdir(path.parent):
        raise UserError(f"{where}: no folder {path.parent}")
    in_a_run = os.path.exists(path.parent / workdirs.CONFIG_FILE)
    if in_a_run and path.name == EVAL_FILE and os.path.realpath(path) != os.path.realpath(default):
        raise UserError(f"{where}: is kept for that run's evaluation by its own config; choose another name")
    if out and os.path.exists(path) and path.stat().st_size and workdirs.read_evaluation(path) is None:
        raise UserError(f"{where}: is there and holds no evaluation; choose another name")
    workdirs.require_writable(path, "name another file by --out")  # in every process: devices are not there yet


def sample_text(workdir: str | os.PathLike[str], config: Config, prompt: str, how: Sampling) -> list[str]:
    """Texts that the last checkpoint of a workdir writes after a prompt, drawn as `how` says. Its corpus is not needed."""
    how.check()
    mesh, tokenizer, loaded = _open(workdir, config, lambda: _tokenizer(Path(workdir)))
    model = loaded.model
    longest = len(prompt_ids(tokenizer, prompt)) + 1 + how.tokens
    plan = cache_plan(config, model, tokenizer, say=lambda line: None, longest=longest)
    return sample(model, tokenizer, mesh, prompt, how, plan)
