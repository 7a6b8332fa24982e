"""`InapplicableError`: this way cannot be taken with a model or its data, though others may."""


class InapplicableError(ValueError):
    """A method does not apply to a model or to the form of its data; nothing is wrong with them."""
