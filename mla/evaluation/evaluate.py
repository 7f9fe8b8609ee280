"""One trained model into one eval.json: quality, cache bytes, speed, and where they were measured."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mla import config as configs
from mla import model as models
from mla.attention.softmax import SoftmaxConfig
from mla.config import Config
from mla.data import TokenData, prepare, unigram_perplexity
from mla.errors import UserError
from mla.evaluation import cache_bytes, perplexity, speed
from mla.evaluation.frontier import EVAL_FILE
from mla.evaluation.sample import sample
from mla.interop import convert
from mla.model import Model
from mla.training import workdir as workdirs
from mla.training.checkpoint import Loaded, load_model
from mla.training.sharding import make_mesh, prepare_devices, require_whole_heads

SCHEMA = 1


def evaluate_model(
    config: Config, model: Model, mesh: Mesh, data: TokenData, train_tokens: int, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """The content of eval.json, for a model that was trained on `train_tokens` tokens.

    Keys (a figure that was not measured is absent):
      schema, name, mechanism, seed, context (tokens), train_tokens;
      params: {total, embedding, attention, mlp, mha_total, mismatch (relative to mha_total)};
      loss, loss_cached (nats per token, by the parallel form and through the cache), perplexity, bits_per_byte,
      eval_tokens, eval_bytes; baseline: {unigram_perplexity}; corpus: {name, sha256, tokenizer, split};
      cache: see `cache_bytes.measure`; decode: see `speed.measure`; environment; config: all fields, as in config.json.

    Raises:
      UserError: what `perplexity.measure` and `cache_bytes.measure` refuse: a cache that is not what it should be.
    """
    quality = perplexity.measure(config, model, mesh, data.split(config.eval.split))
    figures = perplexity.summary(quality, coded=config.eval.cache.codec != "none")
    say(
        f"loss {quality.loss:.4f} nats a token (through the cache {quality.loss_cached:.4f}), perplexity"
        f" {figures['perplexity']:.3f}, {quality.tokens:,} tokens of split {config.eval.split}"
    )
    cache = cache_bytes.measure(config, model, mesh)
    say(
        f"cache {cache['bytes_per_token']:,} bytes a token (formula {cache['bytes_per_token_formula']:,}), and"
        f" {cache['constant_bytes']:,} whatever the length; {cache['dtype']}"
    )
    decode = speed.measure(config, model, mesh)
    say(
        f"prefill {decode['prefill_tokens_per_second']:,.0f} and decode {decode['tokens_per_second']:,.0f} tokens a second"
        f" at batch {decode['batch']}, context {decode['context']}"
    )
    sizes = models.sizes(config, data.vocab_size)
    row = {
        "schema": SCHEMA,
        "name": config.name,
        "mechanism": configs.describe(config.model),
        "seed": config.seed,
        "context": config.context,
        "train_tokens": train_tokens,
        "params": {
            "total": sizes.total,
            "embedding": sizes.embedding,
            "attention": sizes.attention,
            "mlp": sizes.mlp,
            "mha_total": sizes.mha_total,
            "mismatch": sizes.mismatch,
        },
        **figures,
        "corpus": {
            "name": config.data.corpus,
            "sha256": data.sha256,
            "tokenizer": data.tokenizer.name,
            "split": config.eval.split,
        },
        "cache": cache,
        "decode": decode,
        "environment": workdirs.environment(),
        "config": configs.to_dict(config),
    }
    if config.eval.split == "validation":
        row["baseline"] = {"unigram_perplexity": unigram_perplexity(data)}
    return row


def _open(workdir: str | os.PathLike[str], config: Config) -> tuple[Mesh, TokenData, Loaded]:
    """Devices, data and the trained model: all that can be refused, before anything is computed."""
    prepare_devices(config.mesh)
    mesh = make_mesh(config.mesh)
    require_whole_heads(config, mesh)
    data = prepare(config.data)
    workdirs.check_corpus(Path(workdir), data.sha256)
    loaded = load_model(workdir, mesh)
    if loaded.vocab_size != data.vocab_size:
        raise UserError(
            f"{workdir}: the model has {loaded.vocab_size} tokens, config.data.tokenizer={config.data.tokenizer} has"
            f" {data.vocab_size}"
        )
    return mesh, data, loaded


def evaluate(workdir: str | os.PathLike[str], config: Config, out: str = "", as_mechanism: str = "") -> dict[str, Any]:
    """Evaluates the last checkpoint of a workdir and writes eval.json into it, or the file `out` instead.

    Args:
      workdir: of a training run.
      config: its config, with other `eval` and `mesh` fields where these were asked for.
      as_mechanism: turn the trained model into this mechanism first, see `mla.interop.convert`; written to
        eval-<mechanism>.json.

    Raises:
      UserError: no checkpoint, data that are missing or have changed, a mesh that does not fit, a broken cache.
    """
    file = _file_name(as_mechanism, config.eval.cache.codec)
    path = Path(out) if out else Path(workdir) / file
    if not path.parent.is_dir() or path.is_dir():
        raise UserError(f"--out={out}: {path} is a folder" if path.is_dir() else f"--out={out}: no folder {path.parent}")
    if as_mechanism:
        convert.check(as_mechanism)
    mesh, data, loaded = _open(workdir, config)
    main = jax.process_index() == 0
    say = print if main else lambda _: None
    say(f"{workdir}: step {loaded.step} of {config.steps}, {config.name}")
    model, conversion = loaded.model, None
    if as_mechanism:
        config, model, conversion = convert.convert(config, model, loaded.vocab_size, as_mechanism, mesh)
        say(f"as {as_mechanism}: largest condition number of a layer {max(conversion['condition_numbers']):.3g}")
    _require_streams(config)
    model.codec = config.eval.cache.codec
    row = evaluate_model(config, model, mesh, data, int(loaded.progress["tokens"]), say)
    if conversion:
        row["conversion"] = conversion
    if main:
        workdirs.write_json(path, row)
        print(f"wrote {path}")
    return row


def _file_name(as_mechanism: str, codec: str) -> str:
    """eval.json, or another name where the model is not evaluated as it was trained: its own figures stay."""
    told = [part for part in (as_mechanism, "" if codec == "none" else codec) if part]
    return "-".join(["eval", *(re.sub(r"[^\w.+]+", "_", part) for part in told)]) + ".json" if told else EVAL_FILE


def _require_streams(config: Config) -> None:
    """Refuses a codec where nothing is stored token by token."""
    spec = config.eval.cache.codec
    if spec != "none" and not any(isinstance(layer.config, SoftmaxConfig) for layer in configs.layers(config.model)):
        raise UserError(
            f"config.eval.cache.codec: {spec!r}: {configs.describe(config.model)} keeps a state and no entries of tokens;"
            " set it to none"
        )
    cache_bytes.stored(config)  # names every stream that is not there


def sample_text(workdir: str | os.PathLike[str], config: Config, prompt: str, tokens: int, temperature: float) -> str:
    """The prompt and what the last checkpoint of a workdir writes after it; see `sample`."""
    mesh, data, loaded = _open(workdir, config)
    model, tokenizer = loaded.model, data.tokenizer
    return prompt + sample(model, tokenizer, mesh, prompt, tokens=tokens, temperature=temperature, seed=config.seed)
