"""Estimate the shift of every gold trace against its image, from image and gold alone.

    python scripts/align_gold.py FOLDER [--out gold_shift.json] [--polarity dark]

FOLDER holds pairs NAME.tif and NAME.swc, SWCs in voxels unless their header says otherwise. Writes (or
prints) the shifts in voxels (z, y, x) to add to each gold, and says which golds do not lie on their image.
The six OP neurons take 5 s on two CPU cores.
"""

import argparse
import json
import sys
from pathlib import Path

from vit3d.annotations.gold import align_gold, lies_on_image, likely_cause
from vit3d.tree import read_swc
from vit3d.volume import read_volume

METHOD = "argmax over +-3 voxels of the mean log(1 + blurred intensity) along the trace; image and gold only"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, help="JSON file to write; printed when left out")
    parser.add_argument("--polarity", choices=["bright", "dark"], default="bright")
    args = parser.parse_args()

    shifts = {}
    for image_path in sorted(args.folder.glob("*.tif")):
        swc_path = image_path.with_suffix(".swc")
        if not swc_path.exists():
            continue
        volume, gold = read_volume(image_path), read_swc(swc_path, unit="voxel")
        if lies_on_image(gold, volume, polarity=args.polarity):
            _, shift_vox = align_gold(gold, volume, polarity=args.polarity)
            shifts[image_path.stem] = shift_vox.tolist()
        else:
            print(f"{image_path.stem}: {likely_cause(gold, volume, polarity=args.polarity)}", file=sys.stderr)
    head = {"unit": "voxel (z, y, x): add to the gold trace", "method": METHOD}
    text = json.dumps({**head, **shifts}, indent=1)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
