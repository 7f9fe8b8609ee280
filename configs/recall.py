"""Associative recall with two layers: minutes on a CPU to a model that looks every key up, to see what happens to its cache.

    python train.py --config=configs/recall.py:mla --workdir=runs/recall/mla
    python eval.py --workdir=runs/recall/mla --config.eval.cache.codec=int4

The variant is a mechanism or a layer pattern, as in configs/quick.py. An episode has 48 tokens, 8 pairs in a prompt of 19;
harder ones need more room and more steps: --config.data.corpus=recall:PAIRS --config.context=6*PAIRS.

Hardware: 1 or 2 CPU cores.
Time: two minutes of training a model on two cores of an AMD EPYC with other jobs beside it.
Expected: recall of 1.000 for mha, gqa and mla, after some 300, 300 and 800 steps; 1.000 with int8 and int4 caches as well,
0.979, 0.958 and 0.918 with int2. sliding_window stays at chance, 0.125: few definitions are within its reach. One seed.
"""

from mla.config import Config, create, labels, parse_pattern

# Two layers look a key up by position first (the token before), by content second: MLA needs as much RoPE as MHA has.
SETTINGS = {
    "gqa": {"num_kv_heads": 1},
    "mla": {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 32, "v_head_dim": 32},
    "sliding_window": {"window": 8},  # of two layers: what is more than 14 tokens back is gone
}


def get_config(variant: str = "mla") -> Config:
    return create(
        variant,
        {label: SETTINGS.get(name, {}) for label, name in labels(parse_pattern(variant)).items()},
        steps=2000,
        batch_size=32,
        context=48,
        data={"corpus": "recall", "tokenizer": "bytes"},
        model={"d_model": 64, "num_layers": 2, "num_heads": 2, "rope_theta": 100.0},
        optimizer={"learning_rate": 5e-3, "warmup_steps": 50, "weight_decay": 0.01},
        mesh={"data": -1, "host_devices": 1},
        checkpoint={"every_steps": 500},
        log={"every_steps": 100},
    )
