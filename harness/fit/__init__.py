"""From a record to constants: observations, straight lines, speed. Pure."""
