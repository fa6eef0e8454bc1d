"""Pure core: records, fits, predictions and verdicts. No I/O, no clock, no environment."""
