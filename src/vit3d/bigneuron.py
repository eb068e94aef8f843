"""The `datasets` builder: neurons with their golds as rows of paths, aligned, checked, and split by neuron."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
from tqdm import tqdm

from .annotations.annotation import examine
from .annotations.pairs import Survey, find_pairs, read_split_file, skipped, split_of, splits_of, survey

__all__ = ["BigNeuron", "find_pairs", "load_bigneuron", "split_of"]


def load_bigneuron(
    data_dir: str | Path,
    *,
    align: bool = True,
    keep_misplaced: bool = False,
    gold: str | None = None,
    spacing_table: str | Path | None = None,
    split_file: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> datasets.DatasetDict:
    """Every usable neuron below `data_dir` (layouts: `vit3d.annotations.pairs`), in the splits "train" and "test".

    align: estimate each gold's shift against its image; a row's `shift_vox` is what to add.
    keep_misplaced: keep a pair whose SWC does not lie on its image, or lies outside of it.
    gold, spacing_table: see `find_pairs`. split_file: CSV or JSON of names, see `read_split_file`; who is not in
    it is split by name. cache_dir: where the rows are kept; a folder in which any file changed is read anew.

    What was left out, and why, comes as one warning, and stays in `info.description`. FileNotFoundError,
    ValueError: no pair in the folder, none that is usable, a table that cannot be read.
    """
    builder = BigNeuron(
        data_path=str(Path(data_dir).absolute()),
        cache_dir=None if cache_dir is None else str(cache_dir),
        align=align,
        keep_misplaced=keep_misplaced,
        gold=gold,
        spacing_table=None if spacing_table is None else str(spacing_table),
        split_file=None if split_file is None else str(split_file),
    )
    with _bars_on_a_terminal_only():
        builder.download_and_prepare()
    if builder.info.description:
        warnings.warn(builder.info.description, stacklevel=2)
    return builder.as_dataset()


@contextmanager
def _bars_on_a_terminal_only() -> Iterator[None]:
    silence = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if silence:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            datasets.enable_progress_bars()


@dataclass
class BigNeuronConfig(datasets.BuilderConfig):
    """`data_path` and the options of `load_bigneuron`. `fingerprint` makes the cache notice files that came, went
    or changed."""

    data_path: str = ""
    align: bool = True
    keep_misplaced: bool = False
    gold: str | None = None
    spacing_table: str | None = None
    split_file: str | None = None
    fingerprint: str = ""

    def __post_init__(self):
        super().__post_init__()
        if self.data_path:
            found = self.survey()
            if self.split_file:
                read_split_file(self.split_file, found.rows)
                found = replace(found, files=[*found.files, Path(self.split_file)])
            self.fingerprint = found.fingerprint

    def survey(self) -> Survey:
        return survey(self.data_path, gold=self.gold, spacing_table=self.spacing_table)

    def create_config_id(self, config_kwargs: dict, custom_features=None) -> str:
        # the cache's key: by itself it sees only what the caller passed, here the folder's name
        return super().create_config_id({**config_kwargs, "fingerprint": self.fingerprint}, custom_features)


class BigNeuron(datasets.GeneratorBasedBuilder):
    """Rows of paths, never voxels; `vit3d.annotations.annotation` reads them: `read_stack(row)`, `read_gold(row)`.

    name, neuron, image, swc, label, species, lab: as `find_pairs`. spacing_um: (z, y, x), the table's or else the
    file's, None where nobody states it. unit: the SWC's, "voxel" where its header says none. shape: (Z, Y, X).
    polarity: "bright" or "dark" neurites. shift_vox: (z, y, x) to add to the gold, in voxels. image_sha256,
    gold_sha256: of the files.

    >>> builder = BigNeuron(data_path="folder")  # doctest: +SKIP
    >>> builder.download_and_prepare(); builder.as_dataset("train")  # doctest: +SKIP
    """

    BUILDER_CONFIG_CLASS = BigNeuronConfig
    VERSION = datasets.Version("0.2.0")

    def _info(self) -> datasets.DatasetInfo:
        texts = ("name", "neuron", "image", "swc", "label", "species", "lab", "unit", "polarity")
        columns = {name: datasets.Value("string") for name in (*texts, "image_sha256", "gold_sha256")}
        for name, kind in (("spacing_um", "float64"), ("shape", "int64"), ("shift_vox", "float64")):
            columns[name] = datasets.List(datasets.Value(kind), length=3)
        return datasets.DatasetInfo(features=datasets.Features(columns))

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        found = self.config.survey()
        rows, left_out = [], []
        for row in tqdm(found.rows, desc="check golds", disable=None):
            try:
                rows.append(examine(row, align=self.config.align, keep_misplaced=self.config.keep_misplaced))
            except (ValueError, OSError) as error:
                left_out.append(str(error))
        report = [skipped(found.alone)] if found.alone else []
        report += [f"Left out of {self.config.data_path}: {' '.join(left_out)}"] if left_out else []
        if not rows:
            raise ValueError(f"{self.config.data_path} holds no pair that can be used. {' '.join(report)}")
        self.info.description = " ".join(report)
        split_by_name = splits_of(found.rows, self.config.split_file)
        splits: dict[str, list[dict]] = {}
        for row in rows:
            splits.setdefault(split_by_name[row["name"]], []).append(row)
        order = sorted(splits, key=lambda split: (split != "train", split))
        return [datasets.SplitGenerator(split, gen_kwargs={"rows": splits[split]}) for split in order]

    def _generate_examples(self, rows: list[dict]):
        yield from enumerate(rows)
