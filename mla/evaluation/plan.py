"""The cache plan of an evaluation: what `eval.cache` asks for, refused here where it cannot be done to a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from mla import config as configs
from mla.cache import eviction, merged, pages
from mla.cache.evicted import Eviction
from mla.cache.plan import CachePlan
from mla.config import Config
from mla.data.tokenizers import Tokenizer
from mla.errors import UserError
from mla.evaluation import cache_bytes
from mla.model import Model


def cache_plan(
    config: Config, model: Model, tokenizer: Tokenizer, say: Callable[[str], None] = print, longest: int | None = None
) -> CachePlan:
    """What a model's caches do with entries as `config.eval.cache` says, for texts of up to `longest` tokens.

    `longest` is by default what an evaluation needs; `say` is told where the plan has no effect.

    Raises:
      UserError: what cannot be done to this model.
    """
    cache, rules = config.eval.cache, _rules(model)
    model.codecs(cache.codec)  # refuses streams that are not there
    policy = eviction.policy(cache.evict)
    if policy is not None and not model.evicting():
        otherwise = "keeps more than entries of tokens" if rules else "keeps a state and no entries of tokens"
        _refuse("evict", cache.evict, config, next(filter(None, rules), otherwise))
    evicts = None
    if policy is not None:
        longest = longest or config.evaluated_context + config.eval.decode_tokens  # arrays need not be longer
        evicts = _eviction(policy, config, model, tokenizer, say)
        evicts = dataclasses.replace(evicts, budget=min(evicts.budget, longest))
    merge = merged.merge(cache.merge)
    if merge is not None:
        _require_pairs(merge, config, model)
    read = pages.reading(cache.read)
    if read is not None:
        _require_pages(read, config, model)
    cache_bytes.stored(config, evicts)  # refuses codes that cannot be cut
    return CachePlan(cache.codec, evicts, merge, read)


def _rules(model: Model) -> list[str]:
    """Why entries cannot leave (`Clock.refusal`, `Mixer.stays`), for each store of entries in a model; "" where they can."""
    layers = (block.mixer for block, source in zip(model.blocks, model.sources, strict=True) if source is None)
    return [store.clock.refusal or mixer.stays for mixer in layers for store in mixer.entry_stores()]


def _refuse(field: str, value: str, config: Config, why: str) -> None:
    name = configs.describe(config.model)
    raise UserError(f"config.eval.cache.{field}: {value!r}: {name} {why}; set it to none")


def _eviction(
    policy: eviction.Policy, config: Config, model: Model, tokenizer: Tokenizer, say: Callable[[str], None]
) -> Eviction:
    """What is to be kept of each evicting layer's entries: the mean over layers as given, or what the bytes given hold."""
    cache, when = config.eval.cache, config.eval.cache.evict_when or policy.when
    budget = cache.budget_tokens or cache_bytes.budget_tokens(config, Eviction(policy, 1, when), cache.budget_bytes)
    if budget < policy.least():
        raise UserError(
            f"config.eval.cache.budget_bytes: {cache.budget_bytes} are {budget} entries a layer, fewer than the"
            f" {policy.least()} that {cache.evict} needs"
        )
    _require_streams(policy, config, model)
    if budget >= config.evaluated_context and policy.fills:
        held = f"{budget} entries are no fewer than the context's {config.evaluated_context}"
        say(f"config.eval.cache: {held}: nothing will leave")
    return Eviction(policy.bind(tokenizer), budget, when)


def _require_streams(policy: eviction.Policy, config: Config, model: Model) -> None:
    """Refuses a policy that merges streams which some layer does not have as they are."""
    cache = config.eval.cache
    for index in model.evicting() if policy.merges else []:
        mixer: Any = model.blocks[index].mixer
        codecs = mixer.codecs(cache.codec)
        for name in policy.merges:
            where = f"config.eval.cache.evict: {cache.evict!r}: layer {index} of {configs.describe(config.model)}"
            if name not in codecs:
                raise UserError(f"{where} has no stream {name!r} of its own to merge into; choose another policy")
            if codecs[name] is not None:
                raise UserError(f"{where} codes {name!r}, {cache.codec!r}, which is merged; leave that stream uncoded")


def _require_pairs(merge: merged.MiniCache, config: Config, model: Model) -> None:
    """Refuses layers whose entries cannot be merged two by two."""
    where, layers = f"{merged.FIELD}: {config.eval.cache.merge!r}", len(model.blocks)
    pairs = merge.pairs(layers)
    if not pairs:
        raise UserError(f"{where}: no two adjacent layers from there up, of {layers}; set start to at most {layers - 2}")
    for lower in pairs:
        shapes = []
        for index in (lower, lower + 1):
            mixer: Any = model.blocks[index].mixer
            if model.sources[index] is not None:
                raise UserError(f"{where}: layer {index} reads what layer {model.sources[index]} remembers; set it to none")
            if not mixer.evictable:
                raise UserError(f"{where}: layer {index} keeps no entry of every token; set it to none")
            shapes.append(mixer.stores()["entries"].like)
        if shapes[0] != shapes[1]:
            raise UserError(f"{where}: the entries of layers {lower} and {lower + 1} differ in shape; set it to none")


def _require_pages(read: pages.Quest, config: Config, model: Model) -> None:
    """Refuses a model without a layer whose pages could be chosen."""
    keeping = [index for index, source in enumerate(model.sources) if source is None and index >= read.start]
    if not any(model.blocks[index].mixer.pageable for index in keeping):
        why = f"has no layer from {read.start} up that keeps every token, with its key as queries meet it"
        _refuse("read", config.eval.cache.read, config, why)
