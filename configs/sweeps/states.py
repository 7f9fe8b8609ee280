"""Constant states beside MLA, each at the learning rate that its curve names, three seeds.

    python sweep.py --config=configs/sweeps/states.py --workdir=runs/states

The rates are the best of four in results/states_learning_rate; all but linear's are at the upper edge of that grid.

Variant: settings of the form seeds=3.

Hardware and time: thirty runs of configs/quick.py; three minutes with --jobs=16 on an H200 and 16 cores.
Expected: no loss that is not finite; mean losses from 1.450 (mamba2) to 2.345 (linear), mla 2.057 (results/states).
"""

from collections.abc import Iterator

from mla.sweep.runs import Training, settings, with_seeds

RATES = {
    **dict.fromkeys(("mla", "kimi_delta", "delta", "gated_delta", "gated_delta_2"), 0.006),
    **dict.fromkeys(("mamba2", "retention", "lightning", "gated_linear"), 0.006),
    "linear": 0.003,
}


def get_runs(variant: str = "") -> Iterator[Training]:
    chosen = settings(variant, seeds=3)
    fields = {"config.optimizer.learning_rate": 0.0, "config.eval.decode_tokens": 0}
    runs = [
        Training(name, f"configs/quick.py:{name}", fields | {"config.optimizer.learning_rate": rate}, name)
        for name, rate in RATES.items()
    ]
    return with_seeds(runs, chosen["seeds"])
