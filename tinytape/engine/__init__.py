"""The engine: Tensor, tape, walk, and how an op is declared.

Read errors, tape, tensor, op and recording, in that order.
"""
