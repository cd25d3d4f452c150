"""Kernels: the operations that XLA does badly, one folder an op. Imports nothing of the other rooms.

In a folder: `ref.py`, plain jnp, says what the op is and is the truth; `tpu.py` and `gpu.py` are Pallas kernels (Mosaic
TPU, Mosaic GPU); `specs.py` has the shapes that tests, benchmarks and tuning share. Start with `op.py`, then
`stacked_gemv/`, the smallest. `api.py` is what other rooms call.
"""
