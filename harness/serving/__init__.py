"""Before and around a start: the calibration that holds here, the check, the capacity, the server."""
