"""The typed config tree: every field, its default and its unit, in one place.

Config files in `configs/` return a `Config`; the command line overrides any field (`--config.model.d_model=256`). The
mechanisms' own fields are dataclasses beside their modules in `mla/attention/`, kept in `config.model.mechanism` under their
labels in the pattern. Paths leave a lone label out, `config.model.mechanism.FIELD`; with several: `.mechanism.LABEL.FIELD`.
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

import jax.numpy as jnp

from mla import errors, paths
from mla.attention.contract import MechanismConfig, Surroundings, mechanism
from mla.cache import codecs, eviction, merged, pages
from mla.data import corpora, tasks
from mla.errors import UserError, nearest
from mla.layers.basic import NORMS
from mla.layers.mlp import MLPConfig, SwiGLUConfig, mlp
from mla.ops import attention, recurrence
from mla.pattern import MOST_LAYERS, expand, labels, parse, parse_pattern, sources

SEEDS = 2**32  # how many there are: random numbers start from 32 bits
MOST_HOST_DEVICES = 4096  # that one process can show in reasonable time
TINIEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # fp32's normal numbers


# need(condition, field, message): refuses a config whose `field`, a path such as `model.d_model`, does not meet a condition.
need = functools.partial(errors.require, "config.")


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
    """The corpus, its tokenizer and how it is split."""

    # stdlib (Python's sources) | recall[:PAIRS] | mqar:.. (mla/data/tasks) | a path, folder or glob | a hub name[:subset]
    corpus: str = "stdlib"
    tokenizer: str = "bytes"  # bytes | bpe:8192 (trained on the corpus) | a path to a tokenizer.json | ids:512 (of a task)
    end_token: str = ""  # of a tokenizer.json; empty: as the files beside it declare, or a name in common use
    text_field: str = "text"  # column that holds the text (jsonl, csv, tsv, parquet, hub)
    validation_fraction: float = 0.02  # of the corpus' bytes, by whole documents, unless the corpus has its own split
    cache_dir: str = ""  # where prepared corpora are kept; empty: $MLA_DATA_DIR or ~/.cache/mla

    def check(self) -> None:
        fraction = self.validation_fraction
        need(0 < fraction < 1, "data.validation_fraction", f"{fraction} is not between 0 and 1")


@dataclasses.dataclass
class ModelConfig:
    """A decoder. Models of one comparison differ in `pattern` and `mechanism` only."""

    d_model: int = 128  # width of the residual stream
    num_layers: int = 4
    num_heads: int = 4  # query heads; a mechanism may set its own
    # One entry a layer, repeated until num_layers: a mechanism's name, label=name to configure it apart, name@-1 to read
    # what the layer below remembers; or a layout of all layers (yoco). See mla/pattern.py.
    pattern: tuple[str, ...] = ("mla",)
    mechanism: dict[str, MechanismConfig] = dataclasses.field(default_factory=dict)  # label of the pattern -> its config
    mlp: str = "swiglu"  # swiglu | geglu | gelu | relu2 | moe: see mla/layers/mlp.py
    mlp_fields: MLPConfig = dataclasses.field(default_factory=SwiGLUConfig)  # of that MLP, such as moe's num_experts
    mlp_width: int = 0  # SwiGLU width of the MHA model all others are matched to; 0: 8/3 d_model
    match_parameters: bool = True  # solve this model's MLP width (of each expert) so that its total equals that MHA model's
    mlp_multiple: int = 8  # the solved width is a multiple of this
    solved_mlp_width: int = 0  # of weights from another run: the width (of each expert) that they have; 0: it is solved
    rope_theta: float = 10_000.0
    norm: str = "rmsnorm"  # of the residual stream: rmsnorm | layernorm (with a bias)
    norm_eps: float = 1e-6
    post_norms: bool = False  # what mixers and MLPs give is normed too before it is added (Gemma 2 and 3)
    qk_norm: bool = False  # RMSNorm on each head's q and k, where the mechanism allows it
    residual_init: str = "depth"  # projections into the residual stream start: depth (1 / sqrt(2 layers)) | zero
    tie_embeddings: bool = True
    dtype: str = "float32"  # compute: float32 | bfloat16; master weights are float32 either way
    remat: str = "none"  # recomputed in the backward pass: none | block | all_but_matmuls
    scan_layers: str = "auto"  # layers of one kind compile as one, in training: auto (except on a CPU) | on | off
    attention_backend: str = (
        "auto"  # auto, a backend of mla/ops/attention.py, or several in order of preference: blocked,auto
    )
    recurrence_backend: str = "auto"  # likewise, of mla/ops/recurrence.py: step,auto

    def check(self) -> None:
        """Refuses sizes and names that are wrong whatever the mechanisms are. Raises UserError, naming the field."""
        _need_positive(self, "model.", "d_model", "num_layers", "num_heads", "mlp_multiple", "rope_theta", "norm_eps")
        layers = self.num_layers
        need(layers <= MOST_LAYERS, "model.num_layers", f"{layers} is more than {MOST_LAYERS}, which are built one by one")
        need(len(self.pattern) >= 1, "model.pattern", "is empty; name a mechanism for at least one layer")
        repeated = f"has {len(self.pattern)} entries for model.num_layers={layers}; a pattern is repeated, never cut"
        need(len(self.pattern) <= layers, "model.pattern", repeated)
        dtype = self.dtype
        need(dtype in ("float32", "bfloat16"), "model.dtype", f"{dtype!r} is neither float32 nor bfloat16")
        _need_one_of(self, "model.", "residual_init", ("depth", "zero"))
        _need_one_of(self, "model.", "norm", list(NORMS))
        _need_one_of(self, "model.", "remat", ("none", "block", "all_but_matmuls"))
        _need_one_of(self, "model.", "scan_layers", ("auto", "on", "off"))
        for field, backends in (("attention_backend", attention.BACKENDS), ("recurrence_backend", recurrence.BACKENDS)):
            known = ("auto", *backends)
            for name in getattr(self, field).split(","):
                need(name in known, f"model.{field}", f"{name!r}: {nearest(name, known)}")
        need(self.mlp_width >= 0, "model.mlp_width", f"{self.mlp_width} is negative; 0 means 8/3 of d_model")
        _need_from_zero(self, "model.", "solved_mlp_width")


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
    distributed: bool = False  # several processes, of which a cluster's manager or the environment tells: docs/scale.md
    join_seconds: int = 300  # how long processes wait for one another at the start
    silence_seconds: int = 30  # after which a process that does not answer counts as gone, and the others end

    def check(self) -> None:
        for axis in ("data", "fsdp", "tensor"):
            size = getattr(self, axis)
            need(size >= 1 or size == -1, f"mesh.{axis}", f"{size} is neither a number of devices nor -1")
        shown = self.host_devices
        said = f"{shown} is not a number of devices from 0 to {MOST_HOST_DEVICES}"
        need(0 <= shown <= MOST_HOST_DEVICES, "mesh.host_devices", said)
        _need_positive(self, "mesh.", "join_seconds", "silence_seconds")


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
    peak_flops: float = (
        0.0  # FLOPs a second of one device, of which mfu is the share used; 0: as published, if that is known
    )

    def check(self) -> None:
        _need_positive(self, "log.", "every_steps")
        if not self.peak_flops >= 0:
            raise UserError(f"config.log.peak_flops: {self.peak_flops} is below 0")


@dataclasses.dataclass
class EvalCacheConfig:
    codec: str = "none"  # how streams are stored: none (the model's dtype), int8, key=int4:32,.. see mla/cache/codecs
    evict: str = "none"  # which entries leave: streaming, snapkv:window=16,.. see mla/cache/eviction; none: all stay
    evict_when: str = ""  # prefill (a prompt is cut to the budget) | decode (after every token) | both; empty: as published
    budget_tokens: int = 0  # entries that stay of a layer that entries can leave, the mean over these layers
    budget_bytes: int = 0  # or the bytes of one sequence in all these layers, scores included; 0: budget_tokens says it
    merge: str = "none"  # what adjacent layers store once: minicache, minicache:retain=0.1,.. see mla/cache/merged.py
    read: str = "none"  # which pages a decode step reads: quest, quest:page=16,pages=8,.. see mla/cache/pages.py

    def check(self) -> None:
        codecs.check(self.codec)
        self._check_eviction()
        if merged.merge(self.merge) is not None:
            # Two layers share what is merged; a policy has each of them keep other tokens.
            said = f"{self.merge!r} beside eval.cache.evict={self.evict!r}: layers of a pair cannot keep other tokens each"
            need(self.evict == "none", "eval.cache.merge", f"{said}; set one of them to none")
        if pages.reading(self.read) is not None:
            alone = self.evict == "none" and self.merge == "none"
            said = f"{self.read!r} beside eval.cache.evict={self.evict!r} and merge={self.merge!r}: pages are of caches that"
            need(alone, "eval.cache.read", f"{said} keep every entry; set these two to none")

    def _check_eviction(self) -> None:
        policy = eviction.policy(self.evict)
        for field in ("budget_tokens", "budget_bytes"):
            number = getattr(self, field)
            need(0 <= number < 2**31, f"eval.cache.{field}", f"{number} is not a number from 0 up")
        if policy is None:
            for field, nothing in (("budget_tokens", 0), ("budget_bytes", 0), ("evict_when", "")):
                value = getattr(self, field)
                said = f"{value!r} has no effect while eval.cache.evict is none; leave it out"
                need(value == nothing, f"eval.cache.{field}", said)
            return
        when = self.evict_when
        need(when in ("", *eviction.WHEN), "eval.cache.evict_when", f"{when!r}: {nearest(when, eviction.WHEN)}")
        said = f"{self.evict} chooses at the end of a prompt only, not {when!r}; leave it out"
        need(when in ("", policy.when) or policy.elsewhere, "eval.cache.evict_when", said)
        both = self.budget_tokens and self.budget_bytes
        need(not both, "eval.cache.budget_bytes", "is given beside budget_tokens; leave one of them out")
        either = self.budget_tokens or self.budget_bytes
        need(either, "eval.cache.budget_tokens", f"0 leaves nothing to {self.evict}; set how many entries stay")
        least = policy.least()
        said = f"{self.budget_tokens} is less than the {least} that {self.evict} needs: what it always keeps, and one"
        need(self.budget_bytes or self.budget_tokens >= least, "eval.cache.budget_tokens", said)


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
    mode: str = "windows"  # windows side by side | sliding: windows that overlap | stream: whole documents through the cache
    stride: int = 0  # sliding: tokens that a window predicts anew, the others are seen only; 0: half the window
    task: str = ""  # what is asked where config.data.corpus is a task; empty: the levels of training
    piece: int = 0  # stream: tokens that go through the cache in one call; 0: as many as a window has
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
        _need_one_of(self, "eval.", "mode", ("windows", "sliding", "stream"))
        _need_from_zero(self, "eval.", "stride", "piece")
        for field, mode in (("stride", "sliding"), ("piece", "stream")):
            said = f"{getattr(self, field)} has no effect while eval.mode is {self.mode}; leave it out or set mode={mode}"
            need(not getattr(self, field) or self.mode == mode, f"eval.{field}", said)
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
    # Of a task: training ends before its last step once new episodes are answered so well, looked at every log.every_steps
    # steps; 0: it takes all steps.
    target_accuracy: float = 0.0
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

    @property
    def evaluated_stride(self) -> int:
        """Tokens that each of an evaluation's windows but the first predicts."""
        sliding = self.eval.mode == "sliding"
        return self.eval.stride or max(1, self.evaluated_context // 2) if sliding else self.evaluated_context

    def check(self) -> None:
        """Refuses values of any group that are wrong, alone or beside one another. Raises UserError, naming the field."""
        said = "is empty or cannot be printed; results are called by it"
        need(bool(self.name.strip()) and self.name.isprintable(), "name", said)
        last = SEEDS - 1
        need(0 <= self.seed <= last, "seed", f"{self.seed} is not from 0 to {last}: random numbers start from 32 bits")
        _need_positive(self, "", "steps", "batch_size", "context", "loss_chunk_tokens")
        for group in (self.data, self.model, self.optimizer, self.mesh, self.checkpoint, self.log, self.eval):
            group.check()
        said = f"{self.eval.task!r} has no effect while config.data.corpus is text; leave it out"
        need(not self.eval.task or tasks.is_task(self.data.corpus), "eval.task", said)
        said = f"{self.eval.stride} leaves out tokens between windows of {self.evaluated_context}; take at most as many"
        need(self.eval.stride <= self.evaluated_context, "eval.stride", said)
        target = self.target_accuracy
        need(0 <= target <= 1, "target_accuracy", f"{target} is no share of answers; write 0.99, or 0 for all steps")
        said = f"{target} has no effect while config.data.corpus is text; leave it out"
        need(not target or tasks.is_task(self.data.corpus), "target_accuracy", said)
        parts = self.optimizer.accumulate_steps
        said = f"{parts} does not divide batch_size {self.batch_size}"
        need(self.batch_size % parts == 0, "optimizer.accumulate_steps", said)
        last = max(self.optimizer.restart.at, default=0)
        need(last < self.steps, "optimizer.restart.at", f"{last} is not before the last of {self.steps} steps")


# ------------------------------------------------------------------------------------------- patterns and mechanisms


def mechanism_configs(pattern: typing.Sequence[str], settings: dict[str, Any] | None = None) -> dict[str, MechanismConfig]:
    """label -> the config of its mechanism, as `config.model.mechanism` holds them for a pattern.

    Args:
      pattern: layer entries.
      settings: label -> {field: value}; with a single label, field -> value will do.

    Raises:
      UserError: unknown mechanism, label or field, with the nearest match.
    """
    by_label, settings, path = labels(pattern), settings or {}, "config.model.mechanism"
    if len(by_label) == 1:
        ((label, name),) = by_label.items()
        fields = {field.name for field in dataclasses.fields(mechanism(name)[0])}
        labelled = isinstance(settings.get(label), dict) and label not in fields
        settings = settings if labelled else {label: settings}
    for label in sorted(settings.keys() - by_label.keys()):
        raise UserError(f"{path}.{label}: no such label in the pattern; {nearest(label, by_label)}")
    called = {label: f"{path}.{label}" if len(by_label) > 1 else path for label in by_label}
    return {label: build(mechanism(by_label[label])[0], settings.get(label, {}), called[label]) for label in by_label}


def fitting_mechanisms(model: ModelConfig) -> dict[str, MechanismConfig]:
    """`model.mechanism` for a changed `model.pattern`: a label's config that fits is kept, and so is a lone one's."""
    before = model.mechanism
    lone = next(iter(before.values())) if len(before) == 1 else None

    def fitting(label: str, name: str) -> MechanismConfig:
        kept, expected = before.get(label, lone), mechanism(name)[0]
        return copy.deepcopy(kept) if type(kept) is expected else expected()

    return {label: fitting(label, name) for label, name in labels(model.pattern).items()}


def fitting_mlp(model: ModelConfig) -> MLPConfig:
    """`model.mlp_fields` for a changed `model.mlp`: those that are there where they fit, otherwise its defaults."""
    expected = mlp(model.mlp)[0]
    return model.mlp_fields if type(model.mlp_fields) is expected else expected()


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
    entries = expand(model.pattern, model.num_layers)
    parsed = zip(map(parse, entries), sources(entries), strict=True)
    return [LayerSpec(name, model.mechanism[label], source) for (label, name, _), source in parsed]


def describe(model: ModelConfig) -> str:
    """The mechanisms of a model in one word: their names, or the pattern where layers read one another."""
    shared = any(layer.source is not None for layer in layers(model))
    return ",".join(model.pattern) if shared else "+".join(dict.fromkeys(labels(model.pattern).values()))


def for_evaluation(config: Config) -> Config:
    """The config that an evaluated model is built from: `config` at the context and with the YaRN of `config.eval`.

    The context never shrinks here: a model that was trained with YaRN switched on keeps it in shorter windows.
    """
    changed = copy.deepcopy(config)
    changed.context = max(config.context, config.evaluated_context)
    if config.eval.yarn.factor != 1:
        wanted = dataclasses.asdict(config.eval.yarn)
        wanted["original_context"] = wanted["original_context"] or config.context
        for part in changed.model.mechanism.values():
            if hasattr(part, "yarn"):
                part.yarn = dataclasses.replace(part.yarn, **wanted)
    return changed


def around(config: Config) -> Surroundings:
    """The sizes and choices of a model that its mechanisms are built with."""
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
        recurrence_backend=model.recurrence_backend,
    )


