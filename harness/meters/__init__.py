"""Meters of an engine's memory, and the sampler that reads them on a deadline clock."""
