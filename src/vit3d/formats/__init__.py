"""How stacks lie on disk: which axis is which, readers and writers of each format, boxes read where they lie."""
