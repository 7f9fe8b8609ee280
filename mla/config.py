"""The typed config tree: every field, its default and its unit, in one place.

Config files in `configs/` return a `Config`; the command line overrides any field (`--config.model.d_model=256`). The
mechanism's own fields are the dataclass beside its module in `mla/attention/`, reached as `config.model.mechanism`.
Zero stands for "derived" or "off" where a comment says so: overrides are typed, and None has no spelling on a command line.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
import typing
from collections.abc import Callable, Iterator
from typing import Any

from mla import paths
from mla.attention.contract import MechanismConfig, Surroundings, mechanism
from mla.attention.softmax.base import SoftmaxConfig
from mla.cache import codecs, eviction, merged
from mla.data import corpora
from mla.errors import UserError, nearest
from mla.pattern import MOST_LAYERS, expand, labels, parse, parse_pattern, sources

SEEDS = 2**32  # how many there are: random numbers start from 32 bits
MOST_HOST_DEVICES = 4096  # that one process can show in reasonable time
TINIEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # fp32's normal numbers


def need(condition: object, field: str, message: str) -> None:
    """Refuses a config whose `field`, a path such as `model.d_model`, does not meet a condition."""
    if not condition:
        raise UserError(f"config.{field}: {message}")


def _need_positive(group: Any, prefix: str, *fields: str) -> None:
    for field in fields:
        number = getattr(group, field)
        need(0 < number < math.inf, prefix + field, f"{number} is not a positive number")


def _need_from_zero(group: Any, prefix: str, *fields: str) -> None:
    for field in fields:
        number = getattr(group, field)
        need(0 <= number < math.inf, prefix + field, f"{number} is not a number from 0 up")


def _need_one_of(group: Any, prefix: str, field: str, known: typing.Sequence[str]) -> None:
    word = getattr(group, field)
    need(word in known, prefix + field, f"{word!r}: {nearest(word, known)}")


@dataclasses.dataclass
class DataConfig:
    """What text, and in which tokens."""

    corpus: str = "stdlib"  # stdlib (this Python's sources) | recall[:PAIRS] | a path, folder or glob | a hub name[:subset]
    tokenizer: str = "bytes"  # bytes | bpe:8192 (trained on the corpus) | a path to a tokenizer.json
    end_token: str = ""  # of a tokenizer.json; empty: as the files beside it declare, or a name in common use
    text_field: str = "text"  # column that holds the text (jsonl, csv, tsv, parquet, hub)
    validation_fraction: float = 0.02  # of the corpus' bytes, by whole documents, unless the corpus has its own split
    cache_dir: str = ""  # where prepared corpora are kept; empty: $MLA_DATA_DIR or ~/.cache/mla

    def check(self) -> None:
        fraction = self.validation_fraction
        need(0 < fraction < 1, "data.validation_fraction", f"{fraction} is not between 0 and 1")


@dataclasses.dataclass
class ModelConfig:
    """A pre-norm decoder. Models of one comparison differ in `pattern` and `mechanism` only."""

    d_model: int = 128  # width of the residual stream
    num_layers: int = 4
    num_heads: int = 4  # query heads; a mechanism may set its own
    # One entry a layer, repeated until num_layers: a mechanism's name, label=name to configure it apart, name@-1 to read
    # what the layer below remembers; or a layout of all layers (yoco). See mla/pattern.py.
    pattern: tuple[str, ...] = ("mla",)
    # The mechanism's own config; with several labels in the pattern, one field a label: config.model.mechanism.mha.head_dim.
    mechanism: Any = None
    mlp_width: int = 0  # SwiGLU width of the MHA model all others are matched to; 0: 8/3 d_model
    match_parameters: bool = True  # solve this model's MLP width so that its total equals that MHA model's
    mlp_multiple: int = 8  # the solved width is a multiple of this
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qk_norm: bool = False  # RMSNorm on each head's q and k, where the mechanism allows it
    residual_init: str = "depth"  # projections into the residual stream start: depth (1 / sqrt(2 layers)) | zero
    tie_embeddings: bool = True
    dtype: str = "float32"  # compute: float32 | bfloat16; master weights are float32 either way
    remat: str = "none"  # recomputed in the backward pass: none | block | all_but_matmuls
    attention_backend: str = "auto"  # auto | reference | blocked | cudnn (not yet run on a GPU); see mla/ops/attention.py

    def check(self) -> None:
        """What can be refused without knowing the mechanisms."""
        _need_positive(self, "model.", "d_model", "num_layers", "num_heads", "mlp_multiple", "rope_theta", "norm_eps")
        layers = self.num_layers
        need(layers <= MOST_LAYERS, "model.num_layers", f"{layers} is more than {MOST_LAYERS}, which are built one by one")
        need(len(self.pattern) >= 1, "model.pattern", "is empty; name a mechanism for at least one layer")
        repeated = f"has {len(self.pattern)} entries for model.num_layers={layers}; a pattern is repeated, never cut"
        need(len(self.pattern) <= layers, "model.pattern", repeated)
        dtype = self.dtype
        need(dtype in ("float32", "bfloat16"), "model.dtype", f"{dtype!r} is neither float32 nor bfloat16")
        _need_one_of(self, "model.", "residual_init", ("depth", "zero"))
        _need_one_of(self, "model.", "remat", ("none", "block", "all_but_matmuls"))
        _need_one_of(self, "model.", "attention_backend", ("auto", "reference", "blocked", "cudnn"))
        need(self.mlp_width >= 0, "model.mlp_width", f"{self.mlp_width} is negative; 0 means 8/3 of d_model")


@dataclasses.dataclass
class RestartConfig:
    """Warm restarts of the learning rate: how a run goes on beyond the steps it was planned for, from its full state."""

    at: tuple[int, ...] = ()  # steps after which they come; train.py adds one where `steps` of a run is raised
    peak_fraction: float = 1.0  # of learning_rate: where the rate rises to again
    warmup_steps: int = 0  # of that rise, from the rate that was reached; 0: optimizer.warmup_steps

    def check(self) -> None:
        rising = all(type(step) is int for step in self.at) and list(self.at) == sorted({0, *self.at} - {0})
        said = f"{','.join(map(str, self.at)) or repr('')} are no steps from 1 up, each after the one before"
        need(rising and min(self.at, default=1) > 0, "optimizer.restart.at", said)
        _need_positive(self, "optimizer.restart.", "peak_fraction")
        _need_from_zero(self, "optimizer.restart.", "warmup_steps")

    def require_effect(self) -> None:
        """Refuses what changes nothing in a run that does not restart. Raises UserError."""
        for field in ("peak_fraction", "warmup_steps"):
            value, off = getattr(self, field), getattr(RestartConfig, field)
            said = f"{value} has no effect without a restart; raise steps of a run that is there or set optimizer.restart.at"
            need(bool(self.at) or value == off, f"optimizer.restart.{field}", said)


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW with warm-up and cosine decay; matrices decay, norm gains and biases do not."""

    learning_rate: float = 1e-3  # peak
    warmup_steps: int = 50
    final_fraction: float = 0.1  # of the peak, at the last step
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0  # global gradient norm; 0: no clipping
    accumulate_steps: int = 1  # micro-batches a step; divides batch_size
    restart: RestartConfig = dataclasses.field(default_factory=RestartConfig)

    def check(self) -> None:
        _need_positive(self, "optimizer.", "learning_rate", "eps", "accumulate_steps")
        _need_from_zero(self, "optimizer.", "warmup_steps", "weight_decay", "clip_norm")
        for field, top in (("beta1", 1), ("beta2", 1), ("final_fraction", 1.0001)):
            number = getattr(self, field)
            need(0 <= number < top, f"optimizer.{field}", f"{number} is not from 0 to 1")
        self.restart.check()


