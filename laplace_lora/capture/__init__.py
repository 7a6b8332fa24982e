"""One recorded forward pass, its backward passes, and Jacobians put together from them.

No sums over data; covariances are in `curvature`.
"""
