"""What `prepare` is asked for: prompt files, the user's own videos, and what is wrong with them."""

import contextlib
import dataclasses

import pytest
import safetensors.torch
import torch
from prepare_cases import KEPT, TARGETS, WITHOUT, assert_close, options_for, velocity, write_prompts

from fastunlearn.training.cache import TeacherCache
from fastunlearn.training.data.requests import Request, read_requests, read_video_requests
from fastunlearn.training.data.videos import read_video, write_video
from fastunlearn.training.model.sampling import random_generator
from fastunlearn.training.prepare import prepare, run


def test_the_prompts_of_a_file_take_turns(tmp_path):
    paths = write_prompts(
        tmp_path, target_prompts="a circle\n# a comment\n\na red circle\ta red square\n", kept_prompts="a dog\n"
    )
    requests = read_requests(options_for(num_trajectories=3, baseline="negative", follow_replacement=0.0, **paths))
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


def test_the_concept_is_dropped_or_replaced_in_the_prompts_of_the_baseline(tmp_path):
    lines = "a red circle\ta blue square\na red, big circle in the street\na circle\n"
    paths = write_prompts(tmp_path, target_prompts=lines, kept_prompts="a dog\n")

    def baselines(**changes):
        requests = read_requests(options_for(num_trajectories=3, **paths, **changes))
        assert [request.instead for request in requests[3:]] == [None] * 3  # kept
        return [request.instead for request in requests[:3]]

    assert baselines() == ["a blue square", "a red, big in the street", None]
    assert baselines(replacement="octagon") == ["a blue square", "a red, big octagon in the street", "an octagon"]
    assert baselines(baseline="negative", replacement="octagon") == ["a blue square", None, None]
    with pytest.raises(
        ValueError, match="replacement: expected a prompt without 'circle', got 'two circles'|a form of"
    ):
        read_requests(options_for(replacement="two circles", **paths))
    folder = captioned(tmp_path / "data", a="a red circle", b="a red circle\ta square", c="a red square")
    for changes, expected in (({}, "a red"), ({"replacement": "dog"}, "a red dog"), ({"baseline": "negative"}, None)):
        requests = read_requests(options_for(data=folder, **changes))
        assert [request.instead for request in requests] == [expected, "a square", None]
        assert all(request.follow == "prompt" for request in requests)


@pytest.mark.parametrize(
    ("prompts", "share", "following"),
    [
        (1, 0.5, [1, 3, 5, 7, 9, 11]),
        (2, 0.5, [1, 2, 5, 6, 9, 10]),
        (3, 0.25, [5, 7, 9]),
        (3, 0.0, []),
        (2, 1.0, list(range(12))),
        (12, 0.25, [3, 7, 11]),
    ],
)
def test_a_share_of_every_prompt_s_trajectories_follows_the_replacement(tmp_path, prompts, share, following):
    lines = "\n".join(f"circle {number}" for number in range(prompts))
    paths = write_prompts(tmp_path, target_prompts=lines, kept_prompts="a dog")
    options = options_for(num_trajectories=12, follow_replacement=share, **paths)
    requests = read_requests(options)
    assert [number for number, request in enumerate(requests) if request.follow == "instead"] == following
    paths = write_prompts(tmp_path, target_prompts="a circle\ta dog\n" + "a circle\n" * (prompts - 1))
    with pytest.warns(UserWarning) if prompts > 2 else contextlib.nullcontext():
        requests = read_requests(dataclasses.replace(options, baseline="negative"))
        followed = [request.follow for request in requests if request.instead is not None]
        assert {request.follow for request in requests if request.instead is None} <= {"prompt"}
        assert followed == ["instead" if number in following else "prompt" for number in range(0, 12, prompts)]
        requests = read_requests(options)
    assert [number for number, request in enumerate(requests) if request.follow != "prompt"] == following
    assert {request.follow for request in requests if request.instead is None} <= {"prompt", "negative"}


def captioned(folder, **captions):
    """A folder of empty videos with captions."""
    folder.mkdir()
    for name, caption in captions.items():
        (folder / f"{name}.mp4").touch()
        (folder / f"{name}.txt").write_bytes(caption.encode())
    return folder


def test_captions_with_the_concept_are_targets_in_every_script_and_case(tmp_path):
    folder = captioned(
        tmp_path / "data",
        a="A DOG!",
        b="dog狗",
        c="一只dog在",
        d="a cat",
        e="ｄｏｇ",
        f="\ufeffdog\r\n",
        g="dog_park\t\ufeffa park",
        h="the dog’s ball\ta ball",
    )
    requests = read_video_requests(folder, "dog")
    assert "".join(request.source.stem for request in requests if request.group == "kept") == "d"
    assert requests[5].prompt == "dog"
    assert requests[6].instead.strip("\ufeff") == "a park"


