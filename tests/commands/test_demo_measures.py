"""What the demo measures, on rendered videos, whose objects are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastunlearn.demo import evaluate, prompts
from fastunlearn.demo.judge import Judge
from fastunlearn.demo.model import load
from fastunlearn.demo.world import HAZE, KINDS, SHAPES, Noun, Nouns, Videos, presence, prompt_of, sample_videos
from fastunlearn.training.data.words import occurrences


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load()[1]


@pytest.fixture(scope="module")
def rendered() -> Videos:
    return sample_videos(200, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("concept", SHAPES)
def test_prompts_to_train_with_and_to_judge(concept: str) -> None:
    training, held_out = prompts.training_files(concept), prompts.held_out_files(concept)
    texts = {name: [prompt_of(nouns) for nouns in file] for name, file in (training | held_out).items()}
    assert all(len(set(lines)) == len(lines) for lines in texts.values())
    for name, lines in texts.items():
        with_concept = [bool(occurrences(line, concept)) for line in lines]
        assert not any(with_concept) if name.startswith("kept") else all(with_concept)
    assert {name: len(lines) for name, lines in texts.items()} == {
        "target.txt": 15,
        "kept.txt": 27,
        "target-held-out.txt": 12,
        "kept-held-out.txt": 6,
    }
    trained = {*texts["target.txt"], *texts["kept.txt"]}
    assert trained.isdisjoint({*texts["target-held-out.txt"], *texts["kept-held-out.txt"]})
    # Dropping the concept's word leaves a prompt that is kept, so that its meaning stays.
    for nouns in training["target.txt"]:
        rest = tuple(Noun(HAZE, noun.colour) if noun.kind == concept else noun for noun in nouns)
        assert prompt_of(rest) in texts["kept.txt"]
    judged = prompts.judged(concept)
    shapes = [prompts.kinds_in(nouns) for nouns in judged]
    with_concept = [concept in kinds for kinds in shapes]
    assert with_concept == sorted(with_concept, reverse=True)
    assert {len(kinds): shapes.count(kinds) for kinds in shapes} == {1: 12, 2: 16}
    assert all(prompt_of(nouns) not in trained for nouns in judged if len(nouns) == 2)


def test_prompt_files_are_as_a_user_writes_them(tmp_path: Path) -> None:
    prompts.write_files(tmp_path, "square")
    assert (
        (tmp_path / "target.txt")
        .read_text()
        .startswith("red square\ngreen square\nblue square\nred square and green c")
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        *prompts.training_files("square"),
        *prompts.held_out_files("square"),
    }


@pytest.mark.parametrize(("seen", "videos"), [(0, 44), (1, 44), (15, 16), (12, 12)])
def test_a_share_has_wilson_s_interval(seen: int, videos: int) -> None:
    share = evaluate.share([index < seen for index in range(videos)])
    assert (share["share"], share["videos"]) == (round(seen / videos, 4), videos)
    # Its ends are the rates from which what was seen is 1.96 standard deviations away, or the ends of all rates.
    low, high = share["interval"]
    for end in {low, high} - {0, 1}:
        assert abs(seen / videos - end) == pytest.approx(1.96 * (end * (1 - end) / videos) ** 0.5, abs=2e-4)
    assert (low == 0) == (seen == 0) and (high == 1) == (seen == videos) and low < high
    assert evaluate.share([]) is None


def test_the_judge_sees_what_is_rendered(judge: Judge, rendered: Videos) -> None:
    right = evaluate.seen_by(judge, rendered.pixels) == rendered.present
    assert right.flatten(1).all(dim=1).float().mean() >= 0.97


def test_appearances() -> None:
    prompts_of_videos: list[Nouns] = [
        (Noun("circle", "red"),),
        (Noun("circle", "red"), Noun("square", "blue")),
        (Noun("square", "blue"), Noun("circle", "green")),
        (Noun("square", "green"),),
    ]
    shown: list[Nouns] = [
        (Noun(HAZE, "red"),),  # the concept is replaced
        (Noun("circle", "red"), Noun("triangle", "green")),  # it is not, and the square is another shape
        (Noun("square", "blue"),),  # its colour is missing
        (Noun("square", "red"), Noun(HAZE, "green")),
    ]
    report = evaluate.appearances(presence(shown), prompts_of_videos, "circle")
    shares = {kind: {name: value and value["share"] for name, value in row.items()} for kind, row in report.items()}
    third = round(1 / 3, 4)
    assert shares == {
        "circle": {"asked": third, "beside": None, "uninvited": 0.0, "colour": round(2 / 3, 4)},
        "square": {"asked": 1.0, "beside": 0.5, "uninvited": 0.0, "colour": round(2 / 3, 4)},
        "triangle": {"asked": None, "beside": None, "uninvited": 0.25, "colour": None},
        HAZE: {"replacing": third, "uninvited": 1.0},
    }
    assert report["circle"]["asked"]["videos"] == 3
    assert report["square"]["beside"]["videos"] == 2


def test_two_shapes_together() -> None:
    both = (Noun("square", "red"), Noun("triangle", "blue"))
    asked: list[Nouns] = [both, both, both[:1], (both[0], Noun("circle", "green"))]
    assert evaluate.together(presence([both, both[1:], both, both]), asked, "circle")["share"] == 0.5
    assert evaluate.together(presence(asked[2:]), asked[2:], "circle") is None


def test_binding_tells_shapes_colours_and_sides_apart(judge: Judge, rendered: Videos) -> None:
    seen = evaluate.seen_by(judge, rendered.pixels)
    count = sum(len(nouns) == 2 for nouns in rendered.nouns)

    def binding(asked: list[Nouns]) -> tuple[float, float]:
        result = evaluate.binding(seen, rendered.pixels, asked)
        assert result["kinds"]["videos"] == result["all"]["videos"] == count
        return result["kinds"]["share"], result["all"]["share"]

    assert min(binding(rendered.nouns)) >= 0.97
    turned = [nouns[::-1] for nouns in rendered.nouns]
    assert binding(turned) == (pytest.approx(1, abs=0.03), 0)
    swapped = [
        tuple(Noun(noun.kind, other.colour) for noun, other in zip(nouns, nouns[::-1], strict=True))
        for nouns in rendered.nouns
    ]
    assert binding(swapped) == (pytest.approx(1, abs=0.03), 0)
    other_kind = dict(zip(KINDS, [*KINDS[1:], KINDS[0]], strict=True))
    others = [(Noun(other_kind[nouns[0].kind], nouns[0].colour), *nouns[1:]) for nouns in rendered.nouns]
    assert binding(others) == (0, 0)
    assert evaluate.binding(seen[:0], rendered.pixels[:0], []) == {"kinds": None, "all": None}


def test_mask_overlap_is_one_for_the_object_itself(judge: Judge) -> None:
    videos = sample_videos(40, torch.Generator().manual_seed(4), two_objects=1.0)
    rows = [row for row, nouns in enumerate(videos.nouns) if "circle" in prompts.kinds_in(nouns)]
    index = [[noun.kind for noun in videos.nouns[row]].index("circle") for row in rows]
    assert len(rows) >= 10
    exact = torch.nn.functional.avg_pool2d(videos.coverage[rows, index], 2) >= 0.5
    assert evaluate.mask_overlap(judge, exact.float(), videos.pixels[rows], "circle") > 0.9
    assert evaluate.mask_overlap(judge, 1 - exact.float(), videos.pixels[rows], "circle") < 0.05
