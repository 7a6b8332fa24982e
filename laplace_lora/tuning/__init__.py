"""Choosing prior, noise, width, temperature and mean: by evidence, training labels or other data.

Results are new settings, installed by the posterior.
"""
