"""DeepSeek sparse attention from a trained MLA model: indexers learn alone, then attention is sparse and everything learns.

    python train.py --config=configs/quick.py:mla --workdir=runs/compare/mla        or `make compare`
    python sweep.py --config=configs/sweeps/deepseek_sparse.py --workdir=runs/deepseek_sparse

Variant: settings of the form runs=runs/compare,top_k=16. `runs` is the folder that holds the finished mla; `warmup` the
steps in which attention is dense and all but the indexers is frozen, `steps` those after them, each with a cycle of the
learning rate of its own; `top_k` the tokens that a query reads, of 256.

    switch-trained, switch-random    the trained model as it is, read by indexers after `warmup` steps, and by untrained ones
    sparse-trained, sparse-random    those after `steps` more, in which the model has learned to do with what it reads
    mla-continued                    the trained model after `warmup` and `steps` more of dense attention
    mla-continued-short              after `steps` more: as many as sparse-trained's main model has learned for

Hardware: 2 CPU cores. Time: about two minutes a point.
"""

from collections.abc import Iterator

from mla.commands import load_config
from mla.model import sizes
from mla.sweep.runs import Training, settings


def get_runs(variant: str = "") -> Iterator[Training]:
    chosen = settings(variant, runs="runs/compare", top_k=16, warmup=100, steps=100, learning_rate=3e-3)
    warmup, total = chosen["warmup"], chosen["warmup"] + chosen["steps"]
    # Indexers come on top: the MLPs are those of the trained model.
    width = sizes(load_config("configs/quick.py:mla"), vocab_size=0).mlp_width

    def run(name: str, pattern: str, family: str, steps: int, switch: int = 0, **mechanism: object) -> Training:
        fields: dict[str, object] = {
            "config.init_from": f"{chosen['runs']}/mla",
            "config.steps": steps,
            "config.model.solved_mlp_width": width,
            "config.optimizer.learning_rate": chosen["learning_rate"],
            "config.optimizer.warmup_steps": 5,
        }
        fields |= {"config.optimizer.restart.at": (switch,)} if switch else {}
        own = {f"config.model.mechanism.{field}": value for field, value in mechanism.items()}
        return Training(name, f"configs/quick.py:{pattern}", fields | own, family)

    def indexed(name: str, family: str, steps: int, switch: int = 0, **mechanism: object) -> Training:
        start = {"top_k": chosen["top_k"], "dense_steps": 1.0, "freeze": True}
        return run(name, "deepseek_sparse", family, steps, switch, **start | mechanism)

    yield indexed("switch-trained", "at the switch", warmup)
    yield indexed("switch-random", "at the switch", warmup, train_index=False)
    yield indexed("sparse-trained", "sparse", total, warmup)
    yield indexed("sparse-random", "sparse", total, warmup, train_index=False)
    yield run("mla-continued", "mla", "dense", total, warmup)
    yield run("mla-continued-short", "mla", "dense", chosen["steps"])
