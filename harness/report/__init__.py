"""Records and calibrations as one HTML page."""
