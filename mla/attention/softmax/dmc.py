"""Dynamic memory compression (Nawrot et al. 2403.09636; the authors' code where the two differ).

Grouped-query attention whose key heads decide, token by token, whether to append a slot to their cache or to average the
token into the last one. The decision and the token's weight come from the last channel of k and of q, which the dot
product then does without: no parameters are added, and a trained mha or gqa model is the start (`config.init_from`).

    alpha_t = [k_t,last - 5 > 0]  (accumulate; the first token appends)    omega_t = sigmoid(mean of the group q_t,last + 5)
    N_t = alpha_t N_{t-1} + omega_t x_t    z_t = alpha_t z_{t-1} + omega_t    x~_t = N_t / z_t    of x = k before RoPE, and v

over the last 12 tokens of a segment. A slot stands where its newest token does. Remembers 2 K d elements a slot, and in fp32
the 11 tokens before the newest, (2 d + 1) a head: the published code also keeps N and z, which here are sums over those.

Training (`forward` at a step): alpha = sigmoid((k_last - 5 + logistic noise) / tau), every x~_j is a key, and logits of
later queries get log(1 - alpha_{j+1}): a slot about to be overwritten fades. Beside the loss, max(0, 1 - 1 / ratio - mean
alpha) rounds alpha straight-through. Three stages: the channels fade out and restart at 0; the ratio rises from 1; it stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mla.attention.contract import Output, Step, Surroundings, Term, constant, mechanism, require
from mla.attention.softmax.base import NewEntries
from mla.attention.softmax.grouped_query import KeyValue
from mla.cache.clock import Clock
from mla.cache.stores import Entries, LayerCache, StoreSpec, Tail
from mla.layers.basic import TO_HEADS, LowRank, matrix, merge_heads, split_heads, unit_rms, wide_dtype
from mla.ops.mask import Mask

GQAConfig, GroupedQuery = mechanism("gqa")


@dataclasses.dataclass
class DMCConfig(GQAConfig):  # type: ignore[misc, valid-type]
    """Dynamic memory compression.

    Paper: 2403.09636
    Remembers: k and v of K heads, neighbouring tokens averaged where a head has learned to
    Elements: 2 K d_h a slot, at most a slot a token
    Use: continues a trained `gqa` or `mha`: `--config.init_from`
    """

    takes_qk_norm: ClassVar[bool] = False  # a normed channel would depend on all the others

    target_ratio: float = 2.0  # tokens a slot, on average over layers and heads, at the end of the retrofit
    segment: int = 12  # newest tokens of a slot that its average is of
    temperature: float = 0.1  # of the relaxed decisions
    offset: float = 5.0  # taken from k's channel, added to q's: a fresh model appends, with weights of 1
    fade: float = 0.1  # of config.steps: the two channels go to 0, nothing is merged yet
    ramp: float = 0.6  # of config.steps: the ratio asked for rises from 1 to target_ratio; it stays for the rest

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        require(self.window == 0, "window", "merged slots do not leave in turn; set it to 0")
        require(self.soft_cap == 0, "soft_cap", "a cap would bound what removes a key; set it to 0")
        require(self.target_ratio >= 1, "target_ratio", f"{self.target_ratio} is below 1, a slot for every token")
        require(self.segment >= 1, "segment", f"{self.segment} is below 1, the newest token alone")
        require(self.temperature > 0, "temperature", f"{self.temperature} is not a positive number")
        require(self.fade + self.ramp <= 1, "ramp", f"fade {self.fade} and ramp {self.ramp} are more than all steps")

    def cache_formula(self, around: Surroundings) -> list[Term]:
        """Room for a text of which nothing is merged; what a text needs is measured (`mla.evaluation.compression`)."""
        kept = (self.segment - 1) * self.kv_heads(around) * (2 * self.width(around) + 1)
        return [*super().cache_formula(around), constant(kept)]


def running_sums(contributions: jax.Array, alpha: jax.Array, span: int) -> jax.Array:
    """N_t = alpha_t N_{t-1} + c_t over the last `span` tokens: contributions [B, L, K, E], alpha [B, L, K] -> [B, L, K, E].

    Unrolled over the span and parallel over L: sum over o < span of c_{t-o} times the product of alpha_{t-o+1} .. alpha_t.
    """

    def back(a: jax.Array, by: int) -> jax.Array:
        return jnp.pad(a, ((0, 0), (by, 0), *((0, 0),) * (a.ndim - 2)))[:, : a.shape[1]]

    total, carried = contributions, jnp.ones_like(alpha)
    for offset in range(1, min(span, alpha.shape[1])):
        carried = carried * back(alpha, offset - 1)
        total = total + carried[..., None] * back(contributions, offset)
    return total


def faded(x: jax.Array, keep: jax.Array | float = 0.0) -> jax.Array:
    """Heads [..., d] with `keep` of their last channel."""
    return jnp.concatenate([x[..., :-1], x[..., -1:] * keep], axis=-1)


class DMC(GroupedQuery):  # type: ignore[misc, valid-type]
    """Grouped-query attention whose key heads append or average.

    Legend: B batch, T tokens, L tokens in a line, K key heads, d width of a head.
    """

    paged: ClassVar[bool] = False  # a slot's key changes while tokens join it
    private: ClassVar[str] = "slots that only its own queries were trained on"

    def make_entries(self, make: dict[str, Any]) -> None:
        super().make_entries(make)
        self.key.kernel = matrix(self.key.kernel[...], TO_HEADS, exact=True)  # decisions are channels of it

    def place(self, x: jax.Array, norm: Any, positions: jax.Array) -> jax.Array:
        return super().place(faded(x), norm, positions)

    def mixing_flops(self, tokens: int, decode: bool = False) -> float:
        """Of a text of which nothing is merged; and the product that decides."""
        return float(super().mixing_flops(tokens, decode)) + 2 * self.around.d_model * self.num_kv_heads

    # ------------------------------------------------------------------------------------------------------ decisions

    def decision(self, x: jax.Array) -> jax.Array:
        """Logits of accumulating, [B, T, K]. In fp32 whatever dtype and device: rounding must not turn a decision."""
        kernel = self.key.kernel[...].reshape(x.shape[-1], self.num_kv_heads, -1)[..., -1]
        logits = jnp.matmul(x.astype(wide_dtype(x.dtype)), kernel, precision=jax.lax.Precision.HIGHEST)
        return logits - self.config.offset

    def contributions(self, x: jax.Array, keep: jax.Array | float = 0.0) -> jax.Array:
        """omega k, omega v, omega of each token in fp32, [B, T, K, 2 d + 1]; keys unrotated, with `keep` of the channel."""
        wide = wide_dtype(x.dtype)
        key, value = (split_heads(project(x), self.num_kv_heads) for project in (self.key, self.value))
        value = unit_rms(value, self.around.norm_eps) if self.config.value_norm else value
        channel = split_heads(self.query(x), self.num_heads)[..., -1].astype(wide)
        importance = jnp.mean(channel.reshape(*channel.shape[:-1], self.num_kv_heads, -1), axis=-1)
        weight = jax.nn.sigmoid(importance + self.config.offset)[..., None]
        return jnp.concatenate([weight * faded(key, keep).astype(wide), weight * value.astype(wide), weight], axis=-1)

    def averages(self, sums: jax.Array, positions: jax.Array) -> KeyValue:
        """x~ of sums [B, L, K, 2 d + 1], its keys rotated to int32 [B, L]."""
        weight = jnp.maximum(sums[..., -1:], jnp.finfo(sums.dtype).tiny)
        key, value = jnp.split((sums[..., :-1] / weight).astype(self.around.dtype), 2, axis=-1)
        return KeyValue(super().place(key, None, positions), value)

    # ------------------------------------------------------------------------------------------- inference: alpha is 0 or 1

    def stores(self) -> dict[str, StoreSpec]:
        """Slots that each key head begins by its own decisions, and what the last tokens added to the sums behind them."""
        sums = jax.ShapeDtypeStruct((self.num_kv_heads, 2 * self.head_dim + 1), jnp.float32)
        tail = Tail(sums, self.config.segment - 1, dtype=wide_dtype(self.around.dtype))
        return {"entries": Entries(self.streams(), Clock(heads=self.num_kv_heads)), "tail": tail}

    def new_entries(self, x: jax.Array, positions: jax.Array, cache: LayerCache | None) -> NewEntries:
        """All x~; each takes the place of the one before where its head accumulates. The first token of a text appends."""
        positions = jnp.broadcast_to(positions, x.shape[:2])
        before = cache or self.init_cache(x.shape[0], 0, self.around.dtype)
        real, kept = positions >= 0, self.config.segment - 1
        first = (jnp.cumsum(real, axis=1) == 1) & (before["entries"].slots.lengths[:, :1] == 0)
        joins = (self.decision(x) > 0) & (real & ~first)[..., None]
        line = before["tail"].line(jnp.where(real[..., None, None], self.contributions(x), 0), positions)
        # The tail was cut to the open segment, so all of it joins, also where it has moved up into the place of padding.
        alpha = jnp.pad(joins | ~real[..., None], ((0, 0), (kept, 0), (0, 0)), constant_values=True).astype(line.dtype)
        entries = self.averages(running_sums(line, alpha, kept + 1)[:, kept:], positions)
        if cache is None:
            return NewEntries(entries, None, joins)
        later = jnp.pad(alpha[:, 1:], ((0, 0), (0, 1), (0, 0)), constant_values=1)
        still = jnp.cumprod(later[:, ::-1], axis=1)[:, ::-1, :, None]
        return NewEntries(entries, cache.replace(tail=cache["tail"].after(still * line, positions)), joins)

    # ------------------------------------------------------------------------------------------------------- retrofitting

    def before_step(self, step: Step) -> None:
        """Both channels start the second stage at 0: appending, with equal weights."""
        starts = (step.previous < self.config.fade) & (step.progress >= self.config.fade)
        for linear, heads in ((self.key, self.num_kv_heads), (self._last_query(), self.num_heads)):
            kernel = split_heads(linear.kernel[...], heads)
            linear.kernel[...] = merge_heads(kernel.at[..., -1].multiply(jnp.where(starts, 0.0, 1.0)))

    def _last_query(self) -> Any:
        return self.query.up if isinstance(self.query, LowRank) else self.query

    def required(self, progress: jax.Array) -> jax.Array:
        """The share of tokens to accumulate."""
        risen = jnp.clip((progress - self.config.fade) / max(self.config.ramp, 1e-6), 0.0, 1.0)
        return 1 - 1 / (1 + (self.config.target_ratio - 1) * risen)

    @classmethod
    def total(cls, losses: Sequence[dict[str, jax.Array]]) -> jax.Array:
        """max(0, what is missing of the required share), on average over all heads of all layers, in each sequence."""
        missing = jnp.concatenate([said["missing"] for said in losses], axis=1).mean(axis=1)
        return jnp.mean(jnp.maximum(missing, 0))

    @classmethod
    def logged(cls, metrics: Sequence[dict[str, jax.Array]]) -> dict[str, jax.Array]:
        """compression: tokens a slot, on average over heads, layers and sequences, of the decisions with their noise."""
        share = jnp.concatenate([said["share"] for said in metrics], axis=1).mean(axis=1)
        return {"compression": 1 / (1 - jnp.mean(share))}

    def forward(
        self, x: jax.Array, positions: jax.Array | None = None, memory: Any = None, step: Step | None = None
    ) -> Output:
        """At a step, which takes no positions but 0 .. T-1: the relaxed form, and of each sequence and key head, [B, K], the
        share of tokens that were accumulated, and what is missing of the required one."""
        if step is None:
            return super().forward(x, positions, memory)
        positions, progress = jnp.arange(x.shape[1], dtype=jnp.int32)[None], step.progress
        merging = progress >= self.config.fade
        keep = jnp.where(merging, 0.0, jnp.maximum(0.0, 1 - progress / max(0.8 * self.config.fade, 1e-6))).astype(x.dtype)
        logits = self.decision(x)
        logits = (logits + jax.random.logistic(step.key, logits.shape, logits.dtype)) / self.config.temperature
        joins = merging & (positions > 0)[..., None]
        alpha = jnp.where(joins, jax.nn.sigmoid(logits), 0.0)
        fading = jnp.where(joins, jax.nn.log_sigmoid(-logits), 0.0)  # log(1 - alpha)
        fading = jnp.pad(fading[:, 1:], ((0, 0), (0, 1), (0, 0)))[..., None]

        merged = self.averages(running_sums(self.contributions(x, keep), alpha, self.config.segment), positions)
        query = super().place(faded(split_heads(self.query(x), self.num_heads), keep), None, positions)
        # Every token is an entry twice: for its own query, and for later ones with what fades it as one more channel.
        twice = [jnp.concatenate([a, a], axis=1) for a in merged]
        one = jnp.full((*query.shape[:3], 1), 1 / self.scale, query.dtype)
        bias = jnp.concatenate([jnp.zeros_like(fading), fading], axis=1).astype(query.dtype)
        where = jnp.broadcast_to(positions, x.shape[:2])
        later = jnp.full_like(where, jnp.iinfo(jnp.int32).max)
        mask = Mask(
            where,
            jnp.concatenate([where, where], axis=1),
            since=jnp.concatenate([where, where + 1], axis=1),
            until=jnp.concatenate([where + 1, later], axis=1),
        )
        heads = merge_heads(self.softmax((query, one), (twice[0], bias), twice[1], mask, self.scale))
        rounded = alpha + jax.lax.stop_gradient(jnp.round(alpha) - alpha)
        y = self.out(heads * jax.nn.sigmoid(self.gate(x)) if self.gate else heads)
        share = jnp.mean(rounded, axis=1)
        return Output(y, {"missing": self.required(progress) - share}, {"share": share})
