"""Record one forward pass, run its backward passes, and assemble Jacobians from them.

Sums over data are in `curvature`.
"""
