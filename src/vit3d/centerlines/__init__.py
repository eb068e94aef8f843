"""From the voxels of a neurite to its centre line: the steps of `vit3d.tracing`, on the foreground alone."""
