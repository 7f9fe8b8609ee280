"""Fewer entries than tokens, or few of them read, beside caches that hold and read all: each at its own learning rate.

    python sweep.py --config=configs/sweeps/few_entries.py --workdir=runs/few_entries

The rates are the best of those in results/few_entries_learning_rate.

Variant: settings of the form seeds=3.

Hardware and time: thirty-nine runs of configs/quick.py, a minute or two each on two CPU cores.
Expected: no loss that is not finite; means of six from 1.830 (mha) to 2.077 (temporal_latent), in results/few_entries.
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


def get_runs(variant: str = "") -> Iterator[Training]:
    chosen = settings(variant, seeds=3)
    runs = [
        Training(name, f"configs/quick.py:{name}", {"config.optimizer.learning_rate": rate}, family)
        for name, rate, family in POINTS
    ]
    return with_seeds(runs, chosen["seeds"])
