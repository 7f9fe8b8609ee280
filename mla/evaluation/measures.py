"""The registry of measures, in the order in which they run and in which their columns stand."""

from __future__ import annotations

from mla.evaluation import cache_bytes, compression, perplexity, recall, speed
from mla.evaluation.contract import Measure

REGISTRY: dict[str, Measure] = {
    "quality": perplexity.Quality(),
    "recall": recall.Recall(),
    "cache": cache_bytes.CacheBytes(),
    "speed": speed.Speed(),
    "compression": compression.Compression(),
}
