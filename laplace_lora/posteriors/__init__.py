"""The posterior classes: laplace-torch's names over this package's parts.

No mathematics; each class names its structure.
"""
