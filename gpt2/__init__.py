"""KV plugin: compressed KV caches for HuggingFace causal language models."""

from gpt2 import interrupts

interrupts.expect()
