"""Many calibrations from one plan: the matrix, the run, Ray, and the merge."""
