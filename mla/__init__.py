"""How much quality does a language model keep per byte of key-value cache? Attention mechanisms in JAX and Flax NNX."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read when jaxlib is loaded, which whatever is imported next does

__version__ = "0.1.0"
