"""Evaluates a trained model: loss by the parallel form and through its cache, cache bytes, decode speed.

    python eval.py --workdir=runs/mla [--config.eval.field=value ...] [--out=FILE]
    python eval.py --workdir=runs/mla --config.data.corpus=notes.txt --config.eval.split=all
    python eval.py --workdir=runs/mla --config.eval.context=1024 --config.eval.yarn.factor=4
    python eval.py --workdir=runs/mha --as_mechanism=slim
    python eval.py --workdir=runs/mla --prompt="def main(" [--sample_tokens=200] [--temperature=0.8]

Writes eval.json into the workdir, or FILE instead. What differs from the run's own evaluation (another corpus, split or
context, YaRN, a trick on the cache) goes to a file of its own name, such as eval-context=1024-yarn.factor=4.0.json. Another
corpus is read by the run's tokenizer. With --as_mechanism the trained model is turned into another mechanism that computes
the same, and the file is eval-NAME.json. With --prompt it only prints text.
"""

from __future__ import annotations

from absl import flags

from mla import commands
from mla.errors import UserError

WORKDIR = commands.define_workdir("folder of a training run")
CONFIG = commands.define_config_from_workdir(WORKDIR)
OUT = flags.DEFINE_string(
    "out", "", "file to write instead of one in the workdir that is named after what differs from the run's config"
)
AS_MECHANISM = flags.DEFINE_string("as_mechanism", "", "evaluate the trained model as this mechanism: mha as slim")
PROMPT = flags.DEFINE_string("prompt", None, "print this text and what the model writes after it, and nothing else")
SAMPLE_TOKENS = flags.DEFINE_integer("sample_tokens", 200, "tokens to write after --prompt")
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "of sampling; 0: always the likeliest token")


def main() -> None:
    from mla.evaluation.evaluate import evaluate, sample_text

    if PROMPT.value is not None and (AS_MECHANISM.value or OUT.value):
        raise UserError("--prompt prints text and evaluates nothing: leave out --as_mechanism and --out")
    if PROMPT.value is None:
        evaluate(WORKDIR.value, CONFIG.value, OUT.value, AS_MECHANISM.value)
    else:
        print(sample_text(WORKDIR.value, CONFIG.value, PROMPT.value, SAMPLE_TOKENS.value, TEMPERATURE.value))


if __name__ == "__main__":
    commands.run(main, CONFIG)
