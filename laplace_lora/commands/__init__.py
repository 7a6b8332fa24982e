"""The command line ``laplace-lora``: the Python calls, on adapters and data on disk.

`entry` is where it starts; `fit`, `predict` and `generate` have the arguments of the commands.
Nothing here is imported by the rest of the package, and torch, PEFT and transformers are imported
when a command runs, not for its help.
"""
