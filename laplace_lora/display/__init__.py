"""How results show themselves: tables, coloured texts, pictures, data frames; and warnings.

Knows numbers and text only; what a result's columns are, its own file says.
"""
