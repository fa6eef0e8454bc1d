"""One run of an engine: prepare, calibrate, load, time, and notice who else used the machine."""