@pytest.mark.parametrize(
    ("caption", "concept", "form"),
    [
        ("two dogs", "dog", "dogs"),
        ("DOGS!", "dog", "DOGS"),
        ("一只dogs在", "dog", "dogs"),
        ("do\u200bg", "dog", "do\u200bg"),
        ("the nudity of a statue", "nude", "nudity"),
        ("two nude women", "nude woman", "nude women"),
        ("a hot-dog", "hot dog", "hot-dog"),
    ],
)
def test_another_form_of_the_concept_is_refused_wherever_it_is_unclear_or_would_be_kept(
    tmp_path, caption, concept, form
):
    with pytest.raises(ValueError) as error:
        read_video_requests(captioned(tmp_path / "data", a=caption), concept)
    assert str(error.value) == (
        f"{tmp_path / 'data' / 'a.txt'}: expected {concept!r} as a word of its own or not at all, got {form!r} in "
        f"{caption!r}; if the concept is meant, write {concept!r} as well, so that it is found and erased; if not, use "
        "other words"
    )
    (tmp_path / "data" / "a.txt").write_text(f"one {concept} and {caption}")
    assert read_video_requests(tmp_path / "data", concept)[0].group == "target"
    (tmp_path / "data" / "a.txt").write_text(f"one {concept}\t{caption}")
    got = f"got {form!r}, a form of it, in {caption!r}".replace("\\", "\\\\")
    with pytest.raises(ValueError, match=f"a.txt: expected a prompt without '{concept}' after the tab, {got}"):
        read_video_requests(tmp_path / "data", concept)
    paths = write_prompts(tmp_path, target_prompts=f"one {concept}", kept_prompts=caption)
    with pytest.raises(ValueError, match=f"kept_prompts.txt: expected a prompt without '{concept}', {got}"):
        read_requests(options_for(concept=concept, **paths))
    paths = write_prompts(tmp_path, target_prompts=f"one {concept}\n{caption}", kept_prompts="a park")
    with pytest.raises(ValueError, match=f"target_prompts.txt: expected '{concept}' as a word of its own"):
        read_requests(options_for(concept=concept, **paths))
    paths = write_prompts(tmp_path, target_prompts=f"one {concept}", kept_prompts="a park")
    with pytest.raises(ValueError, match=f"negative_prompt: expected a prompt without '{concept}', {got}"):
        read_requests(options_for(concept=concept, negative_prompt=caption, **paths))


def test_words_that_resemble_the_concept_are_kept_with_a_warning(tmp_path):
    folder = captioned(tmp_path / "data", a="a man", b="a woman", c="many cats", d="a woman and a cat")
    with pytest.warns(UserWarning) as warnings:
        groups = [request.group for request in read_video_requests(folder, "man")]
    assert groups == ["target", "kept", "kept", "kept"]
    assert [str(warning.message) for warning in warnings] == [
        f"data: {folder}: 'woman', 'many' count as other words than 'man'; if the concept is meant, write 'man' as a "
        "word of its own, and in the target prompts"
    ]
    paths = write_prompts(tmp_path, target_prompts="a man\ta woman\n", kept_prompts="a woman\na cat\na woman\n")
    with pytest.warns(UserWarning) as warnings:
        read_requests(options_for(concept="man", **paths))
    assert [str(warning.message).partition(": ")[2][:60] for warning in warnings] == [
        "'woman' count as other words than 'man'; if the concept is me"[:60],
        "'woman' count as other words than 'man'; if the concept is me"[:60],
        "'a woman' is there more than once, so it counts more than oth"[:60],
    ]


def test_missing_groups_are_noticed_at_once(tmp_path):
    paths = write_prompts(tmp_path, target_prompts="a circle\n", kept_prompts="a dog\n")
    with pytest.warns(UserWarning) as warnings:
        read_requests(options_for(target_prompts=paths["target_prompts"]))
    assert str(warnings[0].message) == (
        "kept_prompts: got no prompt without 'circle'; train cannot use this cache unless --preservation-weight is 0"
    )
    with pytest.raises(ValueError, match="^target_prompts: expected at least one prompt with 'circle', which training"):
        read_requests(options_for(kept_prompts=paths["kept_prompts"]))
    with pytest.raises(ValueError, match="^data: expected at least one prompt with 'circle', which training"):
        read_requests(options_for(data=captioned(tmp_path / "data", a="a dog")))
    with pytest.warns(UserWarning, match="^data: got no prompt without 'dog'; train cannot use"):
        read_requests(options_for(data=tmp_path / "data", concept="dog"))


