import warnings

import pytest
import torch

from fastunlearn.masks import average_map, get_mask, overlay

F, H, W, TEXT, HEADS = 2, 3, 4, 6, 5
N = F * H * W


def maps(seed=0, batch=2, layers=2):
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{i}": torch.rand(batch, HEADS, N, TEXT, generator=generator) for i in range(layers)}


def by_hand(attn_maps, words, thres):
    """Masks computed sample by sample and layer by layer, and the soft average mask."""
    average, masks = 0.0, {}
    for name, attn_map in attn_maps.items():
        samples = []
        for sample, chosen in zip(attn_map.double(), words, strict=True):
            concept = sum(sample[:, :, word].sum(0) / HEADS for word in chosen)
            samples.append((concept - concept.min()) / (concept.max() - concept.min()))
        normalised = torch.stack(samples)
        average = average + normalised / len(attn_maps)
        masks[name] = (normalised >= thres).float().view(-1, F, H, W)
    low, high = average.amin(1, keepdim=True), average.amax(1, keepdim=True)
    soft = ((average - low) / (high - low)).view(-1, F, H, W)
    return masks | {"average_mask": (soft >= thres).float()}, soft


@pytest.mark.parametrize(
    ("word_indices", "words"),
    [([1, 4], [[1, 4], [1, 4]]), (torch.tensor([2]), [[2], [2]]), (torch.tensor([[0, 5], [3, -1]]), [[0, 5], [3]])],
)
@pytest.mark.parametrize("thres", [0.25, 0.6])
def test_masks_equal_those_computed_by_hand(word_indices, words, thres):
    attn_maps = maps()
    before = {name: attn_map.clone() for name, attn_map in attn_maps.items()}
    expected, soft = by_hand(attn_maps, words, thres)
    masks = get_mask(attn_maps, word_indices, thres, H, W, HEADS, TEXT)
    assert masks.keys() == expected.keys()
    for name, mask in masks.items():
        assert mask.dtype == torch.float32
        assert torch.equal(mask, expected[name].float())
    torch.testing.assert_close(average_map(attn_maps, word_indices, H, W), soft.float(), rtol=0, atol=1e-6)
    assert all(torch.equal(attn_maps[name], before[name]) for name in attn_maps)


def test_other_forms_of_the_same_maps_give_the_same_masks():
    attn_maps = maps()
    expected = get_mask(attn_maps, [1, 2], 0.5, H, W)
    flat = {name: attn_map.flatten(0, 1) for name, attn_map in attn_maps.items()}
    summed = {name: attn_map[..., [1, 2]].sum(-1).mean(1) for name, attn_map in attn_maps.items()}
    for masks in (get_mask(flat, [1, 2], 0.5, H, W, head_num=HEADS), get_mask(summed, None, 0.5, H, W)):
        assert all(torch.equal(masks[name], expected[name]) for name in expected)
    assert torch.equal(get_mask(attn_maps, [1, 2], 0.5, 2 * H, 2 * W, patch_size=2)["layer0"], expected["layer0"])


def test_samples_do_not_influence_each_other():
    attn_maps = maps()
    loud = {name: attn_map * torch.tensor([1.0, 100.0])[:, None, None, None] for name, attn_map in attn_maps.items()}
    expected, masks = get_mask(attn_maps, [1], 0.5, H, W), get_mask(loud, [1], 0.5, H, W)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


def test_frames_do_not_influence_each_other_when_normalised_per_frame():
    attn_maps = maps()
    loudness = torch.tensor([1.0, 64.0]).repeat_interleave(H * W)[:, None]
    loud = {name: attn_map * loudness for name, attn_map in attn_maps.items()}
    arguments = ([1], 0.5, H, W)
    quiet, masks = (get_mask(x, *arguments, normalize_per="frame") for x in (attn_maps, loud))
    assert all(torch.equal(masks[name], quiet[name]) for name in quiet)
    assert not torch.equal(masks["layer0"], get_mask(loud, *arguments)["layer0"])
    # A single frame is a sample with one frame.
    alone = {name: attn_map.unflatten(2, (F, H * W))[:, :, 1] for name, attn_map in attn_maps.items()}
    expected = get_mask(alone, *arguments)
    assert all(torch.equal(masks[name][:, 1:], expected[name]) for name in expected)
    soft = average_map(loud, [1], H, W, normalize_per="frame")
    assert torch.equal(soft.amin((2, 3)), torch.zeros(2, F))
    assert torch.equal(soft.amax((2, 3)), torch.ones(2, F))


