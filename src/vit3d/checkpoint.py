"""A trained network where it is kept: inside the package, in a folder or on the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file

from .model.auto_vit3d import register
from .model.configuration_vit3d import ViT3DConfig
from .model.image_processing_vit3d import ViT3DImageProcessor
from .model.intensity_vit3d import check_polarity
from .model.modeling_vit3d import ViT3DForNeuronSegmentation

DEFAULT_MODEL = "vit3d-tiny"  # shipped inside the package, so everything works offline


def load_checkpoint(
    source: str = DEFAULT_MODEL, device: str = "auto", polarity: str = "auto", dtype: torch.dtype | None = None
) -> tuple[ViT3DForNeuronSegmentation, ViT3DImageProcessor]:
    """Network and processor from a shipped name (`vit3d-tiny`), a folder or a Hub id, ready to run.

    `device` "auto" takes a GPU where there is one, `dtype` is by default what the device computes fastest in.
    `polarity` "bright" or "dark" overrides the checkpoint's own processor; "auto" leaves it as it is, and where there
    is none each stack tells. Weights are read from safetensors alone: nothing is unpickled. ValueError: `source` is no
    whole vit3d checkpoint, there is no such polarity, or the device is not there.
    """
    place, device = place_of(source), _checked_device(device)
    check_polarity(polarity)
    register()
    with _loading(source):
        config = AutoConfig.from_pretrained(place)
    if config.model_type != ViT3DConfig.model_type:
        raise ValueError(
            f"{source} is a {config.model_type!r} checkpoint, not a vit3d one; `vit3d train --init` inflates a ViT."
        )
    with _loading(source):
        model, report = ViT3DForNeuronSegmentation.from_pretrained(
            place, dtype=dtype or preferred_dtype(device), use_safetensors=True, output_loading_info=True
        )
    if report["missing_keys"]:
        raise ValueError(f"{source} lacks weights of the network: {', '.join(sorted(report['missing_keys'])[:3])}, ...")
    with _loading(source):
        processor = processor_of(place, config)
    processor.polarity = processor.polarity if polarity == "auto" else polarity
    return model.to(device), processor


def place_of(source: str) -> str:
    """The folder of a shipped checkpoint, or `source` itself: a folder or a Hub id.

    ValueError, before anybody asks the Hub: it can be neither.
    """
    inside = Path(__file__).parent / "checkpoints"
    if Path(source).name == source and (inside / source / "config.json").is_file():
        return str(inside / source)
    checkpoints = [str(Path(source) / name) for name in ("best", "last") if (Path(source) / name).is_dir()]
    if checkpoints and not (Path(source) / "config.json").exists():
        raise ValueError(f"{source} is the folder of a training; its checkpoints are {' and '.join(checkpoints)}.")
    if not Path(source).is_dir() and (source.count("/") != 1 or source[0] in "./~"):
        raise ValueError(f"{source} is no folder and no shipped checkpoint; a model on the Hub is NAMESPACE/NAME.")
    return source


def processor_of(place: str, config: ViT3DConfig) -> ViT3DImageProcessor:
    """The checkpoint's own, with the network's sizes; where it has none, the one that fits the config."""
    own = ViT3DImageProcessor.from_config(config)
    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if cached_file(place, IMAGE_PROCESSOR_NAME, **lenient) is None:
        return own
    found = ViT3DImageProcessor.from_pretrained(place)
    for name in ("volume_size", "patch_size", "prediction"):
        setattr(found, name, getattr(own, name))
    return found


@contextmanager
def _loading(source: str) -> Iterator[None]:
    """Whatever the loader raises becomes one sentence that names the checkpoint."""
    try:
        yield
    except Exception as error:
        first_line = str(error).strip().split("\n")[0]
        what = "a vit3d checkpoint" if Path(place_of(source)).is_dir() else "a folder or a model that the Hub gives out"
        raise ValueError(f"{source} is not {what} ({type(error).__name__}: {first_line}).") from error


def device_of(device: str, local_rank: int) -> str:
    """The GPU of one of several processes on a machine, where `device` is "auto"."""
    if device != "auto" or not torch.cuda.is_available():
        return device
    return f"cuda:{local_rank % torch.cuda.device_count()}"


def _checked_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        raise ValueError(f"--device takes auto, cpu, cuda or cuda:N, got {device!r}.")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices; use auto.")
    return device


def preferred_dtype(device: str | torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it (GPUs since Ampere, CPUs with AMX or AVX512-BF16), else fp32.

    A CPU that only converts bf16 emulates the product, many times slower than fp32: what torch does not name is
    taken for such a CPU.
    """
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # newer than the oldest torch we accept
    multiplies = any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
    return torch.bfloat16 if multiplies else torch.float32
