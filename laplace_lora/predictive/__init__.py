"""Predictions of a fitted posterior: linearised or from sampled weights, by batch or data set.

No tuning; tokens of language models are in `generation`.
"""