# -------------------------------------------------------------------------------------------------- checks and (de)coding


def validate(config: Config) -> None:
    """Refuses what cannot work, before any array exists: one UserError that names the field."""
    _check_types(config)
    config.check()
    for path, value in leaves(config):
        _check_value(path, value)
    _validate_mechanisms(config)
    _validate_mlp(config)
    model = config.model
    need(
        model.d_model % model.num_heads == 0,
        "model.num_heads",
        f"{model.num_heads} does not divide d_model {model.d_model}; the MHA model that sizes are matched to needs it",
    )
    _validate_sharing(model)
    _validate_yarn(config)


# field -> type of a dataclass, postponed annotations resolved; computed once a class.
type_hints: Callable[[type], dict[str, Any]] = functools.cache(typing.get_type_hints)


def is_group(value: Any) -> bool:
    """Whether a value in a config tree holds fields: a dataclass, or the configs of several mechanisms by label."""
    return dataclasses.is_dataclass(value) or isinstance(value, dict)


def members(group: Any) -> dict[str, Any]:
    """name -> value of what a group holds, as paths and config.json spell it: a lone mechanism's label is left out."""
    if isinstance(group, dict):
        return members(*group.values()) if len(group) == 1 else group
    return {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}


def group_of(config: Any, path: str) -> Any:
    """The dataclass that has the last field of a path, such as `model.mechanism.kv_lora_rank`."""
    for part in path.split(".")[:-1]:
        config = members(config)[part]
    return next(iter(config.values())) if isinstance(config, dict) else config


