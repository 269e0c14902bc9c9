"""One file an architecture, written over `meshlm.kernels`."""
