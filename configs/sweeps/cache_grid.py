"""Cache tricks on finished runs: {model} x {codec, eviction, merging, some of both}; nothing is trained.

    make compare
    python sweep.py --config=configs/sweeps/cache_grid.py --workdir=runs/cache_grid

Variant: settings of the form workdirs=runs/a+runs/b,tokens=16384,budgets=32+64. `workdirs` are folders of training runs, by
default mha, gqa, mla and sliding_window of `make compare`; `tokens` how many are predicted; `budgets` the entries of a layer
that eviction leaves; `window` the queries that vote and the recent entries that are protected; `residual` the tokens that
KIVI leaves raw; `speed` measures decode speed too. Models of configs/recall.py have prompts of 19 tokens: for them
workdirs=runs/recall/mha+runs/recall/mla,tokens=0,budgets=8+12,window=3,residual=8.

Hardware and time: about 20 seconds a point on two CPU cores, some 50 points a model.
Expected: int8 within 0.002 nats; bytes equal to their formula in every row.
"""

from collections.abc import Iterator

from mla import config as configs
from mla.attention.softmax import SoftmaxConfig
from mla.evaluation.sweep import Run, settings
from mla.training.workdir import read_config

DEFAULT = "+".join(f"runs/compare/{name}" for name in ("mha", "gqa", "mla", "sliding_window"))
BOTH = [("int8", "tova"), ("int4", "streaming")]


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


def get_runs(variant: str = "") -> Iterator[Run]:
    chosen = settings(variant, workdirs=DEFAULT, tokens=16384, budgets="32+64", window=8, residual=32, speed=False)
    budgets = [int(budget) for budget in chosen["budgets"].split("+")]
    for workdir in chosen["workdirs"].split("+"):
        config = read_config(workdir)
        fields = {"config.eval.tokens": chosen["tokens"]}
        if not chosen["speed"]:
            fields["config.eval.decode_tokens"] = 0

        def run(name: str, family: str, workdir: str = workdir, fields: dict = fields, **cache: object) -> Run:
            own = {f"config.eval.cache.{field}": value for field, value in cache.items()}
            folder = workdir.rstrip("/").rpartition("/")[2]
            plain = "".join(c if c.isalnum() or c in "._=+-" else "_" for c in name)
            return Run(f"{folder}-{plain}", "", {**fields, **own}, family, workdir)

        yield run("none", "as trained")
        layers = [layer.config for layer in configs.layers(config.model)]
        if not all(isinstance(layer, SoftmaxConfig) and layer.visible() is None for layer in layers):
            continue  # windows and states: shown beside the others as they are
        for family, names in codecs(chosen["residual"]).items():
            for codec in names:
                yield run(codec, family, codec=codec)
        if config.model.pattern == ("mla",):
            yield run("latent_fp8", "FlashMLA's layout", codec="latent_fp8")
        for family, policy in policies(chosen["window"]).items():
            for budget in budgets:
                yield run(f"{policy}-{budget}", family, evict=policy, budget_tokens=budget)
        for codec, policy in BOTH:
            for budget in budgets:
                yield run(
                    f"{codec}-{policy}-{budget}", f"{policy} + {codec}", codec=codec, evict=policy, budget_tokens=budget
                )
        yield run("minicache", "minicache", merge="minicache")
        if config.model.pattern in (("mha",), ("gqa",)):
            for budget in budgets:
                yield run(f"cam-{budget}", "cam", evict="cam", budget_tokens=budget)
