"""A fair comparison as one command: each mechanism's learning rate is looked for, then fresh seeds are trained at it.

    python sweep.py --config=configs/sweeps/fair.py --workdir=runs/fair --jobs=2
    python -m mla report runs/fair/results.jsonl --against=mha,gqa

First each mechanism is trained at `factors` of the base config's rate with one seed. Where the best is at the edge of these
rates, the next one beyond it is tried too, up to `extensions` times. Then seeds 1 to `seeds` are trained at the best rate:
the seed that chose it, 0, is not among them, for the best of several equal runs is too good by about their deviation.

Variant: settings of the form base=small,mechanisms=mha+gqa,factors=0.5+1+2,extensions=3,seeds=5.

Hardware and time: those of the base config, for each mechanism as often as there are factors, seeds and extensions.
Expected: for each mechanism a learning rate inside its grid, for each difference from mha and gqa whether it is resolved.
"""

import math
from collections.abc import Iterator, Mapping

from mla.commands import load_config
from mla.errors import UserError
from mla.sweep.runs import Training, settings

# mechanism or pattern -> the line of the plot it is on
FAMILIES = {
    "mha": "head sharing",
    "gqa": "head sharing",
    "mqa": "head sharing",
    "mla": "latents",
    "grouped_latent": "latents",
    "sliding_window": "window",
    "gated_delta": "state",
}
RATE = "config.optimizer.learning_rate"


def get_runs(variant: str = "", losses: Mapping[str, float] = {}) -> Iterator[Training]:
    every = "mha+gqa+mla+grouped_latent+gated_delta+sliding_window"
    chosen = settings(variant, base="quick", mechanisms=every, factors="0.5+1+2", extensions=4, seeds=5)
    factors = sorted(map(float, chosen["factors"].split("+")))
    if len(factors) < 2:
        raise UserError(f"sweep variant factors={chosen['factors']}: at least two rates make a grid, such as 0.5+1+2")
    for pattern in chosen["mechanisms"].split("+"):
        spec = f"configs/{chosen['base']}.py:{pattern}"
        peak, point = load_config(spec).optimizer.learning_rate, pattern.replace("/", "-cla").replace(",", "-")

        def search(factor: float, spec: str = spec, peak: float = peak, point: str = point) -> Training:
            rate = _rate(peak, factor)
            return Training(f"{point}-lr{rate:g}", spec, {RATE: rate, "config.seed": 0}, point, search=True)

        tried = list(factors)
        while True:
            results = [losses.get(search(factor).name) for factor in tried]
            best = _next_or_best(tried, results, chosen["extensions"] - (len(tried) - len(factors)))
            if best is None or best in tried:
                break
            tried = sorted([*tried, best])
        for factor in tried:
            yield search(factor)
        if best is not None:
            for seed in range(1, chosen["seeds"] + 1):
                changes = {RATE: _rate(peak, best), "config.seed": seed}
                yield Training(point, spec, changes, FAMILIES.get(pattern, pattern), seed)


def _rate(peak: float, factor: float) -> float:
    return float(f"{peak * factor:.6g}")


def _next_or_best(factors: list[float], losses: list[float | None], left: int) -> float | None:
    """The best factor; where it is at the edge and `left` permits, the next one beyond; None: some loss is not known yet."""
    known = [loss for loss in losses if loss is not None]
    if len(known) < len(losses) or all(map(math.isinf, known)):
        return None
    at = known.index(min(known))
    if left > 0 and at == 0:
        return factors[0] ** 2 / factors[1]
    if left > 0 and at == len(factors) - 1:
        return factors[-1] ** 2 / factors[-2]
    return factors[at]
