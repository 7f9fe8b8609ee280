"""How much quality does a language model keep per byte of key-value cache? Attention mechanisms in JAX and Flax NNX."""

__version__ = "0.1.0"
