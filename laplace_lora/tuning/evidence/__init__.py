"""Prior and noise by the marginal likelihood of the training data."""
