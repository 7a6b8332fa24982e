"""Likelihoods as objects: loss, output Hessian, and the way from Gaussian outputs to probabilities.

Pure torch on outputs and labels; no models and no parameters.
"""
