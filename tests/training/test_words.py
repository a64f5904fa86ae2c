"""Finding the concept in prompts of many scripts, and words that may be the concept in another form."""

import itertools
import random
import unicodedata

import pytest
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers.normalizers import NFKC
from transformers import AutoTokenizer

from fastunlearn.training.data.prompts import concept_tokens
from fastunlearn.training.data.words import occurrences, other_forms, replace_concept, similar_words


def found(text, concept):
    return [text[start:end] for start, end in occurrences(text, concept)]


@pytest.mark.parametrize(
    ("text", "concept", "words"),
    [
        # Latin letters beside Chinese characters, kana, Thai, Korean
        ("dog狗", "dog", ["dog"]),
        ("一只dog在", "dog", ["dog"]),
        ("開DOGを", "dog", ["DOG"]),
        ("หมาdogหมา", "dog", ["dog"]),
        ("dog가 한dog", "dog", ["dog", "dog"]),
        ("一只dogs在", "dog", []),
        # signs beside a word
        ("dog_park, hot-dog, dog’s", "dog", ["dog", "dog", "dog"]),
        ("dog2 scar", "dog", []),
        # composed and decomposed letters, and letters with marks beyond the concept
        ("un cafe\u0301", "caf\u00e9", ["cafe\u0301"]),
        ("un caf\u00e9", "cafe\u0301", ["caf\u00e9"]),
        ("un caf\u00e9 cafe\u0301", "cafe", []),
        ("각 \u1100\u1161\u11a8", "가", []),
        ("\u1100\u1161\u11bc\u110b\u1161\u110c\u1175", "강아지", ["\u1100\u1161\u11bc\u110b\u1161\u110c\u1175"]),
        # upper and lower case beyond a to z
        ("STRASSE Straße", "straße", ["STRASSE", "Straße"]),
        ("İstanbul ISTANBUL", "istanbul", ["İstanbul", "ISTANBUL"]),
        ("ΟΔΟΣ, οδος", "οδοσ", ["ΟΔΟΣ", "οδος"]),
        # compatibility forms, spaces and apostrophes
        ("a ｎｕｄｅ　Person", "nude person", ["ｎｕｄｅ　Person"]),
        ("ﾇｰﾄﾞモデル", "ヌード", ["ﾇｰﾄﾞ"]),
        ("ﬁre", "fi", []),
        ("l’homme", "l'homme", ["l’homme"]),
        ("l'homme", "l’homme", ["l'homme"]),
        ("a ❤️ and ❤", "❤", ["❤️", "❤"]),
        # Hindi: vowel signs and the virama are parts of words
        ("एक कुत्ता है", "कुत्ता", ["कुत्ता"]),
        ("कुत्ता", "कुत", []),
        ("किताब", "ताब", []),
        # Korean: a noun may have particles, but is not a part of a longer one
        ("개가 개는 개를 개들이 개에게는 개와", "개", ["개"] * 6),
        ("곰이 곰은 곰을 곰들을 곰과 곰으로도", "곰", ["곰"] * 6),
        ("개미가 번개가 무지개 개인 개과 개은", "개", []),
        # Thai, Chinese and Japanese: anywhere, but not between letters that belong together
        ("หมาวิ่ง", "หมา", ["หมา"]),
        ("เตา", "ตา", []),
        ("หมาา", "หมา", []),
        ("裸体的人", "裸体", ["裸体"]),
        ("𠮷野家の𠮷", "𠮷", ["𠮷", "𠮷"]),
        ("カード カー", "カ", []),
        ("ガ", "カ", []),
        ("猫って", "猫", ["猫"]),
    ],
)
def test_words_of_every_script_are_found_whole(text, concept, words):
    assert found(text, concept) == words
    for form in ("NFC", "NFD"):
        again = unicodedata.normalize(form, text)
        assert found(again, concept) == [unicodedata.normalize(form, word) for word in words]


