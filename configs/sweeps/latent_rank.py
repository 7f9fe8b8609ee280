"""MLA over the rank of its latent and the width of its rotary key, with MHA, GQA and MQA as reference points.

    python sweep.py --config=configs/sweeps/latent_rank.py --workdir=runs/latent_rank

Variant: settings of the form base=small,seeds=3, as in compare.py.

Hardware and time: those of the base config, fifteen times.
Expected: B/token = (kv_lora_rank + qk_rope_head_dim) x layers x bytes an element for every MLA point. A rotary key wider
than the heads need costs bytes that the latent could use.
"""

from collections.abc import Iterator

from mla.commands import load_config
from mla.sweep.runs import Training, settings, with_seeds


def get_runs(variant: str = "") -> Iterator[Training]:
    chosen = settings(variant, base="quick", seeds=1)
    base = f"configs/{chosen['base']}.py"
    model = load_config(f"{base}:mla").model
    head_dim = model.d_model // model.num_heads
    runs = [Training(name, f"{base}:{name}", family="head sharing") for name in ("mha", "gqa", "mqa")]
    for rope in (head_dim // 4, head_dim // 2, head_dim):
        for rank in (model.d_model // 8, model.d_model // 4, model.d_model // 2, model.d_model):
            sizes = {"config.model.mechanism.kv_lora_rank": rank, "config.model.mechanism.qk_rope_head_dim": rope}
            runs.append(Training(f"mla-r{rank}-p{rope}", f"{base}:mla", sizes, f"MLA, rotary key {rope}"))
    return with_seeds(runs, chosen["seeds"])
