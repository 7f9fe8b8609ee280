"""The hybrids that large models ship, at the sizes of configs/quick.py or configs/small.py.

    python train.py --config=configs/hybrids.py:kimi_linear --workdir=runs/hybrids/kimi_linear
    python train.py --config=configs/hybrids.py:kimi_linear+small --workdir=runs/hybrids/kimi_linear_small

Variant: one of HYBRIDS below, and the size.

    kimi_linear   three layers of Kimi Delta Attention, then MLA without rotation (2510.26692)
    kimi_k3       the same with a bounded decay and an output gate on MLA
    qwen3_next    three layers of gated DeltaNet, two value heads a key head, then GQA with an output gate, a quarter rotated
    deepseek_v4   two layers of windows, then by turns compressed sparse and heavily compressed attention, at V4's RoPE bases
    perceiver_ar  a first layer that reads the whole text, then layers within blocks of it, the latents (2202.07765)
    minimax_01    lightning attention, then GQA: 3:1 in the four layers of quick, 7:1 in sixteen of small (2501.08313)

Hardware: that of the base config. Time: not measured.
Expected: cache bytes a token a quarter of those of the base config's mla (or gqa) model, and states besides; deepseek_v4 has
windows and compressed entries. Losses were not measured.
"""

from mla.commands import load_config, override
from mla.config import Config
from mla.errors import UserError, nearest

# name -> pattern, and fields of its mechanisms
HYBRIDS = {
    "kimi_linear": ("kimi_delta*3,mla", {"mla.rope": False}),
    "kimi_k3": ("kimi_delta*3,mla", {"kimi_delta.gate_bound": 5.0, "mla.rope": False, "mla.output_gate": True}),
    "qwen3_next": ("gated_delta*3,gqa", {"gqa.output_gate": True, "gqa.rope_fraction": 0.25}),
    "minimax_01": ("lightning*3,gqa", {}),
    # The paper's latents are the last M positions of a text, and the loss is theirs; here blocks of M tile it, so that every
    # token has a loss, after 0 to M - 1 other latents, and nothing is computed twice in decoding. A quarter of each head's
    # channels is rotated and the MLPs are squared ReLUs, as there. Not as there: the first layer's queries go through no
    # linear map first and share their norm with its keys, no inputs are dropped in training, no output starts at zero.
    "perceiver_ar": (
        "mha,chunked*3",
        {
            "mha.rope_fraction": 0.25,
            "chunked.rope_fraction": 0.25,
            "chunked.unit_norm": False,
        },
    ),
    "deepseek_v4": (
        "local=compressed*2,compressed_sparse,compressed",
        {
            "local.stride": 0,
            "local.rope_theta": 1e4,
            "compressed_sparse.rope_theta": 1.6e5,
            "compressed.rope_theta": 1.6e5,
        },
    ),
}
HEADS = {"quick": 4, "small": 12}
KEY_HEADS = {"quick": 2, "small": 3}  # of qwen3_next, half of its heads


def get_config(variant: str = "kimi_linear") -> Config:
    name, _, size = variant.partition("+")
    size = size or "quick"
    if name not in HYBRIDS or size not in KEY_HEADS:
        known = [*HYBRIDS, *(f"{each}+small" for each in HYBRIDS)]
        raise UserError(f"configs/hybrids.py: no variant {variant!r}: {nearest(variant, known)}")
    pattern, fields = HYBRIDS[name]
    changes = {f"model.mechanism.{field}": value for field, value in fields.items()}
    if name == "qwen3_next":
        changes["model.mechanism.gated_delta.num_key_heads"] = KEY_HEADS[size]
    if (name, size) == ("minimax_01", "small"):
        pattern, changes["model.num_layers"] = "lightning*7,gqa", 16
    if (name, size) == ("deepseek_v4", "small"):  # twelve layers
        pattern += ",compressed_sparse,compressed" * 4
    if name == "perceiver_ar":
        changes |= {"model.mechanism.chunked.num_kv_heads": HEADS[size], "model.mlp": "relu2", "model.norm": "layernorm"}
        pattern += ",chunked" * (8 if size == "small" else 0)  # twelve layers
    config = load_config(f"configs/{size}.py:{pattern}")
    config.name = variant
    return override(config, [f"--config.{field}={value}" for field, value in changes.items()])
