"""Rows as they come from eval.json, made by hand for the tests of tables, plots and sweeps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from mla.report.rows import Row, from_json


def typed(rows: Iterable[Any]) -> list[Row]:
    """As tables and plots take them."""
    return [from_json(row) for row in rows]


def make_row(run: str, family: str, loss: float, per_token: int, constant: int = 0, **more: Any) -> dict[str, Any]:
    context = 256
    at = {str(n): per_token * n + constant for n in (context, 1024, 8192, 131072)}
    return {
        "schema": 1,
        "run": run,
        "family": family,
        "name": run,
        "mechanism": family,
        "seed": 0,
        "context": context,
        "train_tokens": 1_000_000,
        "params": {"total": 1_000_000, "mismatch": 0.001},
        "loss": loss,
        "loss_cached": loss + 1e-7,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2),
        "eval_tokens": 1000,
        "corpus": {"name": "stdlib", "sha256": "5ha", "tokenizer": "bytes", "split": "validation"},
        "baseline": {"unigram_perplexity": 27.5},
        "cache": {
            "dtype": "float32",
            "bytes_per_token": per_token,
            "bytes_per_token_formula": per_token,
            "constant_bytes": constant,
            "bytes_at": at,
        },
        "decode": {"batch": 1, "context": context, "tokens_per_second": 1234.0},
        "environment": {"device_kind": "cpu", "jax": "0"},
        **more,
    }
