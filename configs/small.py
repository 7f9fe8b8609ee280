"""A 124M-class model (d 768, 12 layers, 12 heads, vocabulary 50,304) for one accelerator.

    python train.py --config=configs/small.py:mla --workdir=runs/small/mla

The variant is a mechanism or a layer pattern, as in configs/quick.py. The default corpus needs no download, and these
131 M tokens go over it dozens of times; for a model worth using, name a larger one:

    --config.data.corpus=HuggingFaceFW/fineweb-edu:sample-10BT

Hardware: one accelerator with 40 GB or more; with less, set optimizer.accumulate_steps=4 (micro-batches of 16 sequences).
Time and expected result: on an H200 mha trains on 0.3 M tokens a second and mla on 0.15 M, 7 and 14 minutes for these steps
(results/h200); after 100 of them the loss is near 5.4 on novels. How far all of them get was not measured.
"""

from mla.config import Config, create, labels, parse_pattern

# Elements a token and layer: mha 1,536, gqa 512, mla and its kin 288, multi_matrix 256, mqa 128.
LATENT = {"kv_lora_rank": 256, "qk_rope_head_dim": 32}
VECTORS = {"head_dim": 128, "q_lora_rank": 384, "out_rank": 192}  # V4's, at this width
SETTINGS = {
    "gqa": {"num_kv_heads": 4},
    "dmc": {"num_kv_heads": 4},
    "mla": LATENT,
    "grouped_latent": LATENT,
    "low_rank_blocks": LATENT,
    "temporal_latent": LATENT,
    "grouped_tied": {"num_kv_heads": 4},
    "multi_matrix": {"head_dim": 128, "q_lora_rank": 512},
    "multi_matrix_kr": {"head_dim": 128, "q_lora_rank": 512},
    "sliding_window": {"window": 256},
    "chunked": {"chunk": 256},
    "chunked_global": {"temperature_floor": 256},
    "compressed": VECTORS,
    "compressed_sparse": VECTORS,
    "block_mixture": {"num_kv_heads": 4},
    "deepseek_sparse": LATENT,
    "native_sparse": {"num_kv_heads": 4},
    "strided": {"num_kv_heads": 4},
    "fixed_columns": {"num_kv_heads": 4},
    "dilated": {"num_kv_heads": 4, "tokens_read": 128},
    "big_bird": {"num_kv_heads": 4},
    # Heads of the papers' sizes: 128 channels in the delta family, 256 and 512 in retention.
    "retention": {"num_heads": 3},
    "gated_linear": {"num_heads": 4},
    "delta": {"num_heads": 6},
    "gated_delta": {"num_heads": 6},
    "kimi_delta": {"num_heads": 6},
    "gated_delta_2": {"num_heads": 6},
}


def get_config(variant: str = "mla") -> Config:
    return create(
        variant,
        {label: SETTINGS.get(name, {}) for label, name in labels(parse_pattern(variant)).items()},
        steps=2000,
        batch_size=64,
        context=1024,
        loss_chunk_tokens=8192,
        data={"corpus": "stdlib", "tokenizer": "bpe:50304"},
        model={
            "d_model": 768,
            "num_layers": 12,
            "num_heads": 12,
            "dtype": "bfloat16",
            "remat": "all_but_matmuls",
            "mlp_multiple": 64,
        },
        optimizer={"learning_rate": 6e-4, "warmup_steps": 200},
        checkpoint={"every_steps": 500},
        eval={"batch_size": 8},
    )
