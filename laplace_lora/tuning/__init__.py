"""Choosing prior, noise, width and temperature, by marginal likelihood or on validation data.

No passes over training data; results are new settings, installed by the posterior.
"""
