"""Measured GPU memory of local LLMs: calibrate once, then know what fits."""

from __future__ import annotations

__version__ = "0.1.0"
