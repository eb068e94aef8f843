"""Put a trained checkpoint into the package, in half precision (computed in fp32 or bf16, as the device likes).

python scripts/ship_checkpoint.py run/best src/vit3d/checkpoints/vit3d-tiny
"""

import sys

import torch

from vit3d import ViT3DForNeuronSegmentation
from vit3d.model.image_processing_vit3d import ViT3DImageProcessor


def main(source: str, target: str) -> None:
    model = ViT3DForNeuronSegmentation.from_pretrained(source, dtype=torch.float16)
    model.save_pretrained(target)
    ViT3DImageProcessor.from_config(model.config).save_pretrained(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