def test_a_constant_frame_is_empty_and_leaves_the_others_alone():
    concept = torch.rand(1, N)
    concept[:, : H * W] = 0.3
    mask = get_mask({"layer": concept}, None, 0.5, H, W, normalize_per="frame")["layer"]
    assert not mask[:, 0].any()
    assert mask[:, 1].any()


def test_the_average_mask_is_a_tensor_of_its_own():
    masks = get_mask(maps(layers=1), [1], 0.5, H, W)
    kept = masks["layer0"].clone()
    assert torch.equal(masks["average_mask"], kept)
    masks["average_mask"].zero_()
    assert torch.equal(masks["layer0"], kept)


def test_a_constant_map_has_an_empty_mask():
    attn_maps = {"layer": torch.full((1, HEADS, N, TEXT), 0.1)}
    assert not any(mask.any() for mask in get_mask(attn_maps, [1], 0.5, H, W).values())
    assert not average_map(attn_maps, [1], H, W).any()


def test_the_error_for_a_latent_size_suggests_the_patch_size():
    attn_maps = {"layer": torch.rand(1, 17550)}
    with pytest.raises(ValueError, match=r"17550 tokens.*60 x 90 tokens.*pass patch_size=2"):
        get_mask(attn_maps, None, 0.5, 60, 90)
    assert get_mask(attn_maps, None, 0.5, 60, 90, patch_size=2)["layer"].shape == (1, 13, 30, 45)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None, 0.5, H, W), {}, "word_indices.*None"),
        (([TEXT], 0.5, H, W), {}, "word_indices.*below 6"),
        (([-2], 0.5, H, W), {}, "word_indices"),
        (([], 0.5, H, W), {}, "word_indices.*at least one"),
        (([0.5], 0.5, H, W), {}, "word_indices.*int64.*float32"),
        (("ab", 0.5, H, W), {}, "word_indices.*'ab'"),
        (([1], None, H, W), {}, "thres.*None"),
        (([1], 1.5, H, W), {}, "thres.*1.5"),
        (([1], 0.5, 3.0, W), {}, "height.*3.0"),
        (([1], 0.5, H, W), {"patch_size": 1.0}, "patch_size.*1.0"),
        ((torch.zeros(3, 1, dtype=torch.int64), 0.5, H, W), {}, r"word_indices.*\(2, T\)"),
        (([1], 0.5, H, W), {"text_len": 7}, "text_len: expected 6, .*'layer0', got 7"),
        (([1], 0.5, H, W), {"head_num": 7}, "head_num: expected 5, .*'layer0', got 7"),
        (([1], 0.5, H, W), {"patch_size": 2}, "multiples of patch_size=2, got 3, 4"),
        (([1], 0.5, 5, 5), {}, "5 x 5 tokens"),
        (([1], 0.5, H, W), {"normalize_per": "video"}, "normalize_per.*'sample', 'frame'.*'video'"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        get_mask(maps(), *arguments, **options)


def test_wrong_maps_are_named():
    with pytest.raises(ValueError, match="attn_maps"):
        get_mask({}, [1], 0.5, H, W)
    with pytest.raises(ValueError, match="layer.*got shape"):
        get_mask({"layer": torch.rand(7, N, TEXT)}, [1], 0.5, H, W, head_num=5)
    with pytest.raises(ValueError, match="layer.*got shape"):
        get_mask({"layer": torch.rand(N)}, None, 0.5, H, W)
    with pytest.raises(TypeError, match="attn_maps.*list"):
        get_mask([torch.rand(1, N)], None, 0.5, H, W)
    with pytest.raises(TypeError, match=r"attn_maps\['layer'\].*list"):
        get_mask({"layer": [0.5] * N}, None, 0.5, H, W)
    with pytest.raises(ValueError, match="attn_maps.*one batch"):
        get_mask({"a": torch.rand(1, N), "b": torch.rand(2, N)}, None, 0.5, H, W)


def test_an_empty_batch_has_empty_masks():
    assert get_mask({"layer": torch.rand(0, N)}, None, 0.5, H, W)["average_mask"].shape == (0, N // (H * W), H, W)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_overlay_leaves_the_mask_and_greys_the_rest(batch):
    frames = torch.rand(*batch, 3, 3, 4, 6)
    mask = torch.zeros(*batch, 2, 2, 3)  # coarser in space and time: the last frame reads the second mask
    mask[..., 1, 0, 0] = 1
    shown = overlay(frames, mask)
    inside = torch.zeros(*batch, 3, 3, 4, 6, dtype=torch.bool)
    inside[..., 2, :, :2, :2] = True
    grey = frames.mean(-3, keepdim=True).expand_as(frames) / 2
    torch.testing.assert_close(shown, torch.where(inside, frames, grey))
    torch.testing.assert_close(overlay(frames, mask.bool()), shown)


def test_overlay_names_wrong_arguments():
    with pytest.raises(ValueError, match=r"frames: expected .* got \(3, 4, 6\)"):
        overlay(torch.rand(3, 4, 6), torch.ones(1, 1, 1))
    with pytest.raises(ValueError, match=r"mask: expected \(f, h, w\) .* got \(2, 3\)"):
        overlay(torch.rand(3, 3, 4, 6), torch.ones(2, 3))
    with pytest.raises(TypeError, match="frames: expected a tensor"):
        overlay([[1.0]], torch.ones(1, 1, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", ["probabilities", "concept map"])
def test_one_number_that_is_not_finite_names_its_layer(value, form):
    attn_maps = maps()
    if form == "concept map":
        attn_maps = {name: attn_map[..., 1].mean(1) for name, attn_map in attn_maps.items()}
    attn_maps["layer1"].view(-1, *attn_maps["layer1"].shape[1:])[1].flatten()[1] = value
    message = r"attn_maps\['layer1'\]: expected finite attention, got NaN or infinity for 1 of 48 video tokens"
    for compute in (lambda: get_mask(attn_maps, [1], 0.5, H, W), lambda: average_map(attn_maps, [1], H, W)):
        with pytest.raises(ValueError, match=message):
            compute()
    # A word that is not the concept's does not matter.
    if form == "probabilities":
        assert get_mask(attn_maps, [2], 0.5, H, W)["average_mask"].any()


def test_none_means_infer():
    attn_maps = maps()
    expected = get_mask(attn_maps, [1, 2], 0.5, H, W)
    masks = get_mask(attn_maps, [1, 2], 0.5, H, W, None, None, frames=F)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)
    soft = average_map(attn_maps, [1, 2], H, W, head_num=None, text_len=None)
    assert torch.equal(soft, average_map(attn_maps, [1, 2], H, W))


def test_what_cannot_be_inferred_is_named():
    flat = {name: attn_map.flatten(0, 1) for name, attn_map in maps().items()}
    with pytest.raises(ValueError, match=r"head_num: expected the number of heads, .*'layer0'.* \(10, 24, 6\) .*None"):
        get_mask(flat, [1], 0.5, H, W, head_num=None)
    with pytest.raises(ValueError, match=r"height, width: expected the size of the latents.* patch_size.* 24 tokens"):
        get_mask(maps(), [1], 0.5)
    with pytest.raises(ValueError, match="height, width: expected both or neither, got 3, None"):
        get_mask(maps(), [1], 0.5, H)


def test_a_forgotten_patch_size_is_not_silent():
    """Eight latent frames of 10 x 10 are 200 tokens of patch size 2, and two frames of patch size 1."""
    attn_maps = {"layer0": torch.rand(1, 200), "layer1": torch.rand(1, 200)}
    with pytest.warns(UserWarning, match=r"into 2 frames.*pass patch_size=2, which gives 8; pass frames=") as caught:
        assert get_mask(attn_maps, None, 0.5, 10, 10)["average_mask"].shape == (1, 2, 10, 10)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.raises(ValueError, match="frames: expected 2 frames for 200 tokens of 10 x 10 per frame, got 8"):
        get_mask(attn_maps, None, 0.5, 10, 10, frames=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get_mask(attn_maps, None, 0.5, 10, 10, patch_size=2)["layer0"].shape == (1, 8, 5, 5)
        assert get_mask(attn_maps, None, 0.5, 10, 10, frames=2)["layer0"].shape == (1, 2, 10, 10)
