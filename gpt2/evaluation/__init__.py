"""Measurements of caches. Measurements take factories of caches and don't depend on codecs."""
