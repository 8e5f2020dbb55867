"""Parts of the body for NVIDIA Ampere and Ada (sm_80 to sm_89), written in Pallas Mosaic GPU of jax 0.11 or newer.

Nothing here is imported until the body is asked for. A block is one warpgroup that makes one tile of the result: it
copies 16 bytes a thread (cp.async) into a ring of stages in shared memory and multiplies with the warps' mma. Two
blocks fit a multiprocessor of an A100, so that one multiplies while the other writes its result.
"""
