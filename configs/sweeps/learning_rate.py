"""The peak learning rate of each mechanism: the comparison is fair only when each has its own.

    python sweep.py --config=configs/sweeps/learning_rate.py --workdir=runs/learning_rate

Variant: settings of the form base=small,mechanisms=mla+gqa/2,factors=2+4+8,seeds=3; see compare.py. `factors` are those of
the base config's rate.

Hardware and time: those of the base config, as many times a mechanism as there are factors.
Expected: report.md names the best rate of each mechanism, and says where it is at the edge of the grid.
"""

from collections.abc import Iterator

from mla.commands import load_config
from mla.sweep.runs import Training, settings, with_seeds


def get_runs(variant: str = "") -> Iterator[Training]:
    every = "mha+gqa+mqa+mla+sliding_window+linear"
    chosen = settings(variant, base="quick", seeds=1, mechanisms=every, factors="0.25+0.5+1+2")
    runs = []
    for name in chosen["mechanisms"].split("+"):
        spec = f"configs/{chosen['base']}.py:{name}"
        peak = load_config(spec).optimizer.learning_rate
        for factor in chosen["factors"].split("+"):
            rate = float(f"{peak * float(factor):.6g}")
            point = f"{name.replace('/', '-cla')}-lr{rate:g}"
            runs.append(Training(point, spec, {"config.optimizer.learning_rate": rate}, name))
    return with_seeds(runs, chosen["seeds"])
