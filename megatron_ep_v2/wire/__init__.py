"""Wire formats of rows, and the kernels that quantise to them."""
