"""Associative recall at two layers."""

from mla.config import Config, create, labels, parse_pattern

SETTINGS = {
    "gqa": {"num_kv_heads": 1},
    "mla": {"kv_lora_rank": 32, "qk_rope_head_dim": 16},
    "sliding_window": {"window": 8},
}


def get_config(variant: str = "mla") -> Config:
    return create(
        variant,
        {label: SETTINGS.get(name, {}) for label, name in labels(parse_pattern(variant)).items()},
        steps=1000,
        batch_size=32,
        context=48,
        data={"corpus": "recall", "tokenizer": "bytes"},
        model={"d_model": 64, "num_layers": 2, "num_heads": 2, "rope_theta": 100.0},
        optimizer={"learning_rate": 5e-3, "warmup_steps": 50, "weight_decay": 0.01},
        mesh={"data": -1, "host_devices": 2},
        checkpoint={"every_steps": 500},
        log={"every_steps": 100},
    )
