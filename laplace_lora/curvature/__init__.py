"""Curvature of the loss by the adapters' weights, also in laplace-torch's protocol.

No priors and no predictions.
"""