@dataclasses.dataclass
class MeshConfig:
    """Devices along each axis; their product must equal the number of devices. One -1 takes what is left."""

    data: int = -1  # batch split, parameters replicated
    fsdp: int = 1  # batch split, parameters split
    tensor: int = 1  # heads and MLP channels split
    host_devices: int = 0  # CPU only: devices this process shows; 0: one
    distributed: bool = False  # several processes: call jax.distributed.initialize() first

    def check(self) -> None:
        for axis in ("data", "fsdp", "tensor"):
            size = getattr(self, axis)
            need(size >= 1 or size == -1, f"mesh.{axis}", f"{size} is neither a number of devices nor -1")
        shown = self.host_devices
        said = f"{shown} is not a number of devices from 0 to {MOST_HOST_DEVICES}"
        need(0 <= shown <= MOST_HOST_DEVICES, "mesh.host_devices", said)


@dataclasses.dataclass
class CheckpointConfig:
    every_steps: int = 100
    keep: int = 2  # newest ones that stay; those at which the schedule restarts stay too

    def check(self) -> None:
        _need_positive(self, "checkpoint.", "every_steps", "keep")


@dataclasses.dataclass
class LogConfig:
    every_steps: int = 10
    tensorboard: bool = True
    wandb: bool = False  # needs the wandb package and an account
    wandb_project: str = "mla"

    def check(self) -> None:
        _need_positive(self, "log.", "every_steps")


