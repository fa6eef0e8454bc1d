"""Calibrations, runs, the catalog and the settings, as files."""
