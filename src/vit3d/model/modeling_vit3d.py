"""The network: a Vision Transformer over 3D patches, and a head in which every token paints its own patch."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, SemanticSegmenterOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_vit3d import ViT3DConfig
from .head_vit3d import ViT3DClassifier, ViT3DHead, ViT3DHeadConvolution
from .inflation_vit3d import STRATEGIES, inflate_state
from .packing_vit3d import PackedWindows, pack_tokens, to_patches
from .source_vit3d import inflated_config, vit_config, vit_state

IGNORE_LABEL = -100
SCORES_AT_ONCE = 2**18  # of attention, per thread of a CPU: in its cache
MISSED_SHARE, MISSED_WEIGHT = 0.8, 6.0  # of the loss: what is missed, against what is made up
_OVERRIDES = {"num_labels", "attn_implementation", *(field.name for field in fields(ViT3DConfig))}


@dataclass
class ViT3DModelOutput(BaseModelOutput):
    """`fused_states`: per depth in `config.fused_layers` the tokens that a head paints from, without class token."""

    fused_states: tuple[torch.Tensor, ...] | None = None


class ViT3DEmbeddings(nn.Module):
    """Class token, patch tokens, and their positions: the 2D table plus a depth embedding."""

    def __init__(self, config: ViT3DConfig):
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embeddings = ViT3DPatchEmbeddings(config)
        rows, columns = config.position_grid
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + rows * columns, config.hidden_size))
        self.depth_embeddings = nn.Parameter(torch.zeros(1, config.grid_size[0], config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def positions(self, grid_size: tuple[int, int, int]) -> torch.Tensor:
        """(1, num_patches, hidden) for the actual grid: the 2D table resized, plus depth, resized."""
        depth, rows, columns = grid_size
        table = self.position_embeddings[:, 1:].unflatten(1, self.config.position_grid).permute(0, 3, 1, 2)
        if (rows, columns) != tuple(table.shape[2:]):
            table = functional.interpolate(table.float(), (rows, columns), mode="bicubic", align_corners=False)
        column = self.depth_embeddings.transpose(1, 2)
        if depth != column.shape[2]:
            column = functional.interpolate(column.float(), depth, mode="linear", align_corners=False)
        # (1, hidden, 1, rows, columns) + (1, hidden, depth, 1, 1) -> (1, depth * rows * columns, hidden)
        positions = table.unsqueeze(2) + column[..., None, None]
        return positions.flatten(2).transpose(1, 2).to(self.position_embeddings.dtype)

    def forward(
        self,
        pixel_values: torch.Tensor,
        indices: torch.Tensor | None = None,
        windows: PackedWindows | None = None,
    ) -> torch.Tensor:
        """(batch, channels, depth, height, width) -> (batch, 1 + kept patches, hidden).

        With packed `windows`, their kept patches (patches, channels * voxels) -> (1, windows + patches, hidden).
        """
        if windows is not None:
            tokens = self.patch_embeddings(pixel_values) + self.positions(windows.grid_size)[0, windows.places]
            class_token = (self.cls_token + self.position_embeddings[:, :1])[0]
            return self.dropout(torch.cat([class_token, tokens])[windows.order][None])
        patches = to_patches(pixel_values, self.config.patch_size)
        grid_size = tuple(n // p for n, p in zip(pixel_values.shape[2:], self.config.patch_size, strict=True))
        positions = self.positions(grid_size)
        if indices is not None:
            patches = patches.gather(1, indices.unsqueeze(2).expand(-1, -1, patches.shape[2]))
            positions = positions[0][indices]
        tokens = self.patch_embeddings(patches) + positions
        class_token = (self.cls_token + self.position_embeddings[:, :1]).expand(tokens.shape[0], -1, -1)
        return self.dropout(torch.cat([class_token, tokens], dim=1))


class ViT3DPatchEmbeddings(nn.Module):
    """A Conv3d with kernel = stride = patch, applied as one matrix product to the patches that are kept."""

    def __init__(self, config: ViT3DConfig):
        super().__init__()
        self.projection = nn.Conv3d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(batch, patches, channels * voxels) -> (batch, patches, hidden)."""
        return functional.linear(patches, self.projection.weight.flatten(1), self.projection.bias)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention spelled out, for `attn_implementation="eager"` and `output_attentions=True`."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = functional.dropout(weights, p=dropout, training=module.training)
    # (batch, heads, tokens, head_dim) -> (batch, tokens, heads, head_dim)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def blocked_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention spelled out, a few scores at a time, which stay in the cache: for inference in bf16 on a CPU, where
    PyTorch's fused one takes twice as long. The mask, True where a key is seen, is the same for all queries."""
    batch, num_heads, length, _ = query.shape
    query, key, value = query.flatten(0, 1) * scaling, key.flatten(0, 1).transpose(1, 2), value.flatten(0, 1)
    hidden = None
    if attention_mask is not None:
        hidden = attention_mask[:, 0, :1].logical_not().repeat_interleave(num_heads, dim=0)
    context = torch.empty_like(query)
    together = SCORES_AT_ONCE * torch.get_num_threads()
    rows, heads = max(1, together // length), max(1, together // length**2)
    for head in range(0, len(query), heads):
        some = slice(head, head + heads)
        for row in range(0, length, rows):
            scores = query[some, row : row + rows] @ key[some]
            if hidden is not None:
                scores.masked_fill_(hidden[some], -torch.inf)
            weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
            context[some, row : row + rows] = weights @ value[some]
    # (batch * heads, tokens, head_dim) -> (batch, tokens, heads, head_dim)
    return context.unflatten(0, (batch, num_heads)).transpose(1, 2).contiguous(), None


class ViT3DAttention(nn.Module):
    def __init__(self, config: ViT3DConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        windows: PackedWindows | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        def heads(projected: torch.Tensor) -> torch.Tensor:
            # (batch, tokens, hidden) -> (batch, heads, tokens, head_dim)
            return projected.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if self.config._attn_implementation == "sdpa" and not self.training and _is_slow_when_fused(hidden_states):
            attend = blocked_attention_forward
        if windows is not None:
            attend = partial(windows.attend, attend)
        context, weights = attend(
            self,
            heads(self.q_proj(hidden_states)),
            heads(self.k_proj(hidden_states)),
            heads(self.v_proj(hidden_states)),
            attention_mask,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        # (batch, tokens, heads, head_dim) -> (batch, tokens, hidden)
        return self.o_proj(context.flatten(2)), weights


def _is_slow_when_fused(hidden_states: torch.Tensor) -> bool:
    on_cpu = hidden_states.device.type == "cpu" and hidden_states.dtype == torch.bfloat16
    return on_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


class ViT3DMLP(nn.Module):
    def __init__(self, config: ViT3DConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class ViT3DLayer(GradientCheckpointingLayer):
    def __init__(self, config: ViT3DConfig):
        super().__init__()
        self.attention = ViT3DAttention(config)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ViT3DMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states)))


class ViT3DPreTrainedModel(PreTrainedModel):
    config: ViT3DConfig
    base_model_prefix = "vit3d"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViT3DEmbeddings", "ViT3DLayer"]  # noqa: RUF012 (read by transformers as it is)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": ViT3DLayer, "attentions": ViT3DAttention}  # noqa: RUF012
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, ViT3DEmbeddings):
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)
            init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
            init.zeros_(module.depth_embeddings)
        elif isinstance(module, ViT3DHeadConvolution):  # transformers shows only modules with parameters of their own
            init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, ViT3DClassifier):
            init.constant_(module.bias, -3.0)  # neurites are rare


