"""Rank allocation with AdaLoRA, IVON and posteriors."""
