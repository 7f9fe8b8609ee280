"""Evaluates a trained model: loss by the parallel form and through its cache, cache bytes, decode speed.

    python eval.py --workdir=runs/mla [--config.eval.field=value ...] [--out=FILE]
    python eval.py --workdir=runs/mla --config.data.corpus=notes.txt --config.eval.split=all
    python eval.py --workdir=runs/mla --config.eval.context=1024 --config.eval.yarn.factor=4
    python eval.py --workdir=runs/mha --as_mechanism=slim
    python eval.py --workdir=runs/mla --prompt="def main(" [--sample_tokens=200] [--temperature=0.8] [--top_p=0.9] [--seed=1]
    python eval.py --workdir=runs/mla --prompt_file=FILE

Writes eval.json into the workdir, or FILE instead. What differs from the run's own evaluation (another corpus, split or
context, YaRN, a trick on the cache) goes to a file of its own name, such as eval-context=1024-yarn.factor=4.0.json. Another
corpus is read by the run's tokenizer. With --as_mechanism the trained model is turned into another mechanism that computes
the same, and the file is eval-NAME.json. FILE may be anywhere but in the place of a run's own eval.json. With --prompt it
only prints text.

Where the package is installed, `mla eval` is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from absl import flags

from mla import commands, processes
from mla.errors import UserError
from mla.evaluation.evaluate import evaluate, sample_text
from mla.evaluation.sample import Sampling
from mla.interop.convert import known

WORKDIR = commands.define_workdir("folder of a training run")
CONFIG = commands.define_config_from_workdir(WORKDIR)
OUT = commands.define_path(
    "out", "", "file to write instead of one in the workdir that is named after what differs from the run's config"
)
AS_MECHANISM = flags.DEFINE_string("as_mechanism", "", f"evaluate the trained model as another mechanism: {known()}")
PROMPT = flags.DEFINE_string("prompt", None, "print this text and what the model writes after it, and nothing else")
PROMPT_FILE = commands.define_path("prompt_file", None, "as --prompt, from a file of UTF-8 text to its last byte; -: stdin")
SAMPLING: dict[str, flags.FlagHolder[Any]] = {
    "tokens": flags.DEFINE_integer("sample_tokens", 200, "tokens to write after the prompt"),
    "samples": flags.DEFINE_integer("num_samples", 1, "texts to write, each after a line with its number"),
    "seed": flags.DEFINE_integer("seed", None, "of sampling; by default the run's own"),
    "temperature": flags.DEFINE_float("temperature", 0.8, "of sampling; 0: always the likeliest token"),
    "top_k": flags.DEFINE_integer("top_k", 0, "draw among so many of the likeliest tokens; 0: all"),
    "top_p": flags.DEFINE_float("top_p", 1.0, "draw among the likeliest tokens that together reach this probability"),
}


def main() -> None:
    prompt = commands.text_or_file(PROMPT, PROMPT_FILE)
    if prompt is None:
        for flag in SAMPLING.values():
            if flag.present:
                raise UserError(f"--{flag.name} has no effect without --prompt or --prompt_file")
        evaluate(WORKDIR.value, CONFIG.value, OUT.value, AS_MECHANISM.value)
        return
    if AS_MECHANISM.value or OUT.value:
        raise UserError("--prompt prints text and evaluates nothing: leave out --as_mechanism and --out")
    chosen = {name: flag.value for name, flag in SAMPLING.items()}
    chosen["seed"] = CONFIG.value.seed if chosen["seed"] is None else chosen["seed"]
    texts = sample_text(WORKDIR.value, CONFIG.value, prompt, Sampling(**chosen))
    for number, text in enumerate(texts, 1) if processes.primary() else ():
        if len(texts) > 1:
            print(f"----- sample {number} of {len(texts)}")
        print(text)


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the program on a command line, by default that of this process, and exits with its status."""
    commands.run(main, CONFIG, argv=argv)