@pytest.mark.parametrize(
    ("text", "concept", "forms", "similar"),
    [
        ("DOGS! and doggies", "dog", ["DOGS"], ["DOGS", "doggies"]),
        ("一只dogs在", "dog", ["dogs"], ["dogs"]),
        ("a dog", "dogs", ["dog"], []),
        ("dogs and a dog", "dog", ["dogs"], ["dogs"]),
        ("two women, a wolf, people", "woman", ["women"], []),
        ("wolves", "wolf", ["wolves"], []),
        ("buses and a bus", "bus", ["buses"], ["buses"]),
        ("dresses, tomatoes, ponies", "tomato", ["tomatoes"], ["tomatoes"]),
        ("she cares", "car", [], ["cares"]),
        ("nudity, nudes", "nude", ["nudity", "nudes"], ["nudes"]),
        ("a nude", "nudity", ["nude"], []),
        ("a hot-dog, hotdogs", "hot dog", ["hot-dog", "hotdogs"], []),
        ("t shirt, tshirts", "t-shirt", ["t shirt", "tshirts"], []),
        ("It is hot. Dog", "hot dog", [], []),
        ("nu\u200bde, n\u00adude", "nude", ["nu\u200bde", "n\u00adude"], ["nu\u200bde", "n\u00adude"]),
        ("a hotdog, a woman, a scarf", "dog", [], ["hotdog"]),
        ("a woman", "man", [], ["woman"]),
        ("cafe", "café", [], ["cafe"]),
        ("cafés", "café", ["cafés"], ["cafés"]),
        ("собаку, кошку", "собака", [], ["собаку"]),
        ("desnuda", "desnudo", [], ["desnuda"]),
        ("कुत्ते", "कुत्ता", [], ["कुत्ते"]),
        ("개미가 번개가", "개", [], ["개미가", "번개가"]),
        ("הכלב", "כלב", [], ["הכלב"]),
        ("he smokes, a smoker, smog", "smoking", [], ["smokes", "smoker"]),
        ("strict, strolling", "string", [], []),
        ("the magic arena", "car", [], []),
        ("a dog, dog’s, DOG", "dog", [], []),
        ("vitamin c", "c++", [], []),
        ("", "dog", [], []),
    ],
)
def test_doubtful_words(text, concept, forms, similar):
    assert other_forms(text, concept) == forms
    assert similar_words(text, concept) == similar


@pytest.mark.parametrize("find", [occurrences, other_forms, similar_words])
@pytest.mark.parametrize("concept", ["", " ", "\u3000", "\u200b", "\ufeff \u00ad"])
def test_a_blank_concept_is_an_error(find, concept):
    with pytest.raises(ValueError, match="concept: expected one or more words"):
        find("a dog", concept)


def test_any_text_and_concept_is_searched():
    """Letters of every kind that the search treats on its own, in random order."""
    letters = "aB -_'’\n\t\u00a0\u3000\u200b\u200c\u00ad\ufe0f"
    letters += "ßſİıΣςé\u0301ﬁｄ２①あーカｶﾞ狗々𠮷าเ่कि्개들가은\u1100\u1161\u11a8ـב🐕+."
    choose = random.Random(0)
    for _ in range(3000):
        text = "".join(choose.choices(letters, k=choose.randrange(12)))
        concept = "".join(choose.choices(letters, k=choose.randrange(1, 4)))
        try:
            spans = occurrences(text, concept)
        except ValueError:
            continue
        assert all(0 <= start < end <= len(text) for start, end in spans)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert all(form in text for form in other_forms(text, concept) + similar_words(text, concept))
        if not unicodedata.category(concept.strip()[0]).startswith("M"):
            assert occurrences(f"{text} {concept.strip()} {text}", concept)


@pytest.fixture(scope="module")
def tokenizers(tiny_pipeline):
    """Those of the families, and one that normalises a text to NFKC, as the published T5 and UMT5 do."""
    families = {name: AutoTokenizer.from_pretrained(tiny_pipeline(name) / "tokenizer") for name in PIPELINES}
    normalising = AutoTokenizer.from_pretrained(tiny_pipeline("wan") / "tokenizer")
    normalising.backend_tokenizer.normalizer = NFKC()
    return {**families, "nfkc": normalising}


PIPELINES = ("cogvideox", "hunyuan_video", "wan")


