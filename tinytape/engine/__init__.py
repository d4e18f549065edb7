"""The engine: Tensor, tape, walk, and how an op is declared.

Read errors, tape, tensor, op, call and recording, in that order.
"""
