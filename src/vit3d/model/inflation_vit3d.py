"""2D weights -> 3D weights: pure functions on tensors.

Center and Average follow the inflation of video networks (I3D, Carreira & Zisserman 2017; ViViT, Arnab et al.
2021) as used for neurons by Cheng et al. 2024 (arXiv 2405.02686). On a stack that is constant in z both give the
2D patch embedding exactly.
"""

import torch

STRATEGIES = ("center", "average", "random")
CHANNEL_REDUCTIONS = ("sum", "mean")


def reduce_channels(weight: torch.Tensor, num_channels: int, reduction: str = "sum") -> torch.Tensor:
    """(hidden, rgb, height, width) -> (hidden, num_channels, height, width).

    `"sum"` answers a grey image as the 2D network answers its RGB copy; `"mean"` is a third of that. Several
    channels share the weight equally, so that equal channels answer like one.
    """
    if reduction not in CHANNEL_REDUCTIONS:
        raise ValueError(f"`channel_reduction` must be one of {CHANNEL_REDUCTIONS}, got {reduction!r}.")
    grey = weight.sum(1, keepdim=True) if reduction == "sum" else weight.mean(1, keepdim=True)
    return grey.repeat(1, num_channels, 1, 1) / num_channels


def shrink_kernel(weight: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(hidden, channels, height, width) -> (hidden, channels, *size): the kernel for an image not enlarged.

    Enlarging by pixel replication is linear, so the large kernel on the enlarged patch equals the small kernel
    on the patch itself: w_small = U^T w, where U copies each pixel into a block, sums the blocks of `w`.
    """
    height, width = weight.shape[-2:]
    if height % size[0] or width % size[1]:
        raise ValueError(
            f"A patch of {tuple(size)} pixels cannot inherit a {height}x{width} kernel: it must divide it on both axes."
        )
    blocks = weight.unflatten(3, (size[1], -1)).unflatten(2, (size[0], -1))
    return blocks.sum(dim=(3, 5))


def inflate_kernel(weight: torch.Tensor, depth: int, strategy: str) -> torch.Tensor:
    """(hidden, channels, height, width) -> (hidden, channels, depth, height, width)."""
    if strategy == "average":
        # Divided by the depth: a stack that is constant in z must give the 2D activation.
        return weight.unsqueeze(2).repeat(1, 1, depth, 1, 1) / depth
    if strategy == "center":
        inflated = weight.new_zeros(*weight.shape[:2], depth, *weight.shape[2:])
        inflated[:, :, depth // 2] = weight
        return inflated
    raise ValueError(f"`strategy` must be 'center' or 'average' to inflate a kernel, got {strategy!r}.")


def inflate_state(
    state_2d: dict[str, torch.Tensor],
    target: dict[str, torch.Tensor],
    strategy: str,
    channel_reduction: str = "sum",
) -> dict[str, torch.Tensor]:
    """State of a 2D `ViTModel` (without pooler) -> state of a `ViT3DModel` with the shapes of `target`.

    Only the patch kernel changes shape; positions keep their 2D table, the depth embedding is zero and every
    other tensor is copied. Raises `ValueError` naming what did not fit, so nothing is left at random silently.
    """
    kernel_name = "embeddings.patch_embeddings.projection.weight"
    state = dict(state_2d)
    kernel = state.pop(kernel_name, None)
    if kernel is None:
        raise ValueError(f"The 2D source has no `{kernel_name}`: it is no ViT.")
    _, num_channels, depth, height, width = target[kernel_name].shape
    kernel = shrink_kernel(reduce_channels(kernel, num_channels, channel_reduction), (height, width))
    state[kernel_name] = inflate_kernel(kernel, depth, strategy)
    state["embeddings.depth_embeddings"] = torch.zeros_like(target["embeddings.depth_embeddings"])
    misfits = sorted(set(state) ^ set(target))
    misfits += [name for name in sorted(set(state) & set(target)) if state[name].shape != target[name].shape]
    if misfits:
        raise ValueError(f"These tensors of the 2D source and the 3D encoder do not fit each other: {misfits}.")
    return state