@dataclasses.dataclass
class EvalCacheConfig:
    codec: str = "none"  # how streams are stored: none (the model's dtype), int8, key=int4:32,.. see mla/cache/codecs
    evict: str = "none"  # which entries leave: streaming, snapkv:window=16,.. see mla/cache/eviction; none: all stay
    evict_when: str = ""  # prefill (a prompt is cut to the budget) | decode (after every token) | both; empty: as published
    budget_tokens: int = 0  # entries that stay of a layer that entries can leave, the mean over these layers
    budget_bytes: int = 0  # or the bytes of one sequence in all these layers, scores included; 0: budget_tokens says it
    merge: str = "none"  # what adjacent layers store once: minicache, minicache:retain=0.1,.. see mla/cache/merged.py

    def check(self) -> None:

        codecs.check(self.codec)
        _validate_eviction(self, need)
        _validate_merge(self, need)


@dataclasses.dataclass
class EvalYarnConfig:
    """YaRN (mla/ops/rope.py) in an evaluation, on mechanisms that have it, whatever they were trained with."""

    factor: float = 1.0  # how many times longer than original_context positions may be; 1: as the model was trained
    original_context: int = 0  # tokens the model is at home in; 0: the context it was trained at
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def check(self) -> None:
        prefix, off = "eval.yarn.", EvalYarnConfig()
        if self.factor == 1:
            for field, value in dataclasses.asdict(self).items():
                said = f"{value} has no effect while eval.yarn.factor is 1; leave it out"
                need(value == getattr(off, field), prefix + field, said)
        need(self.factor >= 1, prefix + "factor", f"{self.factor} is not a number from 1 up; 1 leaves YaRN out")
        _need_positive(self, prefix, "beta_fast", "beta_slow")
        _need_from_zero(self, prefix, "original_context", "mscale", "mscale_all_dim")


@dataclasses.dataclass
class EvalConfig:
    split: str = "validation"  # validation | train | all
    tokens: int = 0  # predicted tokens at most; 0: the whole split
    context: int = 0  # tokens of a window, and of the prompt before decoding; 0: the context of training
    batch_size: int = 64  # windows at once
    tolerance: float = (
        1e-4  # nats by which the loss through the cache may differ from the parallel form's (fp32; 1e-2 in bf16)
    )
    decode_batch: int = 1  # sequences in the decode speed measurement
    decode_tokens: int = 64  # tokens decoded in it, after a prompt of `context` tokens; 0: not measured
    cache: EvalCacheConfig = dataclasses.field(default_factory=EvalCacheConfig)
    yarn: EvalYarnConfig = dataclasses.field(default_factory=EvalYarnConfig)

    def check(self) -> None:
        _need_positive(self, "eval.", "batch_size", "decode_batch", "tolerance")
        _need_one_of(self, "eval.", "split", ("validation", "train", "all"))
        decoded = self.decode_tokens
        need(decoded >= 0, "eval.decode_tokens", f"{decoded} is negative; 0 leaves the speed unmeasured")
        need(self.tokens >= 0, "eval.tokens", f"{self.tokens} is negative; 0 means the whole split")
        said = f"{self.context} is not a number of tokens; 0 means the context of training"
        need(self.context >= 0, "eval.context", said)
        self.cache.check()
        self.yarn.check()


