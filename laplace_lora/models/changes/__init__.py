"""Temporary changes to a model, which are undone whatever happens."""
