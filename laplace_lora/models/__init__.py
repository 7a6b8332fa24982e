"""A fine-tuned transformer as a function from a batch to outputs, and temporary changes to it.

No curvature; hooks that record a pass are in `capture`.
"""
