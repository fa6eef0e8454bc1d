"""From a calibration to an answer: memory, placement, verdict, allocation, drift. Pure."""
