"""Fewer entries than tokens, or few of them read, beside caches that hold and read all: each at its own learning rate.

    python sweep.py --config=configs/sweeps/few_entries.py --workdir=runs/few_entries
    python sweep.py --config=configs/sweeps/few_entries.py:task=recall,seeds=1 --workdir=runs/few_entries_recall

The rates are the best of those in results/few_entries_learning_rate. With `task=recall` the models are those of
configs/recall.py, which look up 8 pairs, at its rate or at each of `rates`; what they read is cut to fit 48 tokens.

Variant: settings of the form seeds=3,task=recall,rates=0.005+0.002.

Hardware and time: thirty-nine runs of configs/quick.py, a minute or two each on two CPU cores, three to eight for those that
choose what they read; thirteen of configs/recall.py.
Expected: no loss that is not finite; means from 1.706 (strided) to 2.077 (temporal_latent), in results/few_entries.
"""

from collections.abc import Iterator

from mla.sweep.runs import Training, settings, with_seeds

# (name, learning rate, family)
POINTS = (
    ("mha", 0.006, "all entries"),
    ("mla", 0.003, "all entries"),
    ("temporal_latent", 0.003, "fewer entries"),
    ("compressive", 0.006, "fewer entries"),
    ("compressed", 0.006, "fewer entries"),
    ("compressed_sparse", 0.006, "fewer entries, few read"),
    ("block_mixture", 0.003, "few read"),
    ("deepseek_sparse", 0.003, "few read"),
    ("native_sparse", 0.006, "few read"),
    ("strided", 0.003, "few read"),
    ("fixed_columns", 0.003, "few read"),
    ("dilated", 0.003, "few read"),
    ("big_bird", 0.006, "few read"),
)
LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 32, "v_head_dim": 32}
VECTORS = {"window": 8, "qk_rope_head_dim": 16, "out_groups": 2, "head_dim": 32}
RECALL = {
    "temporal_latent": LATENT | {"stride": 2},
    "compressive": {"segment": 8, "memory": 8, "compressed_memory": 8, "rate": 4},
    "compressed": VECTORS | {"stride": 4},
    "compressed_sparse": VECTORS | {"index_head_dim": 32, "top_k": 4},
    "block_mixture": {"block": 4, "top_k": 4},
    "deepseek_sparse": LATENT | {"top_k": 12, "index_head_dim": 32},
    "native_sparse": {"pool_block": 4, "pool_stride": 2, "block": 4, "top_k": 5, "near": 8},
    "strided": {"stride": 6},
    "fixed_columns": {"stride": 8, "columns": 2},
    "dilated": {"tokens_read": 12},
    "big_bird": {"block": 4, "global_blocks": 1, "window_blocks": 2, "random_blocks": 2},
}


def get_runs(variant: str = "") -> Iterator[Training]:
    chosen = settings(variant, seeds=3, task="quick", rates="0.005")
    if chosen["task"] == "recall":
        runs = []
        for rate in map(float, chosen["rates"].split("+")):
            for name, _, family in POINTS:
                own = {f"config.model.mechanism.{field}": value for field, value in RECALL.get(name, {}).items()}
                own |= {"config.optimizer.learning_rate": rate, "config.eval.decode_tokens": 0}
                runs.append(Training(f"{name}-lr{rate:g}", f"configs/recall.py:{name}", own, family))
    else:
        runs = [
            Training(name, f"configs/quick.py:{name}", {"config.optimizer.learning_rate": rate}, family)
            for name, rate, family in POINTS
        ]
    return with_seeds(runs, chosen["seeds"])
