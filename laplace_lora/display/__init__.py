"""How results show themselves: small HTML tables, data frames, plain Python values.

Knows numbers and text only; what a result's columns are, its own file says.
"""
