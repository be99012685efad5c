"""Measurements. Each sees only a factory of caches, never how a cache is made."""
