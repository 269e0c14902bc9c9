"""The operations of a step as Triton kernels, one file an operation.

Each has its torch reference in the file of the same name one folder up. They run on CUDA devices of compute capability
8.0 and above, and, slowly, on a CPU under Triton's interpreter (`TRITON_INTERPRET=1` before the first import). They are
a package of their own because importing Triton takes time and memory that a worker on a CPU has no use for.

Every function checks its arguments before it launches and raises ArgumentError, which names the one that is wrong; none
falls back to torch.
"""
