"""Stacks with golds as people keep them: found in folders, read, aligned with their image and judged."""
