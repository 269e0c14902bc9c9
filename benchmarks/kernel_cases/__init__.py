"""What `kernels.py` measures, one file a kind of operation: each yields cases, built one at a time."""
