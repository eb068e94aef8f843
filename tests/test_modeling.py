"""The network: what is saved comes back, what is left out costs nothing elsewhere, and it learns."""

import copy
import math

import pytest
import torch
from accelerate.utils import send_to_device
from torch.nn import functional
from torch.testing import assert_close
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation

from vit3d import ViT3DConfig, ViT3DForNeuronSegmentation, ViT3DImageProcessor, ViT3DModel
from vit3d.model import modeling_vit3d, packing_vit3d
from vit3d.model.head_vit3d import BACKGROUND_LOGIT, HALO
from vit3d.model.modeling_vit3d import (
    segmentation_loss,
)
from vit3d.model.packing_vit3d import from_patches, pack_tokens, to_patches

NUM_LAYERS, HIDDEN = 2, 32
WINDOW = {"volume": (8, 16, 24), "center_slice": (8, 16, 24)}
PATCH = {"volume": (4, 8, 8), "center_slice": (8, 8, 8)}


@pytest.fixture(params=["volume", "center_slice"])
def prediction(request) -> str:
    return request.param


@pytest.fixture
def fresh_compiler():
    """What was compiled before makes later sizes symbolic; torch 2.13 fails on three of them before a convolution."""
    torch.compiler.reset()


def tiny_config(prediction: str = "volume", **fields) -> ViT3DConfig:
    sizes = dict(hidden_size=HIDDEN, num_hidden_layers=NUM_LAYERS, num_attention_heads=2, intermediate_size=64)
    window = dict(volume_size=WINDOW[prediction], patch_size=PATCH[prediction], prediction=prediction)
    head = dict(fused_layers=(1, 2), head_channels=4, position_grid=(3, 3))
    return ViT3DConfig(**{**sizes, **window, **head, **fields})


