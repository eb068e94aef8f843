"""The `datasets` builder: stacks paired with their gold SWCs, and a split by neuron."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import datasets

from .volume import SUFFIXES

_TEST_SHARE = 0.2


def find_pairs(data_dir: str | Path) -> list[dict[str, str]]:
    """`NAME.tif` (or v3dpbd, v3draw, lsm) beside `NAME.swc` -> rows of name, image and swc path, sorted by name.

    FileNotFoundError when the folder is missing or holds no pair.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder.")
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    pairs = [(image, image.with_suffix(".swc")) for image in images]
    rows = [{"name": i.stem, "image": str(i), "swc": str(s)} for i, s in pairs if s.is_file()]
    if not rows:
        raise FileNotFoundError(
            f"{folder} holds no pair of a stack ({', '.join(SUFFIXES)}) and an SWC of the same name."
        )
    return rows


def split_of(name: str) -> str:
    """ "train" or "test", from the neuron's name alone: adding a neuron never moves another."""
    share = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
    return "test" if share < _TEST_SHARE else "train"


@dataclass
class BigNeuronConfig(datasets.BuilderConfig):
    """`data_path`: folder of pairs. `fingerprint` makes the cache notice files that came, went or changed."""

    data_path: str = ""
    fingerprint: str = ""

    def __post_init__(self):
        super().__post_init__()
        if self.data_path:
            files = [Path(row[key]) for row in find_pairs(self.data_path) for key in ("image", "swc")]
            facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
            self.fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()

    def create_config_id(self, config_kwargs: dict, custom_features=None) -> str:
        # the cache's key: by itself it sees only what the caller passed, here the folder's name
        return super().create_config_id({**config_kwargs, "fingerprint": self.fingerprint}, custom_features)


class BigNeuron(datasets.GeneratorBasedBuilder):
    """Rows of paths, never voxels: `name`, `image`, `swc`; read them with `read_volume` and `read_swc`.

    >>> builder = BigNeuron(data_path="folder")  # doctest: +SKIP
    >>> builder.download_and_prepare(); builder.as_dataset("train")  # doctest: +SKIP
    """

    BUILDER_CONFIG_CLASS = BigNeuronConfig
    VERSION = datasets.Version("0.1.0")

    def _info(self) -> datasets.DatasetInfo:
        columns = {name: datasets.Value("string") for name in ("name", "image", "swc")}
        return datasets.DatasetInfo(features=datasets.Features(columns))

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        rows = find_pairs(self.config.data_path)
        splits = {split: [row for row in rows if split_of(row["name"]) == split] for split in ("train", "test")}
        return [datasets.SplitGenerator(name, gen_kwargs={"rows": part}) for name, part in splits.items() if part]

    def _generate_examples(self, rows: list[dict]):
        yield from enumerate(rows)
