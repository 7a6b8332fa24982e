"""The trainable tensors of a PEFT model, as linear maps and diagonal blocks.

Where PEFT's layers are known; nothing here runs a model.
"""
