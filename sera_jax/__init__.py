"""sera_jax: language models aligned with preferences that they review themselves (JAX, TPU-native)."""

__version__ = "0.1.0"
