"""From what is on disk, adapters and data, to the inputs of a model.

Arguments that mean the same everywhere:
    rows: The data as dictionaries, by the names of columns; at least one if nothing else is said.
    number: Of a row, from 1, for errors.
    options: Of the command line, of which each command has its own.
    asked, known: `Columns` that options name, and that the posterior was fitted with.
    named: By column of the data, the names of the classes that its numbers stand for.
    source: The option and the file that an error is about.
    names: Of the classes or answers, in the order of the model's outputs.
"""