def tiny_model(prediction: str = "volume", **fields) -> ViT3DForNeuronSegmentation:
    """In evaluation mode, every weight random and none small, so that every part of the network shows."""
    torch.manual_seed(0)
    model = ViT3DForNeuronSegmentation(tiny_config(prediction, **fields)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def stack(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def window(prediction: str, batch: int = 1, **kwargs) -> torch.Tensor:
    return stack(batch, 1, *WINDOW[prediction], **kwargs)


def grid_mask(prediction: str, batch: int = 1, share: float = 1.0) -> torch.Tensor:
    grid = tiny_config(prediction).grid_size
    return torch.rand(batch, *grid, generator=torch.Generator().manual_seed(2)) < share


def gradients(model, pixel_values: torch.Tensor, **kwargs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(pixel_values, **kwargs).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed(pixel_values: torch.Tensor, token_mask: torch.Tensor, prediction: str) -> torch.Tensor:
    """The kept patches alone."""
    return to_patches(pixel_values, tiny_config(prediction).patch_size)[token_mask.flatten(1)]


# --- patches ---------------------------------------------------------------------------------------------------


def test_cutting_into_patches_and_putting_together_are_inverse():
    volume = stack(2, 3, 8, 15, 14)
    patches = to_patches(volume, (4, 5, 7))
    assert patches.shape == (2, 2 * 3 * 2, 3 * 4 * 5 * 7)
    assert torch.equal(from_patches(patches, (2, 3, 2), (4, 5, 7)), volume)


def test_the_patch_embedding_is_a_convolution():
    model = tiny_model(num_channels=2).double().vit3d
    volume = stack(2, 2, 8, 16, 24).double()
    tokens = model.embeddings.patch_embeddings(to_patches(volume, (4, 8, 8)))
    expected = model.embeddings.patch_embeddings.projection(volume).flatten(2).transpose(1, 2)
    assert_close(tokens, expected, atol=1e-5, rtol=0)


def dense_windows(volume: torch.Tensor, size: tuple[int, ...], halo: int, kept: torch.Tensor) -> torch.Tensor:
    """Windows of `size` and a halo around the kept patches of a volume that already has the halo."""
    row, *corner = kept
    for axis, patch in enumerate(size):
        volume = volume.unfold(2 + axis, patch + 2 * halo, patch)
    return volume[row, :, corner[0], corner[1], corner[2]]


@torch.no_grad()
def test_windows_of_kept_patches_are_those_of_the_dense_volume(prediction):
    head = tiny_model(prediction).head
    size, channels = head.config.painted_size, head.config.head_channels
    grid, mask = head.config.grid_size, grid_mask(prediction, batch=2, share=0.6)
    kept = mask.nonzero().T
    painted = stack(kept.shape[1], channels * math.prod(size))
    dense = torch.zeros(2, math.prod(grid), painted.shape[1])
    dense[mask.flatten(1)] = painted
    dense = functional.pad(from_patches(dense, grid, size), (1,) * 6)
    table = torch.full((2, *(n + 2 for n in grid)), len(painted))
    row, z, y, x = kept
    table[row, z + 1, y + 1, x + 1] = torch.arange(len(painted))
    features = functional.pad(painted.unflatten(1, (channels, -1)).transpose(1, 2), (0, 0, 0, 0, 0, 1))
    found = head._painted_windows(features, table, kept)
    assert torch.equal(found, dense_windows(dense, size, 1, kept))
    raw = head._with_halo(window(prediction, 2))
    assert torch.equal(head._raw_windows(raw, kept), dense_windows(raw, size, HALO, kept))


@pytest.mark.parametrize("scores", [7, 600, 2**18])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_blocks_is_attention(scores, masked, monkeypatch):
    monkeypatch.setattr(modeling_vit3d, "SCORES_AT_ONCE", scores)
    query, key, value = (torch.randn(3, 19, 2, 8).transpose(1, 2) for _ in range(3))
    seen = (torch.arange(19) < torch.tensor([19, 4, 11])[:, None])[:, None, None].expand(3, 1, 19, 19)
    mask = seen if masked else None
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3).transpose(1, 2)
    found, _ = modeling_vit3d.blocked_attention_forward(None, query, key, value, mask, 0.3)
    assert_close(found, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("alike", [-1, 1, 1000])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_windows_say_what_padded_ones_say(prediction, attention, alike, monkeypatch):
    monkeypatch.setattr(packing_vit3d, "MOST_PADDED", alike)
    model = tiny_model(prediction, attn_implementation=attention)
    inputs, mask = window(prediction, 6), grid_mask(prediction, batch=6, share=0.6)
    mask[1], mask[3] = False, True
    mask[4] = torch.arange(mask[4].numel()).view_as(mask[4]) < 1
    expected = model.head.fuse(model.vit3d(inputs, mask).fused_states)[pack_tokens(mask.flatten(1))[1]]
    found = model(packed(inputs, mask, prediction), mask).tokens
    assert len(found) == mask.sum() > 10
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    count = mask.flatten(1).sum(1)
    class_rows = (1 + count).cumsum(0) - 1 - count
    states = model.vit3d(packed(inputs, mask, prediction), mask).last_hidden_state
    assert_close(states[0, class_rows], model.vit3d(inputs, mask).last_hidden_state[:, 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_packed_windows_are_encoded_in_bf16_too(prediction):
    model = tiny_model(prediction).to(torch.bfloat16)
    inputs, mask = window(prediction, 3), grid_mask(prediction, batch=3, share=0.6)
    found = model(packed(inputs, mask, prediction), mask).tokens
    expected = model.head.fuse(model.vit3d(inputs, mask).fused_states)[pack_tokens(mask.flatten(1))[1]]
    assert found.dtype == torch.bfloat16
    assert_close(found, expected, atol=0.02, rtol=0.02)


def test_accelerate_moves_packed_windows_with_the_tokens():
    """As it does between layers on different devices."""
    windows = packing_vit3d.PackedWindows.of(grid_mask("volume", batch=3, share=0.6))
    moved = send_to_device({"windows": windows}, "meta")["windows"]
    tensors = [moved.places, moved.order, moved.patch_rows, moved.groups[0].rows, moved.groups[0].places]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.groups[0].rows.shape == windows.groups[0].rows.shape


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_a_compiled_network_takes_any_number_of_groups(monkeypatch):
    """Each would else be one more graph, and torch compiles only some."""
    monkeypatch.setattr(packing_vit3d, "MOST_PADDED", -1)  # each window for itself
    model, graphs, counted = tiny_model(), [], []
    model.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for batch in range(2, 8):
        inputs, mask = window("volume", batch), grid_mask("volume", batch=batch, share=0.6)
        model(packed(inputs, mask, "volume"), mask)
        counted.append(len(graphs))
    assert 0 < counted[1] == counted[-1], counted


@torch.no_grad()
def test_windows_of_one_length_with_another_between_them_attend_each_to_itself(prediction, monkeypatch):
    monkeypatch.setattr(packing_vit3d, "FREE_PADDING", 0)
    model, inputs, mask = tiny_model(prediction), window(prediction, 3), torch.ones_like(grid_mask(prediction, batch=3))
    mask[[0, 2]] = torch.arange(mask[0].numel()).view_as(mask[0]) < 2
    expected = model.head.fuse(model.vit3d(inputs, mask).fused_states)[pack_tokens(mask.flatten(1))[1]]
    assert_close(model(packed(inputs, mask, prediction), mask).tokens, expected, atol=1e-5, rtol=1e-5)


def test_windows_of_like_length_attend_together_and_little_is_padded():
    count = torch.tensor([1, 784, 3, 700, 4, 30, 31, 29, 6, 100])
    groups = [sorted(count[windows].tolist()) for windows in packing_vit3d._alike(count)]
    assert groups == [[1, 3, 4], [6], [29, 30, 31], [100], [700, 784]]


def test_patches_that_do_not_fit_their_windows_are_refused(prediction):
    model = tiny_model(prediction)
    inputs, mask = window(prediction, 2), grid_mask(prediction, batch=2, share=0.6)
    patches = packed(inputs, mask, prediction)
    for wrong, sentence in (
        ((patches, None), "need a bool `token_mask`"),
        ((patches, mask.int()), "need a bool `token_mask`"),
        ((patches, mask[0]), "need a bool `token_mask`"),
        ((patches[1:], mask), "must be the patches that `token_mask` keeps"),
        ((patches[:, 1:], mask), "must be the patches that `token_mask` keeps"),
    ):
        with pytest.raises(ValueError, match=sentence):
            model(*wrong)
    with pytest.raises(ValueError, match="not padded"):
        model(patches, mask, max_tokens=3)
    with pytest.raises(ValueError, match="of voxels"):
        model(patches, mask, labels=mask)


@torch.no_grad()
def test_inference_in_bf16_on_a_cpu_attends_in_blocks_and_gives_the_same(prediction, monkeypatch):
    model = tiny_model(prediction).to(torch.bfloat16)
    inputs, mask = window(prediction, 2).to(torch.bfloat16), grid_mask(prediction, batch=2, share=0.6)
    expected = model(inputs, mask).logits
    monkeypatch.setattr(modeling_vit3d, "_is_slow_when_fused", lambda _: False)
    assert_close(model(inputs, mask).logits, expected, atol=0.1, rtol=0.05)
    assert not torch.equal(model(inputs, mask).logits, expected)


@torch.no_grad()
def test_attention_drops_out_in_bf16_on_a_cpu_too_while_training(prediction):
    model = tiny_model(prediction, attention_probs_dropout_prob=0.5).to(torch.bfloat16).train()
    inputs = window(prediction, 2).to(torch.bfloat16)
    assert not torch.equal(model(inputs).logits, model(inputs).logits)


def test_kept_patches_come_first_in_raster_order_and_padding_is_marked():
    indices, real = pack_tokens(torch.tensor([[0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool())
    assert indices[0].tolist() == [1, 3]
    assert indices[1, 0] == 2
    assert real.tolist() == [[True, True], [True, False], [False, False]]


@torch.no_grad()
def test_a_kept_patch_has_its_own_position(prediction):
    embeddings = tiny_model(prediction).vit3d.embeddings
    pixel_values, mask = window(prediction), grid_mask(prediction, share=0.6).flatten(1)
    dense = embeddings(pixel_values)
    found = embeddings(pixel_values, pack_tokens(mask)[0])
    assert 0 < mask.sum() < mask.numel()
    assert_close(found[:, 1:], dense[:, 1:][mask][None], atol=1e-5, rtol=0)
    assert torch.equal(found[:, 0], dense[:, 0])


@pytest.mark.parametrize("dense", [True, False])
def test_every_token_paints_its_own_patch(prediction, dense):
    """Without attention a voxel sees its own patch and, through the image, the halo around itself."""
    model, pixel_values = tiny_model(prediction, patch_size=(8, 8, 8)), window(prediction).requires_grad_()
    for layer in model.vit3d.layers:
        torch.nn.init.zeros_(layer.attention.o_proj.weight)
    mask = None if dense else torch.tensor([1, 1, 0, 0, 1, 1]).bool().view(1, 1, 2, 3)
    model(pixel_values, mask).logits[0, 0, -1, 12, 12].backward()  # in the patch of rows and columns 8 to 15
    seen = pixel_values.grad[0, 0].nonzero()
    assert seen.min(0).values.tolist() == [0, 8, 8]
    assert seen.max(0).values.tolist() == [7, 15, 15]


# --- token mask ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_mask_of_all_ones_is_the_dense_computation(prediction):
    model, pixel_values = tiny_model(prediction), window(prediction, 2)
    dense = model(pixel_values).logits
    assert dense.shape == (2, 1, *model.config.output_size)
    assert_close(model(pixel_values, grid_mask(prediction, 2)).logits, dense, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("max_tokens", [5, 100])
def test_padding_to_a_fixed_number_of_tokens_changes_no_logit(prediction, max_tokens):
    model, pixel_values, mask = tiny_model(prediction), window(prediction, 2), grid_mask(prediction, 2, share=0.4)
    mask[1] = False
    mask[1, 0, 0, 1] = True
    found = model(pixel_values, mask, max_tokens=max_tokens).logits
    assert_close(found, model(pixel_values, mask).logits, atol=1e-5, rtol=0)
    assert (to_patches(found, model.config.painted_size)[~mask.flatten(1)] == BACKGROUND_LOGIT).all()


def test_a_mask_with_more_patches_than_the_fixed_number_fails(prediction):
    mask = grid_mask(prediction)
    with pytest.raises(RuntimeError, match=r"`token_mask` keeps more than 3 patches\."):
        tiny_model(prediction)(window(prediction), mask, max_tokens=3)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
@pytest.mark.parametrize("max_tokens", [None, 6])
def test_the_whole_network_compiles_into_one_graph(prediction, max_tokens):
    """Dense, and with a fixed number of tokens; the graph serves any mask and any stack of one size."""
    model = tiny_model(prediction)
    compiled = torch.compile(model, fullgraph=True)
    for seed in range(2):
        pixel_values = stack(2, 1, *model.config.volume_size, seed=seed)
        mask = grid_mask(prediction, 2, share=0.3 + 0.1 * seed) if max_tokens else None
        found = compiled(pixel_values, mask, max_tokens=max_tokens)
        expected = model(pixel_values, mask)
        assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)


def test_a_new_head_begins_with_rare_neurites_whether_it_is_made_or_missing_from_a_checkpoint(tmp_path):
    config = tiny_config(head_channels=32)
    made = ViT3DForNeuronSegmentation(config)
    ViT3DModel(config).save_pretrained(tmp_path)
    for model in (made, ViT3DForNeuronSegmentation.from_pretrained(tmp_path)):
        head = model.head
        assert head.classifier.bias.eq(-3).all()
        for conv in (head.stem, head.mix):
            assert conv.weight.std().item() == pytest.approx((2 / conv.weight[0].numel()) ** 0.5, rel=0.1)
            assert conv.bias.eq(0).all()


@torch.no_grad()
def test_an_exported_network_takes_any_batch():
    model, batch = tiny_model(), torch.export.Dim("batch", min=2, max=8)
    exported = torch.export.export(model, (window("volume", 3),), dynamic_shapes={"pixel_values": {0: batch}})
    inputs = window("volume", 5, seed=3)
    assert_close(exported.module()(inputs).logits, model(inputs).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_patch_left_out_is_background_and_the_rest_is_not(prediction):
    model, mask = tiny_model(prediction), grid_mask(prediction, 2, share=0.6)
    logits = to_patches(model(window(prediction, 2), mask).logits, model.config.painted_size)
    assert 0 < mask.float().mean() < 1
    assert (logits[~mask.flatten(1)] == BACKGROUND_LOGIT).all()
    assert (logits[mask.flatten(1)] != BACKGROUND_LOGIT).all()


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_a_stack_of_background_alone_is_painted_as_background(prediction, batch):
    mask = torch.zeros_like(grid_mask(prediction, batch))
    mask[1:] = True
    logits = tiny_model(prediction)(window(prediction, batch), mask).logits
    assert (logits[0] == BACKGROUND_LOGIT).all()
    assert logits.isfinite().all()


@torch.no_grad()
def test_voxels_deep_inside_a_left_out_patch_are_seen_by_nobody(prediction):
    model = tiny_model(prediction, patch_size=(8, 8, 8))
    pixel_values, mask = window(prediction), torch.ones(1, 1, 2, 3, dtype=torch.bool)
    mask[0, 0, 0, 1] = False
    before = model(pixel_values, mask).logits
    inside = slice(8 + HALO, 16 - HALO)
    changed = pixel_values.clone()
    changed[..., : 8 - HALO, inside] += 5
    assert torch.equal(model(changed, mask).logits, before)
    assert not torch.equal(model(changed).logits[..., 16:], model(pixel_values).logits[..., 16:])
    changed[..., : 8 - HALO, 15] += 5  # within the halo of the patch beside it
    after = model(changed, mask).logits
    assert torch.equal(after[..., 16 + HALO :], before[..., 16 + HALO :])
    assert not torch.equal(after[..., 16 : 16 + HALO], before[..., 16 : 16 + HALO])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_row_of_a_batch_is_what_it_is_alone(prediction, attention):
    model = tiny_model(prediction)
    model.set_attn_implementation(attention)
    pixel_values, mask = window(prediction, 3), grid_mask(prediction, 3, share=0.5)
    mask[1] = True
    assert len(set(mask.sum((1, 2, 3)).tolist())) > 1
    together = model(pixel_values, mask).logits
    for row in range(3):
        alone = model(pixel_values[row : row + 1], mask[row : row + 1]).logits
        assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)


# --- saving and loading ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_save_and_load_are_bit_equal_also_through_the_auto_classes(prediction, tmp_path):
    model, pixel_values = tiny_model(prediction, training_spacing_um=(1.0, 0.33, 0.33)), window(prediction)
    processor = ViT3DImageProcessor.from_config(model.config, polarity="dark")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for loader in (ViT3DForNeuronSegmentation, AutoModelForSemanticSegmentation):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is ViT3DForNeuronSegmentation
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
        assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is ViT3DModel
    expected = model.vit3d(pixel_values).last_hidden_state
    assert torch.equal(base(pixel_values).last_hidden_state, expected)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is ViT3DConfig
    for name in ("volume_size", "patch_size", "prediction", "fused_layers", "training_spacing_um", "num_labels"):
        assert getattr(config, name) == getattr(model.config, name), name
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is ViT3DImageProcessor
    assert (loaded.polarity, loaded.volume_size, loaded.patch_size) == ("dark", *_sizes(model.config))


def _sizes(config: ViT3DConfig) -> tuple:
    return config.volume_size, config.patch_size


@pytest.mark.parametrize("inherited", ["vit3d.", "head."])
def test_loading_a_part_leaves_no_weight_uninitialised(prediction, inherited, tmp_path):
    saved = tiny_model(prediction)
    state = {name: tensor for name, tensor in saved.state_dict().items() if name.startswith(inherited)}
    if inherited == "vit3d.":
        saved.vit3d.save_pretrained(tmp_path)
    else:
        saved.save_pretrained(tmp_path, state_dict=dict(state))
    loaded = ViT3DForNeuronSegmentation.from_pretrained(tmp_path).state_dict()
    fresh = ViT3DForNeuronSegmentation(saved.config).state_dict()
    for name, tensor in loaded.items():
        if name in state:
            assert torch.equal(tensor, state[name]), name
        elif fresh[name].unique().numel() == 1:  # a constant at the start: biases, norms, depth embedding
            assert torch.equal(tensor, fresh[name]), name
        else:
            assert 0.2 < tensor.std() / fresh[name].std() < 5, name  # as few as eight numbers
            assert tensor.abs().max() < 1, name


def test_one_seed_gives_one_network(prediction):
    twins = []
    for _ in range(2):
        torch.manual_seed(3)
        twins.append(ViT3DForNeuronSegmentation(tiny_config(prediction)))
    for (name, a), b in zip(twins[0].named_parameters(), twins[1].parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not twins[0].vit3d.embeddings.depth_embeddings.any()


def test_the_network_is_built_without_memory_and_loaded_in_the_dtype_of_its_file(tmp_path):
    with torch.device("meta"):
        empty = ViT3DForNeuronSegmentation(tiny_config())
    assert all(parameter.is_meta for parameter in empty.parameters())
    model = tiny_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    for dtype, expected in (("auto", torch.bfloat16), (torch.float32, torch.float32)):
        loaded = ViT3DForNeuronSegmentation.from_pretrained(tmp_path, dtype=dtype, low_cpu_mem_usage=True)
        for name, parameter in loaded.named_parameters():
            assert parameter.dtype == expected, name
            assert torch.equal(parameter.bfloat16(), model.state_dict()[name]), name


def test_a_head_of_another_size_is_made_anew_and_the_rest_is_kept(tmp_path):
    saved = tiny_model()
    saved.save_pretrained(tmp_path)
    labels = {"id2label": {0: "axon", 1: "dendrite"}, "label2id": {"axon": 0, "dendrite": 1}}
    loaded = ViT3DForNeuronSegmentation.from_pretrained(tmp_path, num_labels=2, ignore_mismatched_sizes=True, **labels)
    state = saved.state_dict()
    for name, tensor in loaded.state_dict().items():
        if name.startswith("head.classifier."):
            assert len(tensor) == 2
            assert tensor.abs().max() <= 3, name  # memory nobody has written may hold anything
        else:
            assert torch.equal(tensor, state[name]), name
    assert loaded(window("volume")).logits.shape[1] == 2


def test_a_checkpoint_takes_another_height_and_width_of_its_window_and_no_other_depth(tmp_path):
    saved = tiny_model()
    saved.save_pretrained(tmp_path)
    loaded = ViT3DForNeuronSegmentation.from_pretrained(tmp_path, volume_size=(8, 32, 40))
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        ViT3DForNeuronSegmentation.from_pretrained(tmp_path, volume_size=(16, 16, 24))


@torch.no_grad()
def test_shards_and_a_device_map_give_the_same_network(prediction, tmp_path):
    saved, pixel_values = tiny_model(prediction), window(prediction)
    saved.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = ViT3DForNeuronSegmentation.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(loaded(pixel_values).logits, saved(pixel_values).logits)


def test_a_config_comes_back_as_it_was(prediction, tmp_path):
    config = tiny_config(prediction, training_spacing_um=(1.0, 0.33, 0.33), image_mean=0.3)
    config.save_pretrained(tmp_path)
    loaded = ViT3DConfig.from_pretrained(tmp_path)
    expected, found = ({k: v for k, v in c.to_dict().items() if k != "custom_pipelines"} for c in (config, loaded))
    assert found == expected
    assert ViT3DConfig.from_dict(loaded.to_dict()).to_dict() == loaded.to_dict()


# --- the ways to run it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_gradient_checkpointing_gives_the_same_gradients(prediction, share):
    model, pixel_values = tiny_model(prediction).train(), window(prediction, 2)
    mask = grid_mask(prediction, 2, share)
    expected = gradients(model, pixel_values, token_mask=mask)
    unused = set(dict(model.named_parameters())) - set(expected)
    assert unused == {"vit3d.layernorm.weight", "vit3d.layernorm.bias"}  # the head reads the layers themselves
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in model.vit3d.layers)
    for name, gradient in gradients(model, pixel_values, token_mask=mask).items():
        assert_close(gradient, expected[name], msg=name)
        assert gradient.any() or name.endswith("k_proj.bias"), name


@torch.no_grad()
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_sdpa_equals_eager(prediction, share):
    model, pixel_values, mask = tiny_model(prediction), window(prediction, 2), grid_mask(prediction, 2, share)
    logits = {}
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        logits[attention] = model(pixel_values, mask).logits
    assert_close(logits["sdpa"], logits["eager"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_hidden_states_and_attentions_come_when_asked(prediction):
    model, pixel_values = tiny_model(prediction), window(prediction, 2)
    model.set_attn_implementation("eager")
    tokens = 1 + math.prod(model.config.grid_size)
    silent = model(pixel_values)
    assert silent.hidden_states is None
    assert silent.attentions is None
    outputs = model(pixel_values, output_hidden_states=True, output_attentions=True)
    assert [h.shape for h in outputs.hidden_states] == [(2, tokens, HIDDEN)] * (NUM_LAYERS + 1)
    assert [a.shape for a in outputs.attentions] == [(2, 2, tokens, tokens)] * NUM_LAYERS
    assert_close(outputs.attentions[0].sum(-1), torch.ones(2, 2, tokens))
    encoder = model.vit3d(pixel_values, output_hidden_states=True)
    assert_close(model.vit3d.layernorm(encoder.hidden_states[-1]), encoder.last_hidden_state)
    assert torch.equal(model(pixel_values, return_dict=False)[0], silent.logits)
    model.config.output_hidden_states = True
    assert len(model(pixel_values).hidden_states) == NUM_LAYERS + 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_hidden_states_and_attentions(prediction, checkpointing):
    model = tiny_model(prediction).train()
    model.set_attn_implementation("eager")
    expected = model(window(prediction), output_hidden_states=True).hidden_states
    if checkpointing:
        model.gradient_checkpointing_enable()
    outputs = model(window(prediction), output_hidden_states=True, output_attentions=not checkpointing)
    kept = [*outputs.hidden_states[:-1], *(outputs.attentions or ())]
    for tensor in kept:
        tensor.retain_grad()
    outputs.logits.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(outputs.hidden_states, expected, strict=True))
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in kept)


@torch.no_grad()
@pytest.mark.parametrize("base", [False, True])
def test_a_tuple_holds_what_the_output_holds(prediction, base):
    model = tiny_model(prediction)
    model.set_attn_implementation("eager")
    model, flags = (model.vit3d if base else model), {"output_hidden_states": True, "output_attentions": True}
    named = model(window(prediction), **flags)
    plain = model(window(prediction), **flags, return_dict=False)
    assert len(plain) == len(named.to_tuple()) == 3 + base  # the encoder's last is what a head paints from
    assert torch.equal(plain[0], named[0])
    for several, expected in zip(plain[1:], named.to_tuple()[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(several, expected, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_bf16_weights_give_fp32_logits(prediction, share):
    model, pixel_values, mask = tiny_model(prediction), window(prediction), grid_mask(prediction, 1, share)
    expected = model(pixel_values, mask).logits
    found = model.to(torch.bfloat16)(pixel_values, mask).logits
    assert found.dtype == torch.float32
    assert_close(found, expected, atol=0.15 * expected.std().item() + 0.1, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("size", [(4, 8, 8), (12, 24, 40), (8, 8, 48)])
def test_any_multiple_of_the_patch_is_predicted(size):
    model = tiny_model()
    logits = model(stack(1, 1, *size)).logits
    assert logits.shape == (1, 1, *size)
    everything = torch.ones(1, *[n // p for n, p in zip(size, PATCH["volume"], strict=True)]).bool()
    assert_close(model(stack(1, 1, *size), everything).logits, logits, atol=1e-4, rtol=0)


def test_sizes_that_do_not_fit_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"of \(8, 16, 20\) voxels must be a multiple of the patch \(4, 8, 8\)"):
        model(stack(1, 1, 8, 16, 20))
    with pytest.raises(ValueError, match="must be a multiple of the patch"):
        model(stack(1, 1, 0, 16, 24))
    with pytest.raises(ValueError, match=r"must be \(batch, 1 channels, depth, height, width\)"):
        model(stack(1, 2, 8, 16, 24))
    with pytest.raises(ValueError, match=r"`token_mask` must be .* = \(1, 2, 2, 3\), got \(1, 2, 3, 2\)"):
        model(stack(1, 1, 8, 16, 24), torch.ones(1, 2, 3, 2).bool())
    with pytest.raises(ValueError, match=r"`token_mask` must be bool, got torch.float32"):
        model(stack(1, 1, 8, 16, 24), torch.ones(1, 2, 2, 3))
    with pytest.raises(ValueError, match="A centre slice is predicted from 8 slices, got 16"):
        tiny_model("center_slice")(stack(1, 1, 16, 16, 24))


@pytest.mark.parametrize(
    "fields, sentence",
    [
        (dict(volume_size=(8, 16, 20)), r"the nearest that fits is \(8, 16, 16\)"),
        (dict(patch_size=(8, 8)), "need three numbers"),
        (dict(num_channels=0), "`num_channels` must be at least 1, got 0"),
        (dict(head_channels=0), "`head_channels` must be at least 1, got 0"),
        (dict(hidden_size=-192), "`hidden_size` must be at least 1, got -192"),
        (dict(hidden_dropout_prob=1.5), "`hidden_dropout_prob` is a probability, from 0 to 1; got 1.5"),
        (dict(layer_norm_eps=float("nan")), "`layer_norm_eps` must be positive, got nan"),
        (dict(image_mean=float("nan")), "`image_mean` must be a number, got nan"),
        (dict(image_std=0.0), "`image_std` must be positive, got 0.0"),
        (dict(position_grid=(14,)), r"`position_grid` \(14,\) must be two numbers"),
        (dict(patch_size=(4, 0, 8)), r"`patch_size` \(4, 0, 8\) must be at least 1"),
        (dict(patch_size=(4, -8, 8)), "must be at least 1"),
        (dict(hidden_act="foo"), "`hidden_act` 'foo' is no activation"),
        (dict(prediction="slice"), "must be 'volume' or 'center_slice', got 'slice'"),
        (dict(prediction="center_slice"), "a patch is as deep as the window"),
        (dict(num_attention_heads=5), "`hidden_size` 192 must .* `num_attention_heads` 5"),
        (dict(fused_layers=(1, 3)), "must lie between 1 and .*2"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_one_sentence(fields, sentence):
    sizes = dict(num_hidden_layers=2, fused_layers=(1, 2), volume_size=(8, 16, 24), patch_size=(4, 8, 8))
    with pytest.raises(ValueError, match=sentence) as error:
        ViT3DConfig(**{**sizes, **fields})
    assert "\n" not in str(error.value)


# --- learning --------------------------------------------------------------------------------------------------


def test_the_loss_has_the_value_that_one_computes_by_hand():
    logits, labels = torch.zeros(1, 1, 1, 2, 4), torch.tensor([[[[1, 1, 0, 0], [0, 0, -100, -100]]]])
    # all probabilities 1/2 over six known voxels, two of them neurite: 1 found, 1 missed, 2 made up
    tversky = (1 + 0.5) / (1 + 0.8 * 1 + 0.2 * 2 + 0.5)
    assert segmentation_loss(logits, labels).item() == pytest.approx((2 * 6 + 4) / 6 * math.log(2) + 1 - tversky)
    certain = torch.where(labels == 1, 20.0, -20.0).unsqueeze(1)
    assert segmentation_loss(certain, labels).item() == pytest.approx(0, abs=1e-6)


def test_a_neurite_voxel_that_is_missed_costs_more_than_one_that_is_made_up():
    labels = torch.zeros(1, 2, 8, 8, dtype=torch.long)
    labels[..., 4:] = 1
    right = torch.where(labels == 1, 6.0, -6.0).unsqueeze(1)
    missed, made_up = right.clone(), right.clone()
    missed[..., 4], made_up[..., 3] = -6.0, 6.0
    assert segmentation_loss(missed, labels) > 2 * segmentation_loss(made_up, labels)


def test_ignored_voxels_teach_nothing(prediction):
    model, pixel_values = tiny_model(prediction), window(prediction)
    labels = (stack(1, *model.config.output_size) > 0).long()
    labels[..., :9] = -100
    outputs = model(pixel_values, labels=labels)
    outputs.logits.retain_grad()
    outputs.loss.backward()
    assert not outputs.logits.grad[..., :9].any()
    assert outputs.logits.grad[..., 9:].all()
    changed = outputs.logits.detach().clone()
    changed[..., :9] += 100
    assert torch.equal(segmentation_loss(changed, labels), outputs.loss.detach())


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_a_batch_without_labels_costs_nothing_and_breaks_nothing(prediction, share):
    model, pixel_values = tiny_model(prediction), window(prediction)
    labels = torch.full((1, *model.config.output_size), -100)
    loss = model(pixel_values, grid_mask(prediction, 1, share), labels=labels).loss
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_labels_that_do_not_fit_are_refused():
    model, pixel_values = tiny_model(), window("volume", 2)
    for shape in ((2, 1, 16, 24), (1, 8, 16, 24), (2, 1, 8, 16, 24), (8, 16, 24)):
        with pytest.raises(ValueError, match=r"`labels` must be .* = \(2, 8, 16, 24\), got \("):
            model(pixel_values, labels=torch.zeros(shape))
    with pytest.raises(ValueError, match=r"`labels` must be .* = \(1, 1, 16, 24\), got \(1, 8, 16, 24\)"):
        tiny_model("center_slice")(window("center_slice"), labels=torch.zeros(1, 8, 16, 24))


def test_there_is_no_loss_of_two_labels():
    labels = torch.zeros(1, *WINDOW["volume"])
    with pytest.raises(ValueError, match="The loss is of one label, neurite, and the network has 2"):
        tiny_model(num_labels=2)(window("volume"), labels=labels)


def test_one_batch_can_be_overfitted(prediction):
    torch.manual_seed(0)
    model = ViT3DForNeuronSegmentation(tiny_config(prediction)).train()
    z, y, x = torch.meshgrid(*[torch.arange(n) for n in WINDOW[prediction]], indexing="ij")
    tube = ((y - 4 - x / 3).abs() < 1.5) & ((z - 4).abs() < 2)
    pixel_values = (tube * 2.0 - 1)[None, None] + 0.7 * window(prediction)
    labels = tube[None].long() if prediction == "volume" else tube[4][None, None].long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = model(pixel_values, labels=labels).loss.item()
    for _ in range(60):
        loss = model(pixel_values, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found, gold = model(pixel_values).logits[:, 0] > 0, labels == 1
    assert loss.item() < 0.2 * first
    assert 2 * (found & gold).sum() / (found.sum() + gold.sum()) > 0.95


def test_the_context_of_a_voxel_is_the_whole_window(prediction):
    """Through the tokens; the image alone reaches a voxel only from `HALO` voxels away."""
    model, pixel_values = tiny_model(prediction), window(prediction).requires_grad_()
    model(pixel_values).logits[0, 0, 0, 0, 0].backward()
    assert pixel_values.grad.all()
    still = copy.deepcopy(model)
    torch.nn.init.zeros_(still.head.painter.weight)
    pixel_values.grad = None
    still(pixel_values).logits[0, 0, 0, 8, 12].backward()
    seen = pixel_values.grad[0, 0].nonzero()
    z = 0 if prediction == "volume" else 4
    assert seen.min(0).values.tolist() == [max(z - HALO, 0), 8 - HALO, 12 - HALO]
    assert seen.max(0).values.tolist() == [z + HALO, 8 + HALO, 12 + HALO]