@pytest.mark.filterwarnings("ignore:data")
def test_every_kind_of_video_is_used_and_skipped_files_are_named(tmp_path):
    folder = captioned(tmp_path / "data", a="a dog")
    for name in ("b.MOV", "c.webm", "d.mkv", "e.avi", "f.M4V", "g.Gif"):
        (folder / name).touch()
        (folder / name[0]).with_suffix(".TXT").write_text("a cat")
    (folder / ".DS_Store").touch()
    (folder / "._a.mp4").touch()
    names = [request.source.name for request in read_video_requests(folder, "dog")]
    assert names == ["a.mp4", "b.MOV", "c.webm", "d.mkv", "e.avi", "f.M4V", "g.Gif"]
    for name in ("notes.md", "y.wmv", "z.txt"):
        (folder / name).touch()
    (folder / "x.mp4").mkdir()
    with pytest.warns(UserWarning) as warnings:
        assert [request.source.name for request in read_video_requests(folder, "dog")] == names
    assert len(warnings) == 1
    message = str(warnings[0].message)
    assert message.startswith(
        f"data: skipped 'notes.md', 'x.mp4', 'y.wmv', 'z.txt' in {str(folder)!r}: neither a video"
    )
    (folder / "a.safetensors").touch()
    with pytest.warns(UserWarning, match="data: 'a.mp4', 'a.safetensors' in .* share a prompt file; each counts as a"):
        assert len(read_video_requests(folder, "dog")) == 8
    for index in range(9):
        (folder / f"{index}.jpg").touch()
    with pytest.warns(UserWarning, match="skipped '0.jpg', .*, '7.jpg' and 5 others in"):
        read_video_requests(folder, "dog")


def test_a_missing_ffmpeg_is_found_before_any_work(tmp_path, tiny_pipeline, monkeypatch):
    monkeypatch.setattr("fastunlearn.training.prepare.encode_prompts", lambda *args, **kwargs: pytest.fail("encoded"))
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "no-ffmpeg"))
    folder = captioned(tmp_path / "data", a="a circle", b="a dog")
    options = options_for(tiny_pipeline("cogvideox"), tmp_path / "cache", data=folder)
    with pytest.raises(OSError, match="^ffmpeg: expected a program that can be run, got '.*no-ffmpeg'"):
        run(options)
    for name in "ab":  # which need none
        (folder / f"{name}.mp4").rename(folder / f"{name}.gif")
    assert not any(request.needs_ffmpeg for request in read_requests(options))


def test_wrong_requests_are_refused():
    with pytest.raises(ValueError, match="steps: expected a start below an end"):
        Request("x", steps=(0.5, 0.5))
    with pytest.raises(ValueError, match="instead: expected a prompt"):
        Request("x", follow="instead")
    with pytest.raises(ValueError, match="instead: expected None, because follow is 'negative'; got 'y' for 'x'"):
        Request("x", instead="y", follow="negative")
    with pytest.raises(ValueError, match="follow: expected 'prompt', 'instead' or 'negative', got 'other'"):
        Request("x", follow="other")


def test_wrong_options_are_refused():
    for change, message in (
        ({"batch_size": 0}, "batch_size: .*from 1 to 65536, got 0"),
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
    for name, prompts in (("v_cond", TARGETS), ("v_uncond", (WITHOUT, KEPT[1]))):
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
        (folder / name).with_suffix(".txt").unlink()
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
    for name in ("third.safetensors", "third.txt", "first.txt"):
        (folder / name).unlink(missing_ok=True)
    (folder / "second.txt").write_text(TARGETS[0])
    longer = dataclasses.replace(options, num_frames=13)
    with (
        pytest.warns(UserWarning, match="data: got no prompt without 'circle'"),
        pytest.raises(ValueError, match="second.gif: expected at least 13 frames, got 11"),
    ):
        prepare(model, encoded, read_requests(longer), tmp_path / "longer", longer)
    (folder / "second.gif").unlink()
    with pytest.raises(ValueError, match="data: expected .mp4, .*, .avi, .m4v or .safetensors files.*got none"):
        read_requests(options)
    with pytest.raises(FileNotFoundError, match="data: expected a folder of videos"):
        read_requests(dataclasses.replace(options, data=folder / "nowhere"))
