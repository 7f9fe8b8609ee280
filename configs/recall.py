"""Associative recall at two layers."""

from mla.config import Config, create, labels, parse_pattern

SETTINGS = {
    "gqa": {"num_kv_heads": 2},
    "mla": {"kv_lora_rank": 32, "qk_rope_head_dim": 16},
    "sliding_window": {"window": 16},
}


def get_config(variant: str = "mla") -> Config:
    return create(
        variant,
        {label: SETTINGS.get(name, {}) for label, name in labels(parse_pattern(variant)).items()},
        steps=1000,
        batch_size=64,
        context=128,
        data={"corpus": "recall", "tokenizer": "bytes"},
        model={"d_model": 64, "num_layers": 2, "num_heads": 4},
        optimizer={"learning_rate": 3e-3, "warmup_steps": 50, "weight_decay": 0.01},
        mesh={"data": -1, "host_devices": 2},
        checkpoint={"every_steps": 250},
        log={"every_steps": 50},
    )
