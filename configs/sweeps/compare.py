"""The quick set: every mechanism of the main job once, on the same tokens, parameters matched.

    python sweep.py --config=configs/sweeps/compare.py --workdir=runs/compare

Variant: settings of the form base=small,seeds=3. `base` is a config file in configs/ (quick, small), `seeds` the number of
seeds a point; at least 3 are needed before a winner is named, and a learning rate for each, see learning_rate.py.

Hardware and time: those of the base config, seven times.
Expected: bytes_per_token equal to its formula in every row; every perplexity far below the unigram perplexity.
"""

from collections.abc import Iterator

from mla.commands import load_config
from mla.evaluation.sweep import Run, settings, with_seeds


def get_runs(variant: str = "") -> Iterator[Run]:
    chosen = settings(variant, base="quick", seeds=1)
    base = f"configs/{chosen['base']}.py"
    rank = load_config(f"{base}:mla").model.mechanism.kv_lora_rank
    runs = [
        Run("mha", f"{base}:mha", family="head sharing"),
        Run("gqa", f"{base}:gqa", family="head sharing"),
        Run("mqa", f"{base}:mqa", family="head sharing"),
        Run("mla", f"{base}:mla", family="latent rank"),
        Run("mla-half-rank", f"{base}:mla", {"config.model.mechanism.kv_lora_rank": rank // 2}, "latent rank"),
        Run("sliding_window", f"{base}:sliding_window", family="window"),
        Run("linear", f"{base}:linear", family="constant state"),
    ]
    return with_seeds(runs, chosen["seeds"])
