"""Measured GPU memory of local LLMs: calibrate once, then know what fits."""
