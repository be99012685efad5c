"""KV plugin: compressed KV caches for HuggingFace causal language models."""
