"""Batches and loaders: their examples, padding and preference pairs, alone or across processes.

Pure torch; no models, no likelihoods.
"""
