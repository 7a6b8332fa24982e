"""The trainable tensors of a PEFT model, as linear maps and diagonal blocks.

All knowledge of PEFT's layers lives here; nothing here runs a model.
"""
