"""What a model reads of its batch: lengths, positions and padding."""
