"""A 3D encoder made from a 2D ViT computes what the 2D ViT computes."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torch.testing import assert_close
from transformers import ViTConfig, ViTModel

from vit3d import ViT3DForNeuronSegmentation
from vit3d.model.inflation_vit3d import inflate_kernel, inflate_state, reduce_channels, shrink_kernel
from vit3d.model.packing_vit3d import to_patches

KERNEL = "embeddings.patch_embeddings.projection.weight"
DEPTH = "embeddings.depth_embeddings"
from_2d = ViT3DForNeuronSegmentation.from_2d_pretrained


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory):
    """Folder of a 2D ViT with 16-pixel patches, a 3x3 position table and no weight at its usual start value."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    vit = ViTModel(ViTConfig(**sizes, image_size=48, patch_size=16), add_pooling_layer=False)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("vit")
    vit.save_pretrained(folder)
    return folder


@pytest.fixture(params=["tiny", "deit"])
def source(request, tiny_vit) -> str:
    if request.param == "tiny":
        return str(tiny_vit)
    return str(request.getfixturevalue("shared") / "weights/deit-tiny-patch16-224")


@pytest.fixture(params=["center", "average"])
def strategy(request) -> str:
    return request.param


@pytest.fixture
def vit(source) -> ViTModel:
    return ViTModel.from_pretrained(source, add_pooling_layer=False, dtype=torch.float32).eval()


def inflated(source, *, depth=8, pixels=48, **kwargs):
    kwargs.setdefault("patch_size", (4, 16, 16))
    return from_2d(source, volume_size=(depth, pixels, pixels), **kwargs).eval()


def grey(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def rgb(image: torch.Tensor) -> torch.Tensor:
    """(batch, height, width) -> (batch, 3, height, width)."""
    return image.unsqueeze(1).expand(-1, 3, -1, -1)


def patch_embeddings(model, stack: torch.Tensor) -> torch.Tensor:
    """(batch, depth, height, width) -> (batch, grid_depth, patches of a slice, hidden).

    In float64, as `patch_embeddings_2d`: what is left is the rounding of the weights.
    """
    patches = to_patches(stack.unsqueeze(1).double(), model.config.patch_size)
    grid_depth = stack.shape[1] // model.config.patch_size[0]
    return model.vit3d.embeddings.patch_embeddings.double()(patches).unflatten(1, (grid_depth, -1))


def patch_embeddings_2d(vit: ViTModel, image: torch.Tensor) -> torch.Tensor:
    """(batch, height, width) -> (batch, patches, hidden)."""
    return vit.embeddings.patch_embeddings.double()(rgb(image).double())


@torch.no_grad()
def test_a_stack_constant_in_z_gives_the_2d_patch_embeddings(source, vit, strategy):
    image = grey(2, 48, 64)
    tokens = patch_embeddings(inflated(source, strategy=strategy), image.unsqueeze(1).expand(-1, 8, -1, -1))
    expected = patch_embeddings_2d(vit, image)
    for depth in range(2):
        assert_close(tokens[:, depth], expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 3, 4])
