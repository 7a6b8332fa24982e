"""Sums of outer products, their eigendecompositions, and functions of the posterior's eigenvalues.

Pure torch on plain tensors: models, data and likelihoods are elsewhere.
"""
