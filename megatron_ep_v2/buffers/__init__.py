"""Expert-parallel buffers: one contract, several carriers. See `contract.py`."""
