"""Capture, calibration, codecs, the cache itself, presets and the tuner."""
