"""How much a byte of state recalls: constant states of several sizes beside caches, on the same episodes.

    python sweep.py --config=configs/sweeps/state_recall.py --workdir=runs/state_recall

Models of configs/recall.py, two layers, with `pairs` keys and values in a prompt; heads of 8, 16 and 32 key channels, whose
states grow with their square. Each point has the better of `rates` learning rates to its name, so each is run.

Variant: settings of the form pairs=16,rates=0.005+0.002,seeds=1,steps=2000,mechanisms=delta+linear.

Hardware and time: those of configs/recall.py, some three minutes a run on two CPU cores, sixty runs.
Expected: recall near 1 for mla, which holds every pair, and for delta with 32 channels; at a rate of 0.002 mha has not
learned the task in 2,000 steps. See results/state_recall.
"""

from collections.abc import Iterator

from mla.sweep.runs import Training, settings, with_seeds

STATES = "linear+retention+lightning+gated_linear+mamba2+delta+gated_delta+kimi_delta+gated_delta_2"
CHANNELS = (8, 16, 32)  # of keys; values have as many, or twice as many where the mechanism has it so


def get_runs(variant: str = "") -> Iterator[Training]:
    chosen = settings(variant, pairs=16, rates="0.005+0.002", seeds=1, steps=2000, mechanisms=STATES)
    pairs, runs = int(chosen["pairs"]), []
    for rate in map(float, chosen["rates"].split("+")):
        task = {
            "config.data.corpus": f"recall:{pairs}",
            "config.context": 6 * pairs,
            "config.steps": int(chosen["steps"]),
            "config.optimizer.learning_rate": rate,
            "config.eval.decode_tokens": 0,
        }

        def run(name: str, size: str, rate: float = rate, task: dict[str, object] = task, **fields: object) -> Training:
            sizes = {f"config.model.mechanism.{field}": value for field, value in fields.items()}
            return Training(f"{name}{size}-lr{rate:g}", f"configs/recall.py:{name}", task | sizes, name)

        runs += [run("mha", ""), run("mla", "")]
        for name in chosen["mechanisms"].split("+"):
            for width in CHANNELS:
                # A state space shares its keys between heads of 32 channels; its state is as wide as keys are.
                fields = {"state_size": width, "head_dim": 32} if name == "mamba2" else {"head_dim": width}
                runs.append(run(name, f"-{width}", **fields))
    return with_seeds(runs, chosen["seeds"])
