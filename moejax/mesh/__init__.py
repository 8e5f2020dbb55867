"""Meshes, and where parameters and batches lie on them."""
