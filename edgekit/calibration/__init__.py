"""Calibration: run the float model over samples, and choose grids and codes from what it shows."""
