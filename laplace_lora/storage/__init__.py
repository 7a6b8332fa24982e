"""Posteriors as files beside their adapters, and fingerprints of the weights they belong to.

Safetensors and JSON; nothing is ever unpickled.
"""
