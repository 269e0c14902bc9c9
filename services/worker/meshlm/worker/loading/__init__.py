"""Model files into a `ModelConfig` and named tensors."""
