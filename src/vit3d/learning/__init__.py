"""What the training loop of `vit3d.training` stands on: its configuration, data, crops, rates, folder, validation."""
