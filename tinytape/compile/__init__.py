"""The compiled scan: a traced cell is lowered, fused, and written out as NumPy or Numba source."""