@pytest.mark.parametrize(
    ("name", "prompt", "concept", "tokens"),
    [
        ("cogvideox", "a ｎｕｄｅ dog", "nude", {"▁", "<unk>"}),
        ("nfkc", "a ｎｕｄｅ dog", "nude", {"▁nude"}),
        ("nfkc", "ｎｕｄｅ　Ｄｏｇ ①", "nude dog", {"▁nude", "▁", "D", "o", "g"}),
        ("nfkc", "a cafe\u0301 dog", "café", {"▁", "c", "a", "f", "<unk>"}),
        ("wan", "a dog狗", "dog", {"▁dog"}),
        ("nfkc", "一只dog在 dog狗", "dog", {"d", "o", "g", "▁dog"}),
        ("hunyuan_video", "dog, 一只 DOG 在", "dog", {"dog", "<unk>"}),
    ],
)
def test_positions_in_prompts_that_the_tokenizer_normalises(tokenizers, name, prompt, concept, tokens):
    tokenizer = tokenizers[name]
    template, crop = ("{}", 0)
    if name == "hunyuan_video":
        template, crop = DEFAULT_PROMPT_TEMPLATE["template"], DEFAULT_PROMPT_TEMPLATE["crop_start"]
    positions = concept_tokens(tokenizer, prompt, concept, max_length=64, template=template, crop_start=crop)
    ids = tokenizer(template.replace("{}", prompt))["input_ids"][crop:]
    assert set(tokenizer.convert_ids_to_tokens([ids[position] for position in positions])) == tokens


@pytest.mark.parametrize(
    ("text", "concept", "rest"),
    [
        ("a nude person", "nude", "a person"),
        ("a nude woman is walking, in the red light", "nude", "a woman is walking, in the red light"),
        # commas, brackets, quotation marks and hyphens
        ("a red, nude person", "nude", "a red person"),
        ("a nude, smiling person", "nude", "a smiling person"),
        ("In the park, nude people walk", "nude", "In the park, people walk"),
        ("beach, sunset, nude woman, photo", "nude", "beach, sunset, woman, photo"),
        ("people, nude, walking", "nude", "people, walking"),
        ("nude, walking", "nude", "walking"),
        ("a person, nude.", "nude", "a person."),
        ("a (nude) person", "nude", "a person"),
        ('"nude" art', "nude", "art"),
        ("hot-dog park", "dog", "hot park"),
        # articles and connectives that have lost their noun
        ("a circle", "circle", ""),
        ("a circle in the street", "circle", "in the street"),
        ("a car, a circle, a tree", "circle", "a car, a tree"),
        ("a picture of a nude!", "nude", "a picture!"),
        ("red circle and blue square", "circle", "red and blue square"),
        ("blue square and circle", "circle", "blue square"),
        ("circle and blue square", "circle", "blue square"),
        ("a cat and a circle and a dog", "circle", "a cat and a dog"),
        ("A nude owl and an evil cat", "nude", "An owl and an evil cat"),
        ("A nude owl and an evil cat", "evil", "A nude owl and a cat"),
        # endings, other forms, and scripts without spaces
        ("the dog’s ball", "dog", "the ball"),
        ("one dog and two dogs", "dog", "one and two"),
        ("一只狗在跑", "狗", "一只在跑"),
        ("강아지가 달린다", "강아지", "달린다"),
        # nothing but the concept
        ("nude, nude", "nude", ""),
    ],
)
def test_dropping_the_concept_leaves_a_prompt(text, concept, rest):
    assert replace_concept(text, concept) == rest
    assert not occurrences(rest, concept) and not other_forms(rest, concept)


@pytest.mark.parametrize(
    ("text", "concept", "rest"),
    [
        ("a painting by Van Gogh", "Van Gogh", "a painting"),
        ("a painting by Van Gogh of a cat", "Van Gogh", "a painting of a cat"),
        ("a girl on a horse in a field", "horse", "a girl in a field"),
        ("a woman, fully nude, on a bed", "nude", "a woman, fully, on a bed"),
        ("a man walking in, nude", "nude", "a man walking in"),
    ],
)
def test_prepositions_go_with_their_noun(text, concept, rest):
    assert replace_concept(text, concept) == rest


def test_something_else_takes_the_concept_s_place():
    assert replace_concept("a circle, two circles", "circle", "octagon") == "an octagon, two octagon"
    assert replace_concept("an owl’s (owl)", "owl", "cat") == "a cat’s (cat)"
    assert replace_concept("강아지가 달린다", "강아지", "고양이") == "고양이가 달린다"
    assert replace_concept("a cat", "dog", "owl") == replace_concept("a cat", "dog") == "a cat"
    with pytest.raises(ValueError, match="concept: expected one or more words, got ' '"):
        replace_concept("a cat", " ")
