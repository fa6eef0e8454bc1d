"""What is kept: records, calibrations, traces and what a log says. Data only. Pure."""