class ViT3DModel(ViT3DPreTrainedModel):
    """The encoder: stack -> one token per kept patch, with the class token first."""

    def __init__(self, config: ViT3DConfig):
        super().__init__(config)
        self.embeddings = ViT3DEmbeddings(config)
        self.layers = nn.ModuleList([ViT3DLayer(config) for _ in range(config.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        max_tokens: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ViT3DModelOutput:
        r"""
        Args:
            pixel_values: (batch, channels, depth, height, width), every size a multiple of the patch.
            token_mask: bool (batch, grid_depth, grid_height, grid_width), False = leave this patch out; `None` is
                dense. Kept patches come first in `last_hidden_state`, in raster order, padded to the longest row
                (`pack_tokens` gives their indices).
            max_tokens: pad to so many patches instead; none of the mask's rows may keep more.

        `pixel_values` of two dimensions are the kept patches alone, (patches, channels * voxels of a patch), window by
        window in raster order. Nothing is padded then, and there are no `attentions`: all tokens are one row,
        (1, batch + patches, hidden), each window's class token before its patches, and see those of their own window.
        """
        packed = pixel_values.ndim == 2
        if packed:
            check_patches(pixel_values, token_mask, max_tokens, self.config)
        else:
            check_input(pixel_values, token_mask, self.config)
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        indices = attention_mask = None
        if packed:
            windows = PackedWindows.of(token_mask).to(pixel_values.device)
            hidden_states = self.embeddings(pixel_values, windows=windows)
            kwargs["windows"] = windows.masked(self.config, hidden_states)
        else:
            if token_mask is not None:
                indices, real = pack_tokens(token_mask.flatten(1), max_tokens)
                attention_mask = functional.pad(real, (1, 0), value=True)
            hidden_states = self.embeddings(pixel_values, indices)
            attention_mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
            )
        states = []
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
            states.append(hidden_states)
        # not from recorded `hidden_states`, whose hooks no compiler can trace
        patches = kwargs["windows"].patch_rows if packed else slice(1, None)
        fused = tuple(states[depth - 1][:, patches] for depth in self.config.fused_layers)
        return ViT3DModelOutput(last_hidden_state=self.layernorm(hidden_states), fused_states=fused)


@dataclass
class ViT3DSegmentationOutput(SemanticSegmenterOutput):
    """`tokens`: what the head paints from, where the kept patches alone were given."""

    tokens: torch.Tensor | None = None


class ViT3DForNeuronSegmentation(ViT3DPreTrainedModel):
    """Stack -> one logit per voxel that it belongs to a neurite (sigmoid gives the probability)."""

    accepts_loss_kwargs = False  # the loss is a mean: transformers' Trainer then divides it by the accumulated batches

    def __init__(self, config: ViT3DConfig):
        super().__init__(config)
        self.vit3d = ViT3DModel(config)
        self.head = ViT3DHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        max_tokens: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> "ViT3DSegmentationOutput":
        r"""
        Args:
            pixel_values: (batch, channels, depth, height, width), every size a multiple of the patch.
            token_mask: bool (batch, grid_depth, grid_height, grid_width), False = leave this patch out and paint
                it as background; `None` is dense. The image processor selects, this method never does.
            labels: (batch, depth, height, width), 1 neurite, 0 background, -100 ignored; depth 1 with
                `prediction="center_slice"`. The loss is of one label: not with another `num_labels`.
            max_tokens: with a `token_mask`, pad to so many patches in place of the longest row, which may not keep
                more: what is computed then has a fixed shape, and `torch.compile(fullgraph=True)` takes it.

        `pixel_values` of two dimensions are the kept patches alone, (patches, channels * voxels of a patch), window by
        window in raster order. What comes then are the `tokens` that the head paints from, (patches, fused), and no
        logits: where windows share a patch, the mean of its tokens can be painted once (`head.features`, `head.paint`).

        Logits are fp32, (batch, num_labels, depth, height, width), in any weight dtype.
        """
        outputs = self.vit3d(pixel_values, token_mask, max_tokens, return_dict=True, **kwargs)
        tokens = self.head.fuse(outputs.fused_states)
        if pixel_values.ndim == 2:
            if labels is not None:
                raise ValueError("`labels` are of voxels, and patches alone give none.")
            return ViT3DSegmentationOutput(tokens=tokens[0])
        logits = self.head(tokens, pixel_values.to(tokens.dtype), token_mask, max_tokens)
        return ViT3DSegmentationOutput(
            loss=segmentation_loss(logits, labels) if labels is not None else None,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @classmethod
    def from_2d_pretrained(
        cls,
        source: str,
        strategy: str = "center",
        patch_size: tuple[int, int, int] = (4, 8, 8),
        channel_reduction: str = "sum",
        **config_overrides,
    ) -> "ViT3DForNeuronSegmentation":
        """Start from a 2D ViT: every encoder tensor is inherited, depth embedding and head are new.

        Args:
            source: Hub id or folder of a `ViTModel` checkpoint (DINO, DeiT, ViT), e.g. `"facebook/dino-vitb16"`.
            strategy: `"center"` (the 2D kernel at depth `pz // 2`), `"average"` (spread over the depth), or
                `"random"`: the same architecture with nothing inherited, the control of every comparison.
            patch_size: (pz, py, px); py and px must divide the source's patch. Smaller patches see the stack as
                the 2D network sees an enlarged image.
            channel_reduction: `"sum"` answers grey as the source answers its RGB copy; `"mean"` a third of that.
            config_overrides: any field of `ViT3DConfig`; `dtype` is that of the weights, fp32 by default.

        ValueError: `source` is no whole 2D ViT, or an argument does not fit it.
        """
        if strategy not in STRATEGIES:
            raise ValueError(f"`strategy` must be one of {STRATEGIES}, got {strategy!r}.")
        if unknown := sorted(set(config_overrides) - _OVERRIDES):
            raise ValueError(f"`ViT3DConfig` has no field {', '.join(unknown)}.")
        source_config = vit_config(source)
        config = inflated_config(source, source_config, patch_size, config_overrides)
        model = cls(config)
        if strategy != "random":
            state = inflate_state(vit_state(source), model.vit3d.state_dict(), strategy, channel_reduction)
            model.vit3d.load_state_dict(state)
        return model if config.dtype is None else model.to(config.dtype)


def segmentation_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Tversky + weighted binary cross-entropy over the voxels whose label is not -100; 0 when there are none.

    logits (batch, 1, depth, height, width), labels (batch, depth, height, width). A neurite voxel that is missed costs
    more than one that is made up: at a gap a tree loses all that lies behind it. The Tversky index (Salehi et al. 2017,
    arXiv 1706.05721; with a share of one half it is Dice) is taken over the whole batch: a crop without neurite has
    none of its own. ValueError: the shapes are others; values are not looked at, which would hold up a GPU.
    """
    expected = (logits.shape[0], *logits.shape[2:])
    if tuple(labels.shape) != expected:
        raise ValueError(f"`labels` must be (batch, depth, height, width) = {expected}, got {tuple(labels.shape)}.")
    if logits.shape[1] != 1:
        raise ValueError(f"The loss is of one label, neurite, and the network has {logits.shape[1]}.")
    logits = logits[:, 0].float()
    known = labels != IGNORE_LABEL
    logits, target = logits[known], labels[known].float()
    if target.numel() == 0:
        return logits.sum()
    weight = logits.new_tensor(MISSED_WEIGHT)
    entropy = functional.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)
    probability = logits.sigmoid()
    found = (probability * target).sum()
    missed, made_up = target.sum() - found, probability.sum() - found
    tversky = (found + 0.5) / (found + MISSED_SHARE * missed + (1 - MISSED_SHARE) * made_up + 0.5)
    return entropy + 1 - tversky


def check_input(pixel_values: torch.Tensor, token_mask: torch.Tensor | None, config: ViT3DConfig) -> None:
    """Refuse what would otherwise fail deep inside, or worse, not at all."""
    shape = tuple(pixel_values.shape)
    if pixel_values.ndim != 5 or shape[1] != config.num_channels:
        raise ValueError(
            f"`pixel_values` must be (batch, {config.num_channels} channels, depth, height, width), got {shape}."
        )
    if any(size == 0 or size % patch for size, patch in zip(shape[2:], config.patch_size, strict=True)):
        raise ValueError(f"`pixel_values` of {shape[2:]} voxels must be a multiple of the patch {config.patch_size}.")
    if config.prediction == "center_slice" and shape[2] != config.patch_size[0]:
        raise ValueError(f"A centre slice is predicted from {config.patch_size[0]} slices, got {shape[2]}.")
    grid = tuple(size // patch for size, patch in zip(shape[2:], config.patch_size, strict=True))
    if token_mask is not None and tuple(token_mask.shape) != (shape[0], *grid):
        raise ValueError(f"`token_mask` must be (batch, *grid) = {(shape[0], *grid)}, got {tuple(token_mask.shape)}.")
    if token_mask is not None and token_mask.dtype != torch.bool:
        raise ValueError(f"`token_mask` must be bool, got {token_mask.dtype}.")


def check_patches(patches: torch.Tensor, token_mask: torch.Tensor | None, max_tokens, config: ViT3DConfig) -> None:
    """As `check_input`, where `pixel_values` are the kept patches alone."""
    if token_mask is None or token_mask.ndim != 4 or token_mask.dtype != torch.bool:
        raise ValueError(
            "Patches without their windows need a bool `token_mask` (batch, *grid) that says where they lie."
        )
    if max_tokens is not None:
        raise ValueError("`max_tokens` pads windows, and patches without their windows are not padded.")
    expected = (int(token_mask.sum()), config.num_channels * math.prod(config.patch_size))
    if tuple(patches.shape) != expected:
        raise ValueError(
            f"`pixel_values` must be the patches that `token_mask` keeps, {expected}, got {tuple(patches.shape)}."
        )
