"""llama.cpp's llama-server, and the one that comes from PyPI."""
