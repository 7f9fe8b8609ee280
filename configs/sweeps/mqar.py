"""Recall per byte: MQAR, trained on short episodes and tested up to four times as long, by mechanisms of several sizes.

    python sweep.py --config=configs/sweeps/mqar.py --workdir=runs/mqar
    python sweep.py --config=configs/sweeps/mqar.py:plain=true,seeds=5 --workdir=runs/mqar_plain

Two layers: a gated short convolution, so that a key and its value meet, and the mechanism above it; `plain` has the
mechanism twice instead. Widths are those of configs/tasks.py; names say what differs.

Variant: settings of the form seeds=5,rates=0.003+0.001,steps=800,plain=true,only=mha+mla,target=0.99; with a target, runs
that reach it end there.

Hardware and time: two to six minutes a run on one CPU core.
Expected: docs/tasks.md.
"""

from collections.abc import Iterator

from mla.data.tasks.grids import GRIDS
from mla.errors import UserError, nearest
from mla.sweep.runs import Training, settings, with_seeds

LATENT = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 32, "v_head_dim": 32}

# name -> (mechanism, its fields, family)
POINTS: dict[str, tuple[str, dict[str, object], str]] = {
    "mha": ("mha", {}, "head sharing"),
    "gqa": ("gqa", {"num_kv_heads": 1}, "head sharing"),
    "mqa": ("mqa", {}, "head sharing"),
    **{f"mla-{rank}": ("mla", LATENT | {"kv_lora_rank": rank}, "latents") for rank in (8, 16, 32)},
    "grouped_latent": ("grouped_latent", LATENT | {"kv_lora_rank": 32}, "latents"),
    "tensor_product": ("tensor_product", {}, "latents"),
    **{f"window-{width}": ("sliding_window", {"window": width}, "window") for width in (16, 64, 256)},
    "linear": ("linear", {}, "state"),
    "gated_linear": ("gated_linear", {}, "state"),
    **{f"delta-{width}": ("delta", {"head_dim": width}, "state") for width in (16, 32)},
    "gated_delta": ("gated_delta", {"head_dim": 32}, "state"),
    "kimi_delta": ("kimi_delta", {"head_dim": 32}, "state"),
    "mamba2": ("mamba2", {"state_size": 32, "head_dim": 32}, "state"),
    "temporal_latent": ("temporal_latent", LATENT | {"kv_lora_rank": 32}, "fewer entries"),
    "compressed": (
        "compressed",
        {"window": 16, "qk_rope_head_dim": 16, "out_groups": 2, "head_dim": 32, "stride": 4},
        "fewer entries",
    ),
    "deepseek_sparse": ("deepseek_sparse", LATENT | {"kv_lora_rank": 32, "top_k": 32, "index_head_dim": 32}, "few read"),
}


def get_runs(variant: str = "") -> Iterator[Training]:
    chosen = settings(variant, seeds=1, rates="0.003", steps=800, plain=False, only="", target=0.0)
    rates, runs = [float(rate) for rate in chosen["rates"].split("+")], []
    for name in filter(None, chosen["only"].split("+")):
        if name not in POINTS:
            raise UserError(f"sweep variant only={name}: {nearest(name, POINTS)}")
    for name, (mechanism, fields, family) in POINTS.items():
        if chosen["only"] and name not in chosen["only"].split("+"):
            continue
        pattern = mechanism if chosen["plain"] else f"short_convolution,{mechanism}"
        prefix = "config.model.mechanism." + ("" if chosen["plain"] else f"{mechanism}.")
        for rate in rates:
            own = {f"{prefix}{field}": value for field, value in fields.items()}
            own |= {"config.optimizer.learning_rate": rate, "config.steps": chosen["steps"]}
            own |= {"config.target_accuracy": chosen["target"]} if chosen["target"] else {}
            own["config.eval.task"] = GRIDS["small"].test[0]
            called = f"{name}-lr{rate:g}" if len(rates) > 1 else name
            runs.append(Training(called, f"configs/tasks.py:mqar+{pattern}", own, family))
    return with_seeds(runs, chosen["seeds"])
