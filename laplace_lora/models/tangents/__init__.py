"""Directional derivatives of a model, beside its values."""
