"""Comparisons of routers: sweep files whose runs differ in the router and the seed."""