def test_center_gives_the_2d_patch_embeddings_of_the_middle_slice_of_any_stack(source, vit, depth):
    stack = grey(2, 2 * depth, 48, 64)
    tokens = patch_embeddings(inflated(source, depth=2 * depth, patch_size=(depth, 16, 16)), stack)
    for k in range(2):
        expected = patch_embeddings_2d(vit, stack[:, k * depth + depth // 2])
        assert_close(tokens[:, k], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_average_gives_the_2d_patch_embeddings_of_the_mean_slice(source, vit):
    stack = grey(2, 4, 48, 64)
    tokens = patch_embeddings(inflated(source, depth=4, strategy="average"), stack)[:, 0]
    assert_close(tokens, patch_embeddings_2d(vit, stack.double().mean(1)), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["volume", "center_slice"])
def test_with_one_depth_token_the_encoder_is_the_2d_encoder(source, vit, strategy, prediction):
    image = grey(2, *[vit.config.image_size] * 2)
    model = inflated(source, strategy=strategy, depth=4, pixels=vit.config.image_size, prediction=prediction)
    found = model.vit3d(image[:, None, None].expand(-1, -1, 4, -1, -1)).last_hidden_state
    assert_close(found, vit(rgb(image)).last_hidden_state, atol=1e-3, rtol=0)


@torch.no_grad()
def test_on_another_grid_the_positions_are_resized_as_in_2d(source, vit):
    image = grey(1, 64, 80)
    found = inflated(source, depth=4).vit3d(image[:, None, None].expand(-1, -1, 4, -1, -1)).last_hidden_state
    expected = vit(rgb(image), interpolate_pos_encoding=True).last_hidden_state
    assert_close(found, expected, atol=1e-3, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("patch", [(8, 8), (4, 8), (16, 2)])
def test_a_shrunk_kernel_gives_the_tokens_of_the_image_enlarged_by_pixel_replication(source, vit, patch):
    image = grey(2, 3 * patch[0], 4 * patch[1])
    model = inflated(source, patch_size=(1, *patch), depth=1)
    enlarged = image.repeat_interleave(16 // patch[0], 1).repeat_interleave(16 // patch[1], 2)
    found = patch_embeddings(model, image.unsqueeze(1))[:, 0]
    assert_close(found, patch_embeddings_2d(vit, enlarged), atol=1e-5, rtol=0)


@torch.no_grad()
def test_with_small_patches_the_whole_encoder_sees_the_enlarged_image(source, vit):
    size = vit.config.image_size
    image = grey(1, size // 2, size // 2)
    model = inflated(source, patch_size=(4, 8, 8), depth=4, pixels=size // 2)
    found = model.vit3d(image[:, None, None].expand(-1, -1, 4, -1, -1)).last_hidden_state
    enlarged = image.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert_close(found, vit(rgb(enlarged)).last_hidden_state, atol=1e-3, rtol=0)


def test_every_encoder_tensor_is_inherited_and_the_depth_embedding_is_zero(source, vit, strategy):
    state, state_2d = inflated(source, strategy=strategy).vit3d.state_dict(), vit.state_dict()
    assert set(state) - set(state_2d) == {DEPTH}
    assert set(state_2d) <= set(state)
    assert not state[DEPTH].any()
    for name in set(state_2d) - {KERNEL}:
        assert torch.equal(state[name], state_2d[name]), name
    assert_close(state[KERNEL].sum((1, 2)), state_2d[KERNEL].sum(1), atol=1e-6, rtol=1e-6)


def test_the_config_is_inherited_too(source, vit):
    config = inflated(source).config
    for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "layer_norm_eps", "hidden_act"):
        assert getattr(config, name) == getattr(vit.config, name), name
    assert config.position_grid == (vit.config.image_size // 16,) * 2
    assert config.fused_layers[-1] == vit.config.num_hidden_layers


def test_random_inherits_nothing(tiny_vit):
    torch.manual_seed(7)
    control = inflated(str(tiny_vit), strategy="random")
    torch.manual_seed(7)
    fresh = ViT3DForNeuronSegmentation(control.config)
    inherited = inflated(str(tiny_vit)).vit3d.state_dict()
    for name, tensor in control.vit3d.state_dict().items():
        assert name == DEPTH or not torch.equal(tensor, inherited[name]), name
        assert torch.equal(tensor, fresh.vit3d.state_dict()[name]), name
    assert control.config.to_dict() == inflated(str(tiny_vit)).config.to_dict()


def test_mean_answers_a_third_of_sum():
    weight = torch.randn(5, 3, 4, 4)
    assert_close(reduce_channels(weight, 1, "mean") * 3, reduce_channels(weight, 1, "sum"))
    assert_close(reduce_channels(weight, 1, "sum")[:, 0], weight.sum(1))


def test_mean_reaches_the_network(tiny_vit):
    kernels = [
        inflated(str(tiny_vit), channel_reduction=reduction).vit3d.state_dict()[KERNEL] for reduction in ("sum", "mean")
    ]
    assert_close(kernels[0], 3 * kernels[1])


@torch.no_grad()
def test_equal_channels_answer_like_one(tiny_vit):
    stack = grey(1, 1, 4, 48, 48)
    one, two = (inflated(str(tiny_vit), depth=4, num_channels=channels) for channels in (1, 2))
    found = two.vit3d(stack.expand(-1, 2, -1, -1, -1)).last_hidden_state
    assert_close(found, one.vit3d(stack).last_hidden_state, atol=1e-5, rtol=0)


def test_the_statistics_of_the_photographs_are_taken_from_the_source(shared):
    config = inflated(str(shared / "weights/deit-tiny-patch16-224")).config
    assert config.image_mean == pytest.approx((0.485 + 0.456 + 0.406) / 3)
    assert config.image_std == pytest.approx((0.229 + 0.224 + 0.225) / 3)


def test_a_source_that_is_no_vit_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="is a 'bert' model, not a 'vit'"):
        from_2d(str(tmp_path))


def test_a_source_that_is_no_checkpoint_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="is neither a folder with a 2D ViT nor a model that the Hub"):
            from_2d(str(folder))


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"hidden_size": 64}, "has weights of other sizes than its config says: .*'embeddings.cls_token'"),
        ({"patch_size": 8}, "has weights of other sizes than its config says: .*'embeddings.patch_embeddings"),
        ({"hidden_act": "foo"}, "`hidden_act` 'foo' is no activation"),
        ({"hidden_size": "x"}, "'hidden_size' expected int"),
        ({"num_attention_heads": 0}, "must divide by `num_attention_heads` 0"),
        ({"patch_size": 0}, "cannot be read as a 2D ViT"),
        ({"num_hidden_layers": 1}, r"has layers that its config does not say: \['layers.1"),
    ],
)
def test_a_source_whose_config_is_broken_is_refused(tiny_vit, tmp_path, fields, sentence):
    shutil.copytree(tiny_vit, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(json.loads((tiny_vit / "config.json").read_text()) | fields))
    assert_refused(tmp_path, sentence)


@pytest.mark.parametrize("size", [0, 1000])
def test_a_source_whose_weights_are_cut_off_is_refused(tiny_vit, tmp_path, size):
    shutil.copytree(tiny_vit, tmp_path, dirs_exist_ok=True)
    os.truncate(tmp_path / "model.safetensors", size)
    assert_refused(tmp_path, r"cannot be read as a 2D ViT \(SafetensorError")


def test_one_grey_level_for_all_colours_is_taken_as_it_is_and_a_word_is_not(tiny_vit, tmp_path):
    shutil.copytree(tiny_vit, tmp_path, dirs_exist_ok=True)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": 0.5, "image_std": [0.2, 0.3, 0.4]}))
    config = inflated(str(tmp_path)).config
    assert (config.image_mean, config.image_std) == pytest.approx((0.5, 0.3))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": 0, "image_std": 1}))
    config = inflated(str(tmp_path)).config
    assert (config.image_mean, config.image_std) == (0, 1)
    (tmp_path / "preprocessor_config.json").write_text("{")
    assert_refused(tmp_path, "cannot be read as a 2D ViT .*preprocessor_config.json")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": "grey"}))
    assert_refused(tmp_path, r"cannot be read as a 2D ViT \(TypeError")


def assert_refused(source, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"`source` '{source}' .*{sentence}") as error:
        inflated(str(source))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("patch_size", [(4, 6, 8), (4, 8, 12), (4, 32, 32)])
def test_a_patch_that_does_not_divide_the_kernel_is_refused(tiny_vit, patch_size):
    with pytest.raises(ValueError, match="cannot inherit a 16x16 kernel: it must divide it"):
        from_2d(str(tiny_vit), patch_size=patch_size, volume_size=(8, 96, 96))


def test_a_patch_that_does_not_divide_the_window_is_refused(tiny_vit):
    with pytest.raises(ValueError, match=r"must be a multiple of .* the nearest that fits is \(8, 48, 48\)"):
        from_2d(str(tiny_vit), patch_size=(4, 16, 16), volume_size=(8, 48, 50))
    with pytest.raises(ValueError, match="need three numbers"):
        from_2d(str(tiny_vit), patch_size=8)


def test_a_missing_weight_is_named(tiny_vit, tmp_path):
    weights = load_file(tiny_vit / "model.safetensors")
    name = next(name for name in weights if name.endswith("layernorm_after.weight"))
    save_file({key: w for key, w in weights.items() if key != name}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((tiny_vit / "config.json").read_text())
    with pytest.raises(ValueError, match=r"lacks weights of a ViT: \['layers.0.layernorm_after.weight'\]"):
        from_2d(str(tmp_path))


def test_tensors_that_do_not_fit_are_named():
    target = {KERNEL: torch.zeros(2, 1, 4, 8, 8), DEPTH: torch.zeros(1, 4, 2), "cls_token": torch.zeros(1, 1, 2)}
    state = {KERNEL: torch.zeros(2, 3, 16, 16), "cls_token": torch.zeros(1, 1, 3), "pooler": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"do not fit each other: \['pooler', 'cls_token'\]"):
        inflate_state(state, target, "center")
    with pytest.raises(ValueError, match="it is no ViT"):
        inflate_state({}, target, "center")


@pytest.mark.parametrize("strategy", ["center", "random"])
def test_the_weights_have_the_dtype_that_was_asked_for(tiny_vit, strategy):
    model = inflated(str(tiny_vit), strategy=strategy, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {model.config.dtype} == {torch.bfloat16}
    assert inflated(str(tiny_vit), strategy=strategy).dtype == torch.float32


def test_unknown_words_are_refused(tiny_vit):
    with pytest.raises(ValueError, match="`ViT3DConfig` has no field volum_size"):
        from_2d(str(tiny_vit), volum_size=(8, 48, 48))
    with pytest.raises(ValueError, match=r"`strategy` must be one of .*, got 'middle'"):
        from_2d(str(tiny_vit), strategy="middle")
    with pytest.raises(ValueError, match=r"`channel_reduction` must be one of .*, got 'max'"):
        from_2d(str(tiny_vit), channel_reduction="max")
    with pytest.raises(ValueError, match="`strategy` must be 'center' or 'average' to inflate a kernel"):
        inflate_kernel(torch.zeros(1, 1, 2, 2), 2, "random")


def test_shrinking_is_the_transpose_of_enlarging():
    kernel, patch = torch.randn(1, 1, 16, 16), torch.randn(1, 1, 4, 8)
    enlarged = functional.interpolate(patch, (16, 16), mode="nearest")
    assert_close((shrink_kernel(kernel, (4, 8)) * patch).sum(), (kernel * enlarged).sum(), atol=1e-4, rtol=0)
