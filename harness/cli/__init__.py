"""The command line: grammar, rendering and exit codes. No logic."""
