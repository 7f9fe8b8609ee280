"""The two sides of train_speed.py: this repository, and transformers with the same weights. Each in a process of its own."""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RIVALS = {"mha": "LlamaForCausalLM", "mla": "DeepseekV3ForCausalLM"}
OPTIMIZER = {"learning_rate": 1e-3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "clip_norm": 1.0}


@dataclass(frozen=True)
class Shape:
    """The model, the batch, and how much is timed at once."""

    layers: int = 6
    d_model: int = 256
    heads: int = 8
    vocabulary: int = 512
    kv_lora_rank: int = 64
    qk_rope_head_dim: int = 16
    context: int = 512
    batch: int = 8
    steps: int = 2  # a slice of training
    cached: int = 1024  # tokens in the cache when decoding starts
    decode_batches: tuple[int, ...] = (1, 16)
    decode_tokens: int = 32  # a slice of decoding, for each sequence

    def batches(self) -> Iterator[np.ndarray]:
        """Windows of random tokens [batch, context + 1] without end, the same on both sides."""
        draw = np.random.default_rng(0)
        while True:
            yield draw.integers(0, self.vocabulary, (self.batch, self.context + 1), dtype=np.int32)

    def prompt(self, batch: int) -> np.ndarray:
        """Random tokens [batch, cached], the same on both sides."""
        return np.random.default_rng(1).integers(0, self.vocabulary, (batch, self.cached), dtype=np.int32)


QUICK = Shape(1, 32, 2, 64, 8, 4, context=32, batch=2, steps=1, cached=32, decode_batches=(1, 2), decode_tokens=4)


def out_file(text: str) -> Path:
    """The value of a benchmark's --out, `~` expanded, for `argparse`. Refuses a folder that is not there."""
    from mla import paths
    from mla.errors import UserError

    try:
        path = Path(paths.expand(text, "--out"))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: is a folder, or in a folder that is not there")
    return path


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices(batch: int) -> int:
    """Host devices to split a batch over: one a core, at most 8."""
    return max(count for count in range(1, min(cores(), 8) + 1) if batch % count == 0)


class Ours:
    """The trainer, data-parallel over host devices, and the decoder. Writes its parameters to `weights` (npz)."""

    @staticmethod
    def imports() -> None:
        """The slow ones."""
        import mla.training.step  # noqa: F401

    def __init__(self, shape: Shape, mechanism: str, weights: Path):
        import jax

        from mla import sharding
        from mla.config import create
        from mla.data.batch import Batch
        from mla.training.step import Trainer

        latent = {"kv_lora_rank": shape.kv_lora_rank, "qk_rope_head_dim": shape.qk_rope_head_dim}
        config = create(
            mechanism,
            latent if mechanism == "mla" else {},
            steps=1_000_000,
            batch_size=shape.batch,
            context=shape.context,
            model={"d_model": shape.d_model, "num_layers": shape.layers, "num_heads": shape.heads},
            optimizer={**OPTIMIZER, "warmup_steps": 0, "final_fraction": 1.0},  # a constant rate
            mesh={"host_devices": devices(shape.batch)},
        )
        sharding.prepare_devices(config.mesh)
        self.shape, self.batches, self.mesh = shape, map(Batch.of_windows, shape.batches()), sharding.make_mesh(config.mesh)
        self.trainer = Trainer(config, shape.vocabulary, self.mesh)
        self.state = self.trainer.init()
        self.initial = jax.device_get(self.state.params)
        leaves = jax.tree_util.tree_leaves_with_path(self.initial)
        np.savez(weights, **{sharding.path_name(path): leaf for path, leaf in leaves})
        self.prefilled: dict[int, Any] = {}

    def parameters(self) -> int:
        """Their number."""
        return self.trainer.sizes.total

    def mlp_width(self) -> int:
        """What the other side takes over."""
        return self.trainer.sizes.mlp_width

    def train(self, steps: int) -> tuple[float, list[float]]:
        """Seconds and losses of some steps."""
        losses, start = [], time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.trainer.step(self.state, next(self.batches))
            losses.append(float(metrics["loss"]))
        return time.perf_counter() - start, losses

    def decode(self, batch: int) -> dict[str, tuple[float, Any]]:
        """For each kind of cache: seconds and greedy tokens [batch, decode_tokens] after the prompt, initial weights."""
        import jax

        if batch not in self.prefilled:
            self.prefilled[batch] = self._prefill(batch)
        step, following, full = self.prefilled[batch]
        cache, found = jax.block_until_ready(jax.tree.map(lambda a: a.copy(), full)), []
        start = time.perf_counter()
        for _ in range(self.shape.decode_tokens):
            following, cache = step(cache, *following)
            found.append(following[0])
        jax.block_until_ready(found)
        return {"donated": (time.perf_counter() - start, np.concatenate(found, axis=1).tolist())}

    def _prefill(self, batch: int) -> Any:
        import jax
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        from mla.evaluation.decoding import Decoder, positions
        from mla.evaluation.speed import greedy

        used = self.mesh.devices.reshape(-1)[: devices(batch)].reshape(-1, 1, 1)
        mesh = Mesh(used, self.mesh.axis_names, axis_types=self.mesh.axis_types)
        model = self.trainer.model(jax.device_put(self.initial, NamedSharding(mesh, PartitionSpec())))
        decoder = Decoder(model, batch, self.shape.cached + self.shape.decode_tokens, mesh)
        step = decoder.compiled(greedy)
        return step, *step(decoder.empty(), self.shape.prompt(batch), positions(batch, 0, self.shape.cached))


