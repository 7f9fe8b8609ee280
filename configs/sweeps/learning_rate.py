"""The peak learning rate of each mechanism: the comparison is fair only when each has its own.

    python sweep.py --config=configs/sweeps/learning_rate.py --workdir=runs/learning_rate

Variant: settings of the form base=small,mechanisms=mla+gqa/2,seeds=3; see compare.py.

Hardware and time: those of the base config, four times a mechanism.
Expected: report.md names the best rate of each mechanism, and says where it is at the edge of the grid.
"""

from collections.abc import Iterator

from mla.commands import load_config
from mla.sweep.runs import Training, settings, with_seeds

FACTORS = (0.25, 0.5, 1, 2)  # of the base config's rate


def get_runs(variant: str = "") -> Iterator[Training]:
    chosen = settings(variant, base="quick", seeds=1, mechanisms="mha+gqa+mqa+mla+sliding_window+linear")
    runs = []
    for name in chosen["mechanisms"].split("+"):
        spec = f"configs/{chosen['base']}.py:{name}"
        peak = load_config(spec).optimizer.learning_rate
        for factor in FACTORS:
            rate = float(f"{peak * factor:.6g}")
            point = f"{name.replace('/', '-cla')}-lr{rate:g}"
            runs.append(Training(point, spec, {"config.optimizer.learning_rate": rate}, name))
    return with_seeds(runs, chosen["seeds"])
