"""Parts of the bodies for NVIDIA Hopper (sm_90a), written in Pallas Mosaic GPU.

Nothing here is imported until a body of that name is asked for: Mosaic is slow to import. Every kernel
that multiplies is persistent (one block an SM) and warp-specialised: the last of three warpgroups loads stages of a
ring in shared memory, two multiply.
"""
