"""Rows as they cross the wire: the formats, and the kernels that quantise them."""
