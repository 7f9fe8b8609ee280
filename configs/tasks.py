"""Synthetic tasks: small models from scratch to what they can look up, with measured bytes, in minutes on a CPU.

    python train.py --config=configs/tasks.py:mqar+mla --workdir=runs/tasks/mla
    python eval.py --workdir=runs/tasks/mla --config.eval.cache.codec=int8

Variant: TASK+MECHANISM or TASK+PATTERN, such as mqar+gqa or mqar+sliding_window,mha; docs/tasks.md has the tasks. Sizes are
set in the corpus, --config.data.corpus=mqar:mixture=64x4+128x16, and for tests in --config.eval.task.

Hardware: one or two CPU cores.
Time and expected result: see docs/tasks.md and results/mqar.
"""

from mla.config import Config, create, labels, parse_pattern
from mla.data import tasks
from mla.errors import UserError, nearest

# Two layers look a key up by position first, by content second: MLA needs as much RoPE as MHA has.
LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 32, "v_head_dim": 32}
SETTINGS = {
    "gqa": {"num_kv_heads": 1},
    "mla": LATENT,
    "grouped_latent": LATENT,
    "temporal_latent": LATENT,
    "deepseek_sparse": LATENT | {"top_k": 32, "index_head_dim": 32},
    "sliding_window": {"window": 32},
    "compressed": {"window": 16, "qk_rope_head_dim": 16, "out_groups": 2, "head_dim": 32, "stride": 4},
    "mamba2": {"state_size": 32, "head_dim": 32},
}


def get_config(variant: str = "mqar+mla") -> Config:
    name, plus, pattern = variant.partition("+")
    if name not in tasks.REGISTRY or not plus:
        known = nearest(name, tasks.REGISTRY)
        raise UserError(f"config variant {variant!r}: write TASK+MECHANISM, such as mqar+mla; {known}")
    mixture = tasks.parse(name)
    return create(
        pattern,
        {label: SETTINGS.get(of, {}) for label, of in labels(parse_pattern(pattern)).items()},
        steps=2000,
        batch_size=64,
        context=mixture.length,
        data={"corpus": name, "tokenizer": f"ids:{mixture.vocab_size}"},
        model={"d_model": 64, "num_layers": 2, "num_heads": 2, "mlp_multiple": 1},
        optimizer={"learning_rate": 3e-3, "warmup_steps": 50, "weight_decay": 0.01, "final_fraction": 1.0},
        eval={"decode_tokens": 0},
        mesh={"data": -1, "host_devices": 1},
        checkpoint={"every_steps": 500},
        log={"every_steps": 100},
    )
