"""The CPU engine's kernels: C++ under `src/`, one library an instruction set, called through ctypes.

`build.py` compiles, `library.py` picks and loads, `matrix.py` packs weights. Neither of the first two needs torch.
"""
