"""Cache tricks on finished runs: {model} x {codec, eviction, merging, some of both}; nothing is trained.

    make compare
    python sweep.py --config=configs/sweeps/cache_grid.py --workdir=runs/cache_grid

Variant: settings of the form workdirs=runs/a+runs/b,tokens=16384,budgets=32+64. `workdirs` are folders of training runs, by
default mha, gqa, mla and sliding_window of `make compare`; `tokens` how many are predicted; `budgets` the entries of a layer
that eviction leaves; `window` the queries that vote and the recent entries that are protected; `residual` the tokens that
KIVI leaves raw; `cross` adds every codec of a token by itself under every policy, where otherwise two pairs stand for them;
`speed` measures decode speed too. Models of configs/recall.py have prompts of 19 tokens: for them
workdirs=runs/recall/mha+runs/recall/mla,tokens=0,budgets=8+12,window=3,residual=8.
Constant states are coded too.

Hardware and time: about 20 seconds a point on two CPU cores, some 50 points a model.
Expected: int8 within 0.002 nats; bytes equal to their formula in every row.
"""

from collections.abc import Iterator

from mla.cache.merged import MiniCache
from mla.evaluation.cache_bytes import abstract_model
from mla.paths import expand
from mla.sweep.runs import Evaluation, settings
from mla.workdir import read_config

DEFAULT = "+".join(f"runs/compare/{name}" for name in ("mha", "gqa", "mla", "sliding_window"))
BOTH = [("int8", "tova"), ("int4", "streaming")]
STATES = ("bf16", "fp8", "int8", "int4", "hadamard+int4")  # codecs of a constant state between calls
EACH_TOKEN = ("floats", "integers", "hadamard + integers")  # codecs of a token by itself: rings and evicted caches take them


def codecs(residual: int) -> dict[str, list[str]]:
    return {
        "floats": ["bf16", "fp8"],
        "integers": ["int8", "int4", "int2"],
        "hadamard + integers": ["hadamard+int4", "hadamard+int2"],
        "kivi": [f"kivi4:{residual}", f"kivi2:{residual}"],
        "kvquant": [f"kvquant4:{residual}", f"kvquant2:{residual}"],
    }


def policies(window: int) -> dict[str, str]:
    return {
        "streaming": "streaming",
        "window, no sinks": "streaming:sinks=0",
        "heavy_hitter": "heavy_hitter",
        "tova": "tova",
        "snapkv": f"snapkv:window={window}",
        "pyramid": f"pyramid:window={window}",
        "l2_norm": "l2_norm",
        "value_aware": "value_aware:sinks=4",
        "fastgen": "fastgen",
        "expected_attention": "expected_attention",
        "random": "random",
        "random + sinks + recent": f"random:sinks=4,recent={window}",
    }


def get_runs(variant: str = "") -> Iterator[Evaluation]:
    chosen = settings(
        variant, workdirs=DEFAULT, tokens=16384, budgets="32+64", window=8, residual=32, cross=False, speed=False
    )
    budgets = [int(budget) for budget in chosen["budgets"].split("+")]
    for given in chosen["workdirs"].split("+"):
        workdir = expand(given, "sweep variant workdirs")
        config = read_config(workdir)
        fields = {"config.eval.tokens": chosen["tokens"]}
        if not chosen["speed"]:
            fields["config.eval.decode_tokens"] = 0

        def run(name: str, family: str, workdir: str = workdir, fields: dict = fields, **cache: object) -> Evaluation:
            own = {f"config.eval.cache.{field}": value for field, value in cache.items()}
            folder = workdir.rstrip("/").rpartition("/")[2]
            plain = "".join(c if c.isalnum() or c in "._=+-" else "_" for c in name)
            return Evaluation(f"{folder}-{plain}", workdir, {**fields, **own}, family)

        yield run("none", "as trained")
        model = abstract_model(config, 257)
        if any("state" in block.mixer.states() for block in model.blocks):
            for codec in STATES:
                yield run(f"state={codec}", "states", codec=f"state={codec}")
        growing, layers = model.evicting(), range(config.model.num_layers)
        if not growing:
            continue  # windows, dmc: beside the others as they are
        kinds = codecs(chosen["residual"])
        if any(model.sources[layer] is None and layer not in growing for layer in layers):
            kinds = {kind: kinds[kind] for kind in EACH_TOKEN}
        for family, names in kinds.items():
            for codec in names:
                yield run(codec, family, codec=codec)
        if config.model.pattern == ("mla",):
            yield run("latent_fp8", "FlashMLA's layout", codec="latent_fp8")
        chosen_policies = policies(chosen["window"])
        pairs = BOTH
        if chosen["cross"]:
            pairs = [(codec, policy) for kind in EACH_TOKEN for codec in kinds[kind] for policy in chosen_policies.values()]
        for budget in budgets:
            for family, policy in chosen_policies.items():
                yield run(f"{policy}-{budget}", family, evict=policy, budget_tokens=budget)
            for codec, policy in pairs:
                both = f"{policy} + {codec}"
                yield run(f"{codec}-{policy}-{budget}", both, codec=codec, evict=policy, budget_tokens=budget)
            if config.model.pattern in (("mha",), ("gqa",)):
                yield run(f"cam-{budget}", "cam", evict="cam", budget_tokens=budget)
        start = len(layers) // 2 if len(layers) > 2 else 0
        merged = [layer for lower in MiniCache(start=start).pairs(len(layers)) for layer in (lower, lower + 1)]
        if merged and set(merged) <= set(growing):
            yield run("minicache", "minicache", merge=f"minicache:start={start}")