@dataclasses.dataclass
class Config:
    """One training run."""

    name: str = "mla"
    seed: int = 0  # of initialisation and data order
    steps: int = 200
    batch_size: int = 16  # sequences, global
    context: int = 256  # tokens
    init_from: str = ""  # workdir whose last checkpoint's parameters to start from; empty: random
    loss_chunk_tokens: int = 4096  # tokens whose logits exist at once
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)

    @property
    def evaluated_context(self) -> int:
        """Tokens of an evaluation's windows."""
        return self.eval.context or self.context

    def check(self) -> None:
        """This class's fields, those of the groups below it, and what they need of one another."""
        said = "is empty or cannot be printed; results are called by it"
        need(bool(self.name.strip()) and self.name.isprintable(), "name", said)
        last = SEEDS - 1
        need(0 <= self.seed <= last, "seed", f"{self.seed} is not from 0 to {last}: random numbers start from 32 bits")
        _need_positive(self, "", "steps", "batch_size", "context", "loss_chunk_tokens")
        for group in (self.data, self.model, self.optimizer, self.mesh, self.checkpoint, self.log, self.eval):
            group.check()
        parts = self.optimizer.accumulate_steps
        said = f"{parts} does not divide batch_size {self.batch_size}"
        need(self.batch_size % parts == 0, "optimizer.accumulate_steps", said)
        last = max(self.optimizer.restart.at, default=0)
        need(last < self.steps, "optimizer.restart.at", f"{last} is not before the last of {self.steps} steps")


# ------------------------------------------------------------------------------------------- patterns and mechanisms


def mechanism_config(pattern: typing.Sequence[str], settings: dict[str, Any] | None = None) -> Any:
    """The config object behind `config.model.mechanism` for a pattern.

    Args:
      pattern: layer entries.
      settings: label -> {field: value}; with a single label, field -> value will do.

    Raises:
      UserError: unknown mechanism, label or field, with the nearest match.
    """
    settings = settings or {}
    by_label = labels(pattern)
    if len(by_label) == 1:
        ((label, name),) = by_label.items()
        cls = mechanism(name)[0]
        labelled = isinstance(settings.get(label), dict) and label not in {field.name for field in dataclasses.fields(cls)}
        return build(cls, settings[label] if labelled else settings, "config.model.mechanism")
    unknown = set(settings) - set(by_label)
    if unknown:
        label = sorted(unknown)[0]
        raise UserError(f"config.model.mechanism.{label}: no such label in the pattern; {nearest(label, by_label)}")
    parts = {
        label: build(mechanism(name)[0], settings.get(label, {}), f"config.model.mechanism.{label}")
        for label, name in by_label.items()
    }
    return dataclasses.make_dataclass("Mechanisms", [(label, type(part)) for label, part in parts.items()])(**parts)


