"""Segmentation of volumes larger than memory, by many processes that may die: a store of boxes, leases, records."""
