"""Engine logs, read. Pure: text or bytes in, :class:`~harness.core.facts.LoadFacts` out."""
