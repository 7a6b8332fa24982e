"""Studies of calibration on real data."""
