"""Measurements of caches. Each gets factories of caches and knows nothing of codecs."""
