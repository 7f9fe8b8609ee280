"""Cache tricks on finished runs: {model} x {codec, eviction, merging, some of both}; nothing is trained.

    make compare
    python sweep.py --config=configs/sweeps/cache_grid.py --workdir=runs/cache_grid

Variant: settings of the form workdirs=runs/a+runs/b,tokens=16384,budgets=32+64. `workdirs` are folders of training runs, by
default mha, gqa, mla and sliding_window of `make compare`; `tokens` how many are predicted; `budgets` the entries of a layer
that eviction leaves; `speed` measures decode speed too.

Hardware and time: about 20 seconds a point on two CPU cores, some 50 points a model.
Expected: int8 within 0.002 nats; bytes equal to their formula in every row.
"""

from collections.abc import Iterator

from mla import config as configs
from mla.attention.softmax import SoftmaxConfig
from mla.evaluation.sweep import Run, settings
from mla.training.workdir import read_config

DEFAULT = "+".join(f"runs/compare/{name}" for name in ("mha", "gqa", "mla", "sliding_window"))
CODECS = {
    "floats": ["bf16", "fp8"],
    "integers": ["int8", "int4", "int2"],
    "hadamard + integers": ["hadamard+int4", "hadamard+int2"],
    "kivi": ["kivi4:32", "kivi2:32"],
    "kvquant": ["kvquant4:32", "kvquant2:32"],
}
POLICIES = {
    "streaming": "streaming",
    "window, no sinks": "streaming:sinks=0",
    "heavy_hitter": "heavy_hitter",
    "tova": "tova",
    "snapkv": "snapkv:window=8",
    "pyramid": "pyramid:window=8",
    "l2_norm": "l2_norm",
    "value_aware": "value_aware:sinks=4",
    "fastgen": "fastgen",
    "expected_attention": "expected_attention",
    "random": "random",
    "random + sinks + recent": "random:sinks=4,recent=8",
}
BOTH = [("int8", "tova"), ("int4", "streaming")]


def get_runs(variant: str = "") -> Iterator[Run]:
    chosen = settings(variant, workdirs=DEFAULT, tokens=16384, budgets="32+64", speed=False)
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
        for family, codecs in CODECS.items():
            for codec in codecs:
                yield run(codec, family, codec=codec)
        if config.model.pattern == ("mla",):
            yield run("latent_fp8", "FlashMLA's layout", codec="latent_fp8")
        for family, policy in POLICIES.items():
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
