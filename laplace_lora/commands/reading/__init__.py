"""From what is on disk, adapters and data, to the inputs of a model."""
