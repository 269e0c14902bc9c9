"""The operations a model is written over: one file an operation, each with its torch reference beside it.

Flat batches: the tokens of all sequences of a step lie behind one another in dimension 0, with no padding.
"""
