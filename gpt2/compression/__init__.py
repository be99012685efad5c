"""Codecs and their kernels, calibration, the settings of layers, the cache itself, and presets."""
