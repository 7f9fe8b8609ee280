"""Dynamic memory compression: finished runs continued with and without it, for the same steps at the same learning rate.

    make compare
    python sweep.py --config=configs/sweeps/retrofit.py --workdir=runs/retrofit

Variant: settings of the form runs=runs/compare,steps=200. `runs` is the folder that holds the finished mha, gqa and mqa;
`learning_rate` and `steps` are those of the continuation.

Hardware: 2 CPU cores. Time: about two minutes a point.
Expected: more than twice fewer live bytes than gqa and mha, an array a head, at about 0.07 nats more than the same run
continued without compression (results/retrofit).
"""

from collections.abc import Iterator

from mla.commands import load_config
from mla.sweep.runs import Training, settings


def get_runs(variant: str = "") -> Iterator[Training]:
    chosen = settings(variant, runs="runs/compare", steps=200, learning_rate=3e-3)
    heads = load_config("configs/quick.py:mha").model.num_heads

    def run(name: str, pattern: str, start: str, family: str, **mechanism: object) -> Training:
        fields = {
            "config.init_from": f"{chosen['runs']}/{start}",
            "config.steps": chosen["steps"],
            "config.optimizer.learning_rate": chosen["learning_rate"],
            "config.optimizer.warmup_steps": 5,
        }
        own = {f"config.model.mechanism.{field}": value for field, value in mechanism.items()}
        return Training(name, f"configs/quick.py:{pattern}", fields | own, family)

    yield run("gqa-dmc", "dmc", "gqa", "compressed")
    yield run("mha-dmc", "dmc", "mha", "compressed", num_kv_heads=heads)
    for name in ("mha", "gqa", "mqa"):
        yield run(f"{name}-continued", name, name, "continued")
