"""Calibrations in the words of the programs that run models: one module for each format."""
