"""The calibration study on real data: ``python -m benchmarks.study``."""
