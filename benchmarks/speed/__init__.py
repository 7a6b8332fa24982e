"""Time and memory of fits and predictions, against bare passes and other libraries."""
