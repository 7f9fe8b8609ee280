"""Mechanisms side by side, on the same tokens, parameters matched.

    python sweep.py --config=configs/sweeps/compare.py --workdir=runs/compare              the seven points of `make compare`
    python sweep.py --config=configs/sweeps/compare.py:all --workdir=runs/all              every mechanism and form

Variant: `all`, and settings of the form base=small,seeds=3. `base` is a config file in configs/ (quick, small), `seeds` the
number of seeds a point; at least 3 are needed before a winner is named, and a learning rate for each, see learning_rate.py.

Hardware and time: those of the base config, seven times, or 58 times with `all`.
Expected: bytes_per_token equal to its formula in every row; every perplexity far below the unigram perplexity.
"""

from collections.abc import Iterator

from mla.commands import load_config
from mla.sweep.runs import Training, settings, with_seeds

MECHANISM = "config.model.mechanism"
PATTERNS = ("strided", "fixed_columns", "dilated", "big_bird")
STATES = ("retention", "lightning", "gated_linear", "mamba2", "delta", "gated_delta", "kimi_delta", "gated_delta_2")


def get_runs(variant: str = "") -> Iterator[Training]:
    chosen = settings(variant, all=False, base="quick", seeds=1)
    base = f"configs/{chosen['base']}.py"
    rank = load_config(f"{base}:mla").model.mechanism["mla"].kv_lora_rank

    def run(name: str, pattern: str, family: str, **fields: object) -> Training:
        own = {f"{MECHANISM}.{field}": value for field, value in fields.items()}
        return Training(name, f"{base}:{pattern}", own, family)

    runs = [
        run("mha", "mha", "head sharing"),
        run("gqa", "gqa", "head sharing"),
        run("mqa", "mqa", "head sharing"),
        run("mla", "mla", "latent rank"),
        run("mla-half-rank", "mla", "latent rank", kv_lora_rank=rank // 2),
        run("sliding_window", "sliding_window", "window"),
        run("linear", "linear", "constant state"),
    ]
    if chosen["all"]:
        layers = load_config(f"{base}:mla").model.num_layers
        lower = ",".join(["sliding_window", "gqa"] * (layers // 4))
        upper = ",".join([f"sliding_window@{layers // 2 - 2}", f"gqa@{layers // 2 - 1}"] * (layers // 4))
        last = f"{lower},{upper}"  # the upper half reads the last layer of its kind
        runs += [
            run("grouped_latent", "grouped_latent", "latents"),
            run("grouped_latent-q", "grouped_latent", "latents", q_lora_rank=2 * rank, group_queries=True),
            run("low_rank_blocks-2", "low_rank_blocks", "latents", branches=2),
            run("low_rank_blocks-4", "low_rank_blocks", "latents", branches=4),
            run("mla-nope", "mla", "latents", qk_rope_head_dim=0),
            # The latents of 2505.21487 are 4 d_h wide, twice the base configs' on the quick set.
            run("mla-double-rank", "mla", "latent rank", kv_lora_rank=2 * rank),
            run("grouped_latent-double", "grouped_latent", "latents", kv_lora_rank=2 * rank),
            run("low_rank_blocks-2-double", "low_rank_blocks", "latents", branches=2, kv_lora_rank=2 * rank),
            run("low_rank_blocks-4-double", "low_rank_blocks", "latents", branches=4, kv_lora_rank=2 * rank),
            run("temporal_latent", "temporal_latent", "latents"),
            run("temporal_latent-4", "temporal_latent", "latents", stride=4),
            run("compressed", "compressed", "latents"),
            run("grouped_tied", "grouped_tied", "tied and factored"),
            run("tensor_product", "tensor_product", "tied and factored"),
            run("tensor_product-kv", "tensor_product", "tied and factored", rank_q=0),
            run("multi_matrix", "multi_matrix", "tied and factored"),
            run("multi_matrix_kr", "multi_matrix_kr", "tied and factored"),
            run("slim", "slim", "tied and factored"),
            run("mha-nope", "mha", "modified heads", rope_fraction=0.0),
            run("mha-rope-half", "mha", "modified heads", rope_fraction=0.5),
            run("gqa-sink", "gqa", "modified heads", sink=True),
            run("gqa-soft_cap", "gqa", "modified heads", soft_cap=50.0),
            run("gqa-gate", "gqa", "modified heads", output_gate=True),
            run("local-global", "sliding_window*3,gqa", "window", **{"gqa.rope_theta": 1e6}),
            run("chunked-global", "chunked*3,chunked_global", "window"),
            run("compressive", "compressive", "window"),
            run("gqa-cla2", "gqa/2", "across layers"),
            run("mla-cla2", "mla/2", "across layers"),
            run("last-half-reads", last, "across layers"),
            run("yoco", "yoco", "across layers"),
            run("yoco-linear", "yoco+linear", "across layers"),
            run("block_mixture", "block_mixture", "sparse"),
            run("deepseek_sparse", "deepseek_sparse", "sparse"),
            run("native_sparse", "native_sparse", "sparse"),
            run("compressed_sparse", "compressed_sparse", "sparse"),
            *(run(name, name, "sparse") for name in PATTERNS),
            run("linear-rmsnorm", "linear", "constant state", normalise="rmsnorm"),
            *(run(name, name, "constant state") for name in STATES),
            run("delta-negative", "delta", "constant state", negative_eigenvalues=True),
            run("kimi_delta-bounded", "kimi_delta", "constant state", gate_bound=5.0),
            run("convolution-gqa", "short_convolution,gqa", "constant state"),
        ]
    return with_seeds(runs, chosen["seeds"])
