"""KV plugin: compressed KV caches for HuggingFace causal language models."""

from gpt2.common import interrupts

interrupts.install()
