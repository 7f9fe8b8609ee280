"""Minutes on a laptop CPU, no download: small models that differ in their attention only.

    python train.py --config=configs/quick.py:mla --workdir=runs/quick/mla

The variant is a mechanism (mha, gqa, mla, grouped_latent, .. see REGISTRY in mla/attention/contract.py) or a layer pattern:
sliding_window*3,mha mixes them, gqa/2 shares one layer's cache between two, yoco between the upper half.

Hardware: 2 CPU cores, shown to JAX as 2 devices; other devices are used as they are found.
Time: about 45 seconds of training and 15 of evaluation a model on two cores of an AMD EPYC.
Expected: perplexity per byte 6.45 (mha), 6.06 (gqa), 5.94 (mqa), 7.00 (mla), 5.76 (sliding_window), 9.70 (linear), one seed,
614,400 tokens, on the library of Python 3.11.7; the unigram baseline is 21.16 (results/quick).
"""

from mla.config import Config, create, labels, parse_pattern

# Half the key heads for GQA; 80 elements a token for MLA and its kin; windows and chunks of a quarter of the context.
LATENT = {"kv_lora_rank": 64, "qk_rope_head_dim": 16}
VECTORS = {"head_dim": 32, "qk_rope_head_dim": 16, "q_lora_rank": 64, "out_rank": 32}
SETTINGS = {
    "gqa": {"num_kv_heads": 2},
    # A retrofit of 200 steps, not of thousands: its decisions start nearer to the threshold.
    "dmc": {"num_kv_heads": 2, "offset": 2.5, "fade": 0.05, "ramp": 0.5, "target_ratio": 2.5},
    "mla": LATENT,
    "grouped_latent": LATENT,
    "low_rank_blocks": LATENT,
    "temporal_latent": LATENT,
    "grouped_tied": {"num_kv_heads": 2},
    "sliding_window": {"window": 64},
    "chunked": {"chunk": 64},
    "chunked_global": {"temperature_floor": 64},
    "compressed": VECTORS,
    "compressed_sparse": VECTORS | {"index_head_dim": 16, "top_k": 16},
    "compressive": {"segment": 64, "memory": 64, "compressed_memory": 32},
    "block_mixture": {"block": 16},
    "deepseek_sparse": LATENT | {"top_k": 64},
    "native_sparse": {"pool_block": 8, "pool_stride": 4, "block": 16, "top_k": 4, "near": 32},
    # Blocks of the root of the context, and reads of about a quarter of it.
    "strided": {"stride": 16},
    "fixed_columns": {"stride": 32, "columns": 4},
    "dilated": {"tokens_read": 32},
    "big_bird": {"block": 16, "global_blocks": 1, "window_blocks": 2, "random_blocks": 1},
    "mamba2": {"state_size": 32},
}


def get_config(variant: str = "mla") -> Config:
    return create(
        variant,
        {label: SETTINGS.get(name, {}) for label, name in labels(parse_pattern(variant)).items()},
        steps=150,
        batch_size=16,
        context=256,
        data={"corpus": "stdlib", "tokenizer": "bytes", "validation_fraction": 0.01},
        model={"d_model": 128, "num_layers": 4, "num_heads": 4, "mlp_multiple": 1},
        optimizer={"learning_rate": 3e-3, "warmup_steps": 20},
        mesh={"data": -1, "host_devices": 2},
        checkpoint={"every_steps": 50},
    )
