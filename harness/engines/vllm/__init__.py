"""vLLM: its recipe and its models' files."""
