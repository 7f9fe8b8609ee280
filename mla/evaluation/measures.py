"""The registry of measures, in the order in which they run and in which their columns stand."""

from __future__ import annotations

from mla.evaluation import cache_bytes, compression, perplexity, recall, speed, stream, task
from mla.evaluation.contract import Measure

REGISTRY: dict[str, Measure] = {
    "quality": perplexity.Quality(),
    "stream": stream.Stream(),
    "task": task.Answers(),
    "recall": recall.Recall(),
    "cache": cache_bytes.CacheBytes(),
    "speed": speed.Speed(),
    "compression": compression.Compression(),
}
