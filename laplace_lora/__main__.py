"""``python -m laplace_lora``: the command line."""

from laplace_lora.commands.entry import main

main(prog_name="laplace-lora")
