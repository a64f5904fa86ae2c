"""What `prepare` is asked for: prompt files, the user's own videos, and what is wrong with them."""

import dataclasses

import pytest
import safetensors.torch
import torch
from prepare_cases import KEPT, TARGETS, assert_close, options_for, velocity, write_prompts

from fastunlearn.training.cache import TeacherCache
from fastunlearn.training.data.requests import Request, read_requests, read_video_requests
from fastunlearn.training.data.videos import read_video, write_video
from fastunlearn.training.model.sampling import random_generator
from fastunlearn.training.prepare import prepare, run


def test_the_prompts_of_a_file_take_turns(tmp_path):
    paths = write_prompts(
        tmp_path, target_prompts="a circle\n# a comment\n\na red circle\ta red square\n", kept_prompts="a dog\n"
    )
    requests = read_requests(options_for(num_trajectories=3, **paths))
    assert requests == [
        Request("a circle"),
        Request("a red circle", instead="a red square"),
        Request("a circle"),
        *[Request("a dog", "kept")] * 3,
    ]
    with pytest.warns(UserWarning, match="target_prompts.txt: only 1 of 2 prompts are used; raise num_trajectories"):
        read_requests(options_for(num_trajectories=1, **paths))
    for change, message in (
        (
            {"kept_prompts": "a big circle\n"},
            "kept_prompts.txt: expected a prompt without 'circle', got 'a big circle'",
        ),
        (
            {"target_prompts": "a circle\ta Circle\n"},
            "target_prompts.txt: expected a prompt without 'circle', got 'a Circle'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            read_requests(options_for(**paths | write_prompts(tmp_path, **change)))
    with pytest.raises(ValueError, match="target_prompts: expected a file"):
        read_requests(options_for())
    with pytest.raises(ValueError, match="data: expected no target_prompts or kept_prompts"):
        read_requests(options_for(data=tmp_path, **paths))


def test_wrong_requests_are_refused():
    with pytest.raises(ValueError, match="steps: expected a start below an end"):
        Request("x", steps=(0.5, 0.5))
    with pytest.raises(ValueError, match="instead: expected a prompt"):
        Request("x", follow="instead")
    with pytest.raises(ValueError, match="follow: expected 'prompt' or 'instead'"):
        Request("x", follow="other")


def test_wrong_options_are_refused():
    for change, message in (
        ({"batch_size": 0}, "batch_size: .*at least 1, got 0"),
        ({"mask_threshold": 1.5}, "mask_threshold: .*got 1.5"),
        ({"mask_start": 1.0}, "mask_start: .*got 1.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale: .*got nan"),
        ({"concept": " "}, "concept: .*got ' '"),
    ):
        with pytest.raises(ValueError, match=message):
            options_for(**change)


@pytest.fixture
def data(tmp_path):
    """A folder with a video of the right size, one that is longer and larger, and latents; and the latents."""
    folder = tmp_path / "data"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    write_video(folder / "first.mp4", torch.rand(9, 3, 32, 32, generator=generator), 8)
    write_video(folder / "second.gif", torch.rand(11, 3, 50, 70, generator=generator), 8)
    latents = torch.randn(3, 4, 4, 4, generator=generator)
    safetensors.torch.save_file({"latents": latents}, folder / "third.safetensors")
    for name, prompt in (("first", TARGETS[0]), ("second", KEPT[0]), ("third", f"{TARGETS[1]}\t{KEPT[1]}")):
        (folder / f"{name}.txt").write_text(prompt)
    return folder, latents


@pytest.mark.parametrize("family", ["cogvideox", "wan-2.2"])
def test_points_of_given_videos(tiny_pipeline, model_and_prompts, loaded_model, tmp_path, data, family):
    folder, latents = data
    if family == "wan-2.2":
        latents = latents.movedim(1, 0).contiguous()
        safetensors.torch.save_file({"latents": latents[None]}, folder / "third.safetensors")
    options = options_for(
        tiny_pipeline(family), tmp_path / "cache", data=folder, timesteps_per_trajectory=3, guidance_scale=None
    )
    run(options)
    cache = TeacherCache.open(tmp_path / "cache", verify=True)
    target, kept = cache.groups["target"], cache.groups["kept"]
    assert (len(target), len(kept)) == (6, 3) and target.has_masks and not kept.has_masks
    assert [cache.prompts[number] for number in target.prompts.tolist()] == [TARGETS[0]] * 3 + [TARGETS[1]] * 3
    model, (_, encoded) = loaded_model(family, vae=True), model_and_prompts(family)
    rows = target.rows(range(6))
    video_latents = model.encode_video(read_video(folder / "first.mp4")[None])[0]
    noised = []
    for trajectory, x_0 in ((0, video_latents), (2, latents)):
        generator = random_generator(0, "noise", trajectory)
        for t in rows.t[len(noised) :][:3]:
            noise = torch.randn(x_0.shape, generator=generator)
            noised.append(model.add_noise(x_0[None], noise[None], t[None])[0])
    assert_close(rows.x_t, torch.stack(noised))
    for name, prompts in (("v_cond", TARGETS), ("v_uncond", ("", KEPT[1]))):
        expected = velocity(model, encoded, rows.x_t, rows.t, [prompt for prompt in prompts for _ in range(3)])
        assert_close(getattr(rows, name), expected)
    assert rows.mask.any() and not rows.mask.all()
    (folder / "first.txt").write_text(TARGETS[1])
    with pytest.raises(ValueError, match=r"requests\[0\].prompt: 'a red circle in the street' -> 'a circle'"):
        prepare(model, encoded, read_requests(options), options.output_dir, options)


def test_wrong_files_in_a_folder_of_videos(data, model_and_prompts, loaded_model, tmp_path):
    folder, _ = data
    model, (_, encoded) = loaded_model("cogvideox", vae=True), model_and_prompts("cogvideox")
    assert [request.group for request in read_video_requests(folder, "circle")] == ["target", "kept", "target"]
    for name in ("fourth.MP4", "fifth.SafeTensors"):  # cameras write capitals
        (folder / name).touch()
        (folder / name).with_suffix(".txt").write_text("a dog")
    requests = {request.source.name: request for request in read_video_requests(folder, "circle")}
    for name, expected in {
        "first.mp4": True,
        "third.safetensors": False,
        "fourth.MP4": True,
        "fifth.SafeTensors": False,
    }.items():
        assert requests[name].needs_vae == expected, name
    for name in ("fourth.MP4", "fifth.SafeTensors"):
        (folder / name).unlink()
    options = options_for(data=folder)
    (folder / "first.txt").write_text("one circle\ntwo circle\n")
    with pytest.raises(ValueError, match="first.txt: expected one prompt, got 2"):
        read_requests(options)
    (folder / "first.txt").write_text("one circle\tno circle\n")
    with pytest.raises(ValueError, match="first.txt: expected a prompt without 'circle' after the tab"):
        read_requests(options)
    (folder / "first.txt").unlink()
    with pytest.raises(FileNotFoundError, match="first.txt"):
        read_requests(options)
    (folder / "first.mp4").unlink()
    for index, (tensors, message) in enumerate(
        (
            ({"latents": torch.zeros(2, 4, 4, 4)}, r"third.safetensors: .*\(3, 4, 4, 4\), got \(2, 4, 4, 4\)"),
            ({"latents": torch.full((3, 4, 4, 4), float("nan"))}, "third.safetensors: expected finite latents"),
            ({"latent": torch.zeros(1)}, r"third.safetensors: expected a tensor called 'latents', got \['latent'\]"),
        )
    ):
        safetensors.torch.save_file(tensors, folder / "third.safetensors")
        with pytest.raises(ValueError, match=message):
            prepare(model, encoded, read_requests(options), tmp_path / f"cache {index}", options)
    (folder / "third.safetensors").unlink()
    longer = dataclasses.replace(options, num_frames=13)
    with pytest.raises(ValueError, match="second.gif: expected at least 13 frames, got 11"):
        prepare(model, encoded, read_requests(longer), tmp_path / "longer", longer)
    (folder / "second.gif").unlink()
    with pytest.raises(ValueError, match="data: expected .mp4, .gif or .safetensors files.*got none"):
        read_requests(options)
    with pytest.raises(FileNotFoundError, match="data: expected a folder of videos"):
        read_requests(dataclasses.replace(options, data=folder / "nowhere"))