def fitting_mechanism(model: ModelConfig) -> Any:
    """`model.mechanism` for a changed `model.pattern`: what still fits is kept, the rest has its defaults."""

    def own(label: str, name: str) -> Any:
        whole = isinstance(model.mechanism, MechanismConfig)
        candidate = model.mechanism if whole else getattr(model.mechanism, label, None)
        expected = mechanism(name)[0]
        return candidate if type(candidate) is expected else expected()

    settings = {label: dataclasses.asdict(own(label, name)) for label, name in labels(model.pattern).items()}
    return mechanism_config(model.pattern, settings)


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One layer's mechanism.

    Attributes:
      name, config: of the mechanism.
      source: the layer whose entries this one reads; None where it remembers for itself.
    """

    name: str
    config: Any
    source: int | None = None


def layers(model: ModelConfig) -> list[LayerSpec]:
    """The mechanism of each layer, bottom first.

    Raises:
      UserError: a layer reads one that it cannot read.
    """
    entries, single = expand(model.pattern, model.num_layers), len(labels(model.pattern)) == 1
    found = []
    for entry, source in zip(entries, sources(entries), strict=True):
        label, name, _ = parse(entry)
        found.append(LayerSpec(name, model.mechanism if single else getattr(model.mechanism, label), source))
    return found


def describe(model: ModelConfig) -> str:
    """The mechanisms of a model in one word: their names, or the pattern where layers read one another."""
    shared = any(layer.source is not None for layer in layers(model))
    return ",".join(model.pattern) if shared else "+".join(dict.fromkeys(labels(model.pattern).values()))


def mechanism_configs(model: ModelConfig) -> list[Any]:
    """The mechanism's own config of each label of the pattern."""
    found = list(labels(model.pattern))
    return [model.mechanism] if len(found) == 1 else [getattr(model.mechanism, label) for label in found]


def for_evaluation(config: Config) -> Config:
    """What the evaluated model is built from: `config` at the context of its evaluation, with the YaRN asked for.

    The context never shrinks here: a model that was trained with YaRN switched on keeps it in shorter windows.
    """
    changed = copy.deepcopy(config)
    changed.context = max(config.context, config.evaluated_context)
    if config.eval.yarn.factor != 1:
        wanted = dataclasses.asdict(config.eval.yarn)
        wanted["original_context"] = wanted["original_context"] or config.context
        for part in mechanism_configs(changed.model):
            if hasattr(part, "yarn"):
                part.yarn = dataclasses.replace(part.yarn, **wanted)
    return changed


def around(config: Config) -> Any:
    """What the mechanisms of this model are told about it."""
    import jax.numpy as jnp

    model = config.model
    return Surroundings(
        d_model=model.d_model,
        num_heads=model.num_heads,
        num_layers=model.num_layers,
        context=config.context,
        dtype=jnp.dtype(model.dtype),
        rope_theta=model.rope_theta,
        norm_eps=model.norm_eps,
        qk_norm=model.qk_norm,
        residual_init=model.residual_init,
        backend=model.attention_backend,
    )


# -------------------------------------------------------------------------------------------------- checks and (de)coding


def validate(config: Config) -> None:
    """Refuses what cannot work, before any array exists: one UserError that names the field."""
    _check_types(config)
    config.check()
    for path, value, _ in _fields(config):
        _check_value(path, value)
    _validate_mechanisms(config)
    model = config.model
    need(
        model.d_model % model.num_heads == 0,
        "model.num_heads",
        f"{model.num_heads} does not divide d_model {model.d_model}; the MHA model that sizes are matched to needs it",
    )
    _validate_sharing(model, need)
    _validate_yarn(config)


# field -> type of a dataclass, postponed annotations resolved; computed once a class.
type_hints: Callable[[type], dict[str, Any]] = functools.cache(typing.get_type_hints)