class Theirs:
    """The transformers model with PyTorch's fused attention and AdamW, uncompiled, from the parameters in `weights`."""

    @staticmethod
    def imports() -> None:
        """The slow ones."""
        import torch
        import transformers  # noqa: F401

        torch.set_num_threads(cores())

    def __init__(self, shape: Shape, mechanism: str, weights: Path, mlp_width: int):
        import torch
        import transformers

        sizes: dict[str, Any] = {
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.d_model,
            "intermediate_size": mlp_width,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.heads,
            "max_position_embeddings": 2 * max(shape.context, shape.cached),
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "attn_implementation": "sdpa",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        }
        if mechanism == "mla":
            sizes |= {
                "kv_lora_rank": shape.kv_lora_rank,
                "q_lora_rank": None,
                "qk_rope_head_dim": shape.qk_rope_head_dim,
                "qk_nope_head_dim": shape.d_model // shape.heads,
                "v_head_dim": shape.d_model // shape.heads,
                "rope_interleave": True,
                "first_k_dense_replace": shape.layers,  # no layer has experts
            }
        rival = getattr(transformers, RIVALS[mechanism])
        self.shape, self.batches, self.model = shape, shape.batches(), rival(rival.config_class(**sizes))
        copy_parameters(dict(np.load(weights)), self.model, shape)
        self.caches = {"mha": ("DynamicCache", "StaticCache"), "mla": ("DynamicCache",)}[mechanism]
        self.prefilled: dict[Any, Any] = {}
        by_decay = {OPTIMIZER["weight_decay"]: [], 0.0: []}  # matrices decay, gains do not
        for parameter in self.model.parameters():
            by_decay[0.0 if parameter.ndim < 2 else OPTIMIZER["weight_decay"]].append(parameter)
        groups = [{"params": parameters, "weight_decay": decay} for decay, parameters in by_decay.items()]
        betas, rate = (OPTIMIZER["beta1"], OPTIMIZER["beta2"]), OPTIMIZER["learning_rate"]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas, eps=OPTIMIZER["eps"], fused=True)

    def parameters(self) -> int:
        """Their number, a tied head counted once."""
        return sum(p.numel() for p in self.model.parameters())

    def train(self, steps: int) -> tuple[float, list[float]]:
        """As `Ours.train`."""
        import torch

        self.model.train()
        losses, start = [], time.perf_counter()
        for _ in range(steps):
            tokens = torch.from_numpy(next(self.batches)).long()
            logits = self.model(tokens[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER["clip_norm"])
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return time.perf_counter() - start, losses

    def decode(self, batch: int) -> dict[str, tuple[float, Any]]:
        """As `Ours.decode`; to be called before `train`, which changes the weights."""
        import torch

        self.model.eval()
        found = {}
        with torch.inference_mode():
            for kind in self.caches:
                if (batch, kind) not in self.prefilled:
                    self.prefilled[batch, kind] = self._prefill(batch, kind)
                token, cache = copy.deepcopy(self.prefilled[batch, kind])
                tokens, start = [], time.perf_counter()
                for _ in range(self.shape.decode_tokens):
                    token = self.model(token, past_key_values=cache).logits.argmax(-1)
                    tokens.append(token)
                found[kind] = time.perf_counter() - start, torch.cat(tokens, dim=1).tolist()
        return found

    def _prefill(self, batch: int, kind: str) -> Any:
        import torch
        import transformers

        size = {"max_cache_len": self.shape.cached + self.shape.decode_tokens} if kind == "StaticCache" else {}
        cache = getattr(transformers, kind)(config=self.model.config, **size)
        tokens = torch.from_numpy(self.shape.prompt(batch)).long()
        return self.model(tokens, past_key_values=cache, logits_to_keep=1).logits.argmax(-1), cache


# Ours, below blocks/LAYER/ -> theirs, below model.layers.LAYER.
NAMES = {
    "mixer_norm/scale": "input_layernorm",
    "mixer/query/kernel": "self_attn.q_proj",
    "mixer/key/kernel": "self_attn.k_proj",
    "mixer/value/kernel": "self_attn.v_proj",
    "mixer/kv_down/kernel": "self_attn.kv_a_proj_with_mqa",
    "mixer/kv_norm/scale": "self_attn.kv_a_layernorm",
    "mixer/key_value_up": "self_attn.kv_b_proj",
    "mixer/out/kernel": "self_attn.o_proj",
    "mlp_norm/scale": "post_attention_layernorm",
    "mlp/gate/kernel": "mlp.gate_proj",
    "mlp/up/kernel": "mlp.up_proj",
    "mlp/down/kernel": "mlp.down_proj",
}


def copy_parameters(ours: dict[str, np.ndarray], model: Any, shape: Shape) -> None:
    """Our matrices [in, out] and gains into the torch model's weights [out, in]: all of ours into all of theirs."""
    import torch

    weights = {"model.embed_tokens": ours.pop("embedding").T, "model.norm": ours.pop("final_norm/scale")}
    for layer in range(shape.layers):
        up = [ours.pop(f"blocks/{layer}/mixer/{name}_up/kernel", None) for name in ("key", "value")]
        if up[0] is not None:  # theirs is one matrix, [keys | values] head by head
            heads = [kernel.reshape(len(kernel), shape.heads, -1) for kernel in up]
            ours[f"blocks/{layer}/mixer/key_value_up"] = np.concatenate(heads, axis=-1).reshape(len(up[0]), -1)
    for path, value in ours.items():
        _, layer, name = path.split("/", 2)
        weights[f"model.layers.{layer}.{NAMES[name]}"] = value
    theirs = {name.removesuffix(".weight"): parameter for name, parameter in model.named_parameters()}
    assert weights.keys() == theirs.keys(), weights.keys() ^ theirs.keys()
    with torch.no_grad():
        for name, value in weights.items():
            assert theirs[name].shape == value.T.shape, name
            theirs[name].copy_(torch.from_numpy(value.T))
