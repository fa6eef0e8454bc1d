"""Recipes: what each engine launches, which requests load and unload a model, and which log dialect it writes."""
