"""Which unlabelled examples to label next, from the joint predictive of a pool."""
