"""Two `evaluate` metrics, each a folder that `evaluate.load` takes: `evaluate.load(metric_folder("neuron_tracing"))`.

Both are fed one row of numbers per volume, never voxels, so that rows of several processes can be gathered.
"""

from pathlib import Path


def metric_folder(name: str) -> str:
    """Where "neuron_segmentation" or "neuron_tracing" lies."""
    return str(Path(__file__).parent / name)
