"""Ollama: its recipe, its HTTP interface, its models."""
