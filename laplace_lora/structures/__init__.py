"""How a posterior's curvature is held: its sums, their result, its precision and its size.

No loops over data, no tuning and no files.
"""