def _fields(group: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, value, type hint) of every field of a dataclass that is no group of fields, nested ones included."""
    hints = type_hints(type(group))
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value, hints[field.name]


def _check_types(config: Config) -> None:
    """Refuses what a config file assigned of another type: comparisons and config.json would fail on it."""
    for path, value, hint in _fields(config):
        wrong = isinstance(hint, type) and type(value) is not hint and not (hint is float and type(value) is int)
        need(not wrong, path, f"{value!r} is no {getattr(hint, '__name__', hint)}")


def _check_value(path: str, value: Any) -> None:
    """Refuses numbers that change when an array takes them, and text that is no text."""
    if isinstance(value, float):
        need(math.isfinite(value), path, f"{value} is not a finite number")
        said = f"{value} is beyond what 32-bit floats can tell from 0 or infinity"
        need(value == 0 or TINIEST <= abs(value) <= LARGEST, path, said)
    elif isinstance(value, int) and path != "seed":
        need(-(2**31) <= value < 2**31, path, f"{value} is beyond what 32 bits can count")
    for text in (part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, str)):
        odd = "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text)
        need(not odd, path, f"{text!r} is not UTF-8 text")


def _validate_mechanisms(config: Config) -> None:
    """Every label's mechanism has the config of its own, and accepts it for this model."""
    model, by_label = config.model, labels(config.model.pattern)
    for label, name in by_label.items():
        expected, _ = mechanism(name)
        own: Any = model.mechanism if len(by_label) == 1 else getattr(model.mechanism, label, None)
        need(
            type(own) is expected,
            "model.pattern",
            f"names {name!r}, but config.model.mechanism is {type(model.mechanism).__name__}; choose the mechanism with the"
            f" config file's variant instead (--config=FILE:{','.join(model.pattern)})",
        )
        prefix = "model.mechanism." if len(by_label) == 1 else f"model.mechanism.{label}."
        for path, number, _ in _fields(own, prefix):
            if isinstance(number, int | float):
                need(0 <= number < math.inf, path, f"{number} is not a number from 0 up")
        own.validate(around(config))


def _validate_yarn(config: Config) -> None:
    """What YaRN in an evaluation needs of the model: a context beyond the original one, and no layer left without it."""
    yarn = config.eval.yarn
    if yarn.factor == 1:
        return
    original, context = yarn.original_context or config.context, config.evaluated_context
    need(
        context > original,
        "eval.yarn.factor",
        f"{yarn.factor:g} has no effect in windows of {context} tokens, which the original {original} hold; set eval.context"
        f" to more, such as {round(original * (yarn.factor if original * yarn.factor < 2**31 else 2))}",
    )
    surroundings = around(config)
    for index, layer in enumerate(layers(config.model)):
        formula = layer.config.cache_formula(surroundings)
        near = not formula.per_token or (formula.window is not None and formula.window <= original)
        need(
            near or hasattr(layer.config, "yarn"),
            "eval.yarn.factor",
            f"layer {index} is {layer.name}, which has no YaRN and looks back further than {original} tokens; leave it out",
        )


def _validate_eviction(cache: EvalCacheConfig, check: Any) -> None:
    """What eviction needs, as far as no model has to be known."""
    policy = eviction.policy(cache.evict)
    for field in ("budget_tokens", "budget_bytes"):
        check(
            0 <= getattr(cache, field) < 2**31, f"eval.cache.{field}", f"{getattr(cache, field)} is not a number from 0 up"
        )
    if policy is None:
        for field, nothing in (("budget_tokens", 0), ("budget_bytes", 0), ("evict_when", "")):
            value = getattr(cache, field)
            said = f"{value!r} has no effect while eval.cache.evict is none; leave it out"
            check(value == nothing, f"eval.cache.{field}", said)
        return
    when = cache.evict_when
    known = nearest(when, eviction.WHEN)
    check(when in ("", *eviction.WHEN), "eval.cache.evict_when", f"{when!r}: {known}")
    check(
        when in ("", policy.when) or policy.elsewhere,
        "eval.cache.evict_when",
        f"{cache.evict} chooses at the end of a prompt only, not {when!r}; leave it out",
    )
    both = bool(cache.budget_tokens and cache.budget_bytes)
    check(not both, "eval.cache.budget_bytes", "is given beside budget_tokens; leave one of them out")
    either = cache.budget_tokens or cache.budget_bytes
    check(bool(either), "eval.cache.budget_tokens", f"0 leaves nothing to {cache.evict}; set how many entries stay")
    check(
        bool(cache.budget_bytes) or cache.budget_tokens >= policy.least(),
        "eval.cache.budget_tokens",
        f"{cache.budget_tokens} is less than the {policy.least()} that {cache.evict} needs: what it always keeps, and one",
    )


