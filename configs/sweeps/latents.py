"""Feature latents beside sequence latents at about equal bytes: a shorter vector a token, or one vector for several tokens.

    python sweep.py --config=configs/sweeps/latents.py --workdir=runs/latents
    python sweep.py --config=configs/sweeps/latents.py:task=recall --workdir=runs/latents_recall

mla of three sizes; temporal_latent, which sums two or four of mla's latents; compressed (DeepSeek-V4's HCA), which pools
four tokens behind a window, and compressed_sparse, which reads some of what it pools.

Variant: settings of the form task=recall,rates=0.003+0.006,seeds=3,steps=2000. `task` is quick (perplexity) or recall (keys
to be looked up); `steps` those of the base config if it is 0.

Hardware and time: those of configs/quick.py and configs/recall.py, seven or eight points a rate.
Expected: see results/latents and results/latents_recall; notebooks/sequence_or_feature_latents.ipynb reads them.
"""

from collections.abc import Iterator

from mla.sweep.runs import Training, settings, with_seeds

# Elements a token and layer stand in the names; windows and open pools come on top.
QUICK = {
    "mla-80": ("mla", {}),
    "mla-40": ("mla", {"kv_lora_rank": 24}),
    "mla-20": ("mla", {"kv_lora_rank": 12, "qk_rope_head_dim": 8}),
    "temporal_latent-40": ("temporal_latent", {"stride": 2}),
    "temporal_latent-20": ("temporal_latent", {"stride": 4}),
    "compressed-8": ("compressed", {"stride": 4, "window": 32}),
    "compressed-16": ("compressed", {"stride": 4, "window": 64, "head_dim": 64}),
    "compressed_sparse-12": ("compressed_sparse", {"window": 32}),
}
LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 32, "v_head_dim": 32}
VECTORS = {"window": 8, "qk_rope_head_dim": 16, "out_groups": 2}
RECALL = {
    "mla-64": ("mla", {}),
    "mla-32": ("mla", {"kv_lora_rank": 16, "qk_rope_head_dim": 16}),
    "mla-16": ("mla", {"kv_lora_rank": 8, "qk_rope_head_dim": 8}),
    "temporal_latent-32": ("temporal_latent", LATENT | {"stride": 2}),
    "temporal_latent-16": ("temporal_latent", LATENT | {"stride": 4}),
    "compressed-8": ("compressed", VECTORS | {"stride": 4, "head_dim": 32}),
    "compressed_sparse-16": ("compressed_sparse", VECTORS | {"head_dim": 32, "index_head_dim": 32, "top_k": 4}),
}


def get_runs(variant: str = "") -> Iterator[Training]:
    chosen = settings(variant, task="quick", rates="0", seeds=1, steps=0)
    base, points = {"quick": ("quick", QUICK), "recall": ("recall", RECALL)}[chosen["task"]]
    runs = []
    for rate in map(float, chosen["rates"].split("+")):
        for name, (mechanism, fields) in points.items():
            own = {f"config.model.mechanism.{field}": value for field, value in fields.items()}
            own |= {"config.optimizer.learning_rate": rate} if rate else {}
            own |= {"config.steps": chosen["steps"]} if chosen["steps"] else {}
            point = f"{name}-lr{rate:g}" if rate else name
            runs.append(Training(point, f"configs/{base}.py:{mechanism}", own, mechanism))
    return with_seeds(runs, chosen["seeds"])
