"""Expert-parallel buffers: one contract (`contract.py`), several carriers (`carriers.py`)."""