def _validate_merge(cache: EvalCacheConfig, check: Any) -> None:
    if merged.merge(cache.merge) is None:
        return
    # Two layers share what is merged; a policy has each of them keep other tokens.
    said = f"{cache.merge!r} beside eval.cache.evict={cache.evict!r}: layers of a pair cannot keep other tokens each"
    check(cache.evict == "none", "eval.cache.merge", f"{said}; set one of them to none")


def _validate_sharing(model: ModelConfig, check: Any) -> None:
    """What layers that read one another need, beside what `layers` refuses."""
    found = layers(model)
    readers = [index for index, layer in enumerate(found) if layer.source is not None]
    if not readers:
        return
    own = found[readers[0]]
    check(
        all(isinstance(found[index].config, SoftmaxConfig) for index in readers),
        "model.pattern",
        f"layer {readers[0]} reads {own.name}, which remembers a state and no entries; only softmax mechanisms can be read",
    )
    check(
        len(model.pattern) == 1 or model.num_layers % len(model.pattern) == 0,
        "model.pattern",
        f"shares over groups of {len(model.pattern)} layers, which do not divide model.num_layers={model.num_layers}",
    )


def to_dict(config: Config) -> dict[str, Any]:
    """Plain JSON-able dict; `from_dict` reads it back."""
    return dataclasses.asdict(config)


def build(cls: type, values: dict[str, Any], path: str) -> Any:
    """A dataclass from a dict, nested ones included.

    Raises:
      UserError: unknown field with the nearest match, or a value of the wrong type.
    """
    types = type_hints(cls)
    hints = {field.name: types[field.name] for field in dataclasses.fields(cls)}
    kwargs: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{path}.{key}: no such field; {nearest(key, hints)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint) and isinstance(value, dict):
            value = build(hint, value, f"{path}.{key}")  # type: ignore[arg-type]
        elif hint is float and type(value) is int:
            value = float(value)
        elif typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
            value = tuple(value)
        elif isinstance(hint, type) and type(value) is not hint:
            raise UserError(f"{path}.{key}: {value!r} is no {hint.__name__}")
        kwargs[key] = value
    return cls(**kwargs)


def from_dict(values: dict[str, Any]) -> Config:
    """The typed tree from `to_dict`'s output (a workdir's config.json)."""
    values = dict(values, model=dict(values.get("model", {})))
    settings = values["model"].pop("mechanism", None)
    config: Config = build(Config, values, "config")
    config.model.mechanism = mechanism_config(config.model.pattern, settings)
    settle_paths(config)
    return config


def settle_paths(config: Config) -> None:
    """Makes paths absolute, in place: a run's config.json means the same wherever it is read.

    Raises:
      UserError: a home folder that nobody knows, or a field of another type than its class declares.
    """
    _check_types(config)
    config.init_from = paths.absolute(config.init_from, "config.init_from")
    data = config.data
    data.corpus = corpora.located(data.corpus)
    data.cache_dir = paths.absolute(data.cache_dir, "config.data.cache_dir")
    if data.tokenizer != "bytes" and not data.tokenizer.startswith("bpe:"):
        tokenizer = paths.absolute(data.tokenizer, "config.data.tokenizer")
        data.tokenizer = tokenizer if os.path.sep in data.tokenizer or os.path.exists(tokenizer) else data.tokenizer


def create(variant: str, settings: dict[str, Any] | None = None, **fields: Any) -> Config:
    """A config for a variant string (see `parse_pattern`), with mechanism settings and nested fields given as dicts.

    Example: `create("mla", {"kv_lora_rank": 64}, steps=300, model={"d_model": 128})`.
    """
    pattern = parse_pattern(variant)
    model = dict(fields.pop("model", {}), pattern=pattern, mechanism=settings or {})
    return from_dict({"name": variant, **fields, "model": model})
