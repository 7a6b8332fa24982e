"""Prior, mean and noise by how each training example is predicted without its own label."""