def leaves(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every field that is no group of fields, nested ones included."""
    for name, value in members(group).items():
        if is_group(value):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _check_types(config: Config) -> None:
    """Refuses what a config file assigned of another type: comparisons and config.json would fail on it."""
    mechanisms = config.model.mechanism
    fit = isinstance(mechanisms, dict) and all(isinstance(own, MechanismConfig) for own in mechanisms.values())
    need(fit, "model.mechanism", "is no dict of labels and the configs of their mechanisms")
    for path, value in leaves(config):
        hint = type_hints(type(group_of(config, path)))[path.rpartition(".")[2]]
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
        own, expected = model.mechanism.get(label), mechanism(name)[0]
        need(
            type(own) is expected and model.mechanism.keys() == by_label.keys(),
            "model.pattern",
            f"names {name!r}, but config.model.mechanism has {', '.join(model.mechanism) or 'nothing'}; choose the mechanism"
            f" with the config file's variant instead (--config=FILE:{','.join(model.pattern)})",
        )
    for path, number in leaves(model.mechanism, "model.mechanism."):
        if isinstance(number, int | float):
            need(0 <= number < math.inf, path, f"{number} is not a number from 0 up")
    for label, own in model.mechanism.items():
        try:
            own.validate(around(config))
        except UserError as error:  # which knows the field, and not under which label
            full = f"config.model.mechanism.{label}." if len(by_label) > 1 else "config.model.mechanism."
            raise UserError(str(error).replace("config.model.mechanism.", full)) from None


def _validate_mlp(config: Config) -> None:
    """The MLP has the config of its own, and accepts it for this model."""
    model, expected = config.model, mlp(config.model.mlp)[0]
    said = f"is {type(model.mlp_fields).__name__}; the fields of model.mlp={model.mlp!r} are {expected.__name__}"
    need(type(model.mlp_fields) is expected, "model.mlp_fields", said)
    for path, number in leaves(model.mlp_fields, "model.mlp_fields."):
        if isinstance(number, int | float):
            need(0 <= number < math.inf, path, f"{number} is not a number from 0 up")
    model.mlp_fields.validate(around(config))


def _validate_yarn(config: Config) -> None:
    """Refuses YaRN in an evaluation within the original context, and for models with a far-sighted layer that has none."""
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
        terms = layer.config.cache_formula(surroundings)
        near = all(not t.stride or (t.window is not None and t.window * t.stride <= original) for t in terms)
        need(
            near or hasattr(layer.config, "yarn"),
            "eval.yarn.factor",
            f"layer {index} is {layer.name}, which has no YaRN and looks back further than {original} tokens; leave it out",
        )


def _validate_sharing(model: ModelConfig) -> None:
    """Refuses to share what other layers cannot read, and groups that do not divide the model. `layers` refuses the rest."""
    found = layers(model)
    readers = [index for index, layer in enumerate(found) if layer.source is not None]
    if not readers:
        return
    for index in readers:
        private = mechanism(found[index].name)[1].private
        said = f"layer {index} reads {found[index].name}, which remembers {private}; other layers cannot read that"
        need(not private, "model.pattern", said)
    need(
        len(model.pattern) == 1 or model.num_layers % len(model.pattern) == 0,
        "model.pattern",
        f"shares over groups of {len(model.pattern)} layers, which do not divide model.num_layers={model.num_layers}",
    )


def to_dict(group: Any) -> dict[str, Any]:
    """A config, or a group of its fields, as a plain JSON-able dict; `from_dict` reads that of a config back."""
    return {name: to_dict(value) if is_group(value) else value for name, value in members(group).items()}


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
    settings, mlp_fields = (values["model"].pop(name, None) for name in ("mechanism", "mlp_fields"))
    config: Config = build(Config, values, "config")
    config.model.mlp_fields = build(mlp(config.model.mlp)[0], mlp_fields or {}, "config.model.mlp_fields")
    config.model.mechanism = mechanism_configs(config.model.pattern, settings)
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
    if data.tokenizer != "bytes" and not data.tokenizer.startswith(("bpe:", "ids:")):
        tokenizer = paths.absolute(data.tokenizer, "config.data.tokenizer")
        data.tokenizer = tokenizer if os.path.sep in data.tokenizer or os.path.exists(tokenizer) else data.tokenizer


def create(variant: str, settings: dict[str, Any] | None = None, **fields: Any) -> Config:
    """A config for a variant string (see `parse_pattern`), with mechanism settings and nested fields given as dicts.

    Example: `create("mla", {"kv_lora_rank": 64}, steps=300, model={"d_model": 128})`.
    """
    pattern = parse_pattern(variant)
    model = dict(fields.pop("model", {}), pattern=pattern, mechanism=settings or {})
    return from_dict({"name": variant, **fields, "model": model})
