"""Reading prompt files, and finding the tokens of a concept in a prompt."""

import pytest
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastunlearn.families.tiny import t5_tokenizer
from fastunlearn.training.data.prompts import PromptLine, concept_tokens, occurrences, read_prompts
from fastunlearn.training.data.requests import Request, _refuse_concept
from fastunlearn.training.loop.batches import Batches
from fastunlearn.training.options import PrepareOptions, TargetGroup


class WithoutOffsets:
    """A tokenizer that gives no offsets, like transformers' tokenizers in pure Python."""

    is_fast, padding_side = False, "right"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False, **kwargs):
        assert not return_offsets_mapping
        return {"input_ids": self.tokenizer(text, add_special_tokens=add_special_tokens, **kwargs)["input_ids"]}

    def convert_ids_to_tokens(self, ids):
        return self.tokenizer.convert_ids_to_tokens(ids)


@pytest.fixture(scope="module")
def t5(tiny_pipeline):
    return AutoTokenizer.from_pretrained(tiny_pipeline("cogvideox") / "tokenizer")


@pytest.fixture(scope="module")
def llama(tiny_pipeline):
    return AutoTokenizer.from_pretrained(tiny_pipeline("hunyuan_video") / "tokenizer")


@pytest.fixture(params=["offsets", "no offsets"])
def tokenizer(request, t5):
    return t5 if request.param == "offsets" else WithoutOffsets(t5)


def words_at(tokenizer, prompt, positions):
    ids = tokenizer(prompt)["input_ids"]
    return "".join(tokenizer.convert_ids_to_tokens([ids[position] for position in positions]))


@pytest.mark.parametrize(
    ("prompt", "concept", "found"),
    [
        ("a nude person in the park", "nude", "▁nude"),
        ("a nude person in the park", "nude person", "▁nude▁person"),
        ("a  nude   person", "nude person", "▁nude▁person"),
        ("car and scar and cart and car", "car", "▁car▁car"),
        ("a car", "car", "▁car"),
        ("car", "car", "▁car"),
        ("a red Car, a green CAR.", "car", "▁Car▁CAR"),
        ("a car's cars, car-park", "car", "▁car▁car"),
        ("a zeppelin and a zeppeline", "zeppelin", "▁zeppelin"),  # the tokenizer knows only its letters
        ("two (nude) dogs", "nude", "nude"),
        ("一只dog在, dog狗", "dog", "dog▁dog"),
    ],
)
def test_whole_words_in_any_case_everywhere(tokenizer, prompt, concept, found):
    positions = concept_tokens(tokenizer, prompt, concept)
    assert words_at(tokenizer, prompt, positions).replace(" ", "") == found
    assert positions == sorted(set(positions))


@pytest.fixture(params=["offsets", "no offsets"])
def spaced(request):
    """A tokenizer whose words include the space before them and whose further spaces are a token, as byte-level BPE."""
    words = ["<unk>", "a", " nude", " person", " ", "  "]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = Split(Regex(r" ?\w+|\s+(?= )|\s+"), behavior="isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    return tokenizer if request.param == "offsets" else WithoutOffsets(tokenizer)


def test_words_with_a_space_before_them(spaced):
    assert spaced.convert_ids_to_tokens(spaced("a nude   person")["input_ids"]) == ["a", " nude", "  ", " person"]
    assert concept_tokens(spaced, "a nude   person", "nude") == [1]
    assert concept_tokens(spaced, "a nude   person", "person") == ([3] if spaced.is_fast else [2, 3])
    if spaced.is_fast:  # a token of spaces does not belong to the concept
        assert concept_tokens(spaced, "a nude   person", "nude person") == [1, 3]


@pytest.mark.parametrize(
    ("prompt", "concept"), [("a scar", "car"), ("two cars", "car"), ("person nude", "nude person"), ("", "car")]
)
def test_an_absent_concept_is_an_error_that_shows_the_tokens(tokenizer, prompt, concept):
    with pytest.raises(
        ValueError, match=f"concept: expected whole words of the prompt '{prompt}', got '{concept}'"
    ) as error:
        concept_tokens(tokenizer, prompt, concept)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(prompt)["input_ids"])
    assert str(error.value).endswith("tokens: " + " ".join(tokens))


def test_the_error_names_another_form_of_the_concept(tokenizer):
    message = "got 'dog', which is there only as 'dogs': write 'dog' in the prompt as well; the prompt's tokens: ▁two"
    with pytest.raises(ValueError, match=message):
        concept_tokens(tokenizer, "two dogs", "dog")


def test_a_concept_that_is_cut_off_is_an_error(tokenizer):
    prompt = "a dog and a cat and a dog"
    assert concept_tokens(tokenizer, prompt, "dog") == [1, 7]
    assert concept_tokens(tokenizer, prompt, "dog", max_length=9) == [1, 7]
    for length in (7, 8):  # the last of 8 tokens is the end token
        assert concept_tokens(tokenizer, prompt, "dog", max_length=length) == [1]
    with pytest.raises(ValueError, match="'cat' in the first 4 tokens .*which is cut off.*▁dog ▁and ▁a ▁cat"):
        concept_tokens(tokenizer, prompt, "cat", max_length=4)


@pytest.mark.parametrize("concept", ["", " ", "\t"])
def test_a_blank_concept_is_an_error(t5, concept):
    with pytest.raises(ValueError, match="concept: expected one or more words"):
        concept_tokens(t5, "a dog", concept)


def test_tokens_that_span_words_are_refused_without_offsets():
    class Pairs(WithoutOffsets):
        def __init__(self):
            pass

        def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False):
            return {"input_ids": [hash(text[i : i + 7]) for i in range(0, len(text), 7)]}

    with pytest.raises(ValueError, match="tokens that span words"):
        concept_tokens(Pairs(), "a nude person", "nude")


def test_scripts_without_spaces_have_no_word_edges():
    assert occurrences("一个裸体的人", "裸体") == [(2, 4)]
    assert occurrences("un café, cafés", "café") == [(3, 7)]
    assert occurrences("a.b a+b", "a+b") == [(4, 7)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("concept", ["person", "shape", "video"])
def test_positions_are_those_in_the_templated_padded_and_cropped_text(llama, side, concept):
    """Even for words that also occur in the template."""
    prompt, length = "the video of a person and the shape of a person", 64
    template, crop = DEFAULT_PROMPT_TEMPLATE["template"], DEFAULT_PROMPT_TEMPLATE["crop_start"]
    llama.padding_side = side
    try:
        positions = concept_tokens(llama, prompt, concept, max_length=length, template=template, crop_start=crop)
        ids = llama(template.format(prompt), padding="max_length", max_length=length + crop, truncation=True).input_ids
    finally:
        llama.padding_side = "right"
    assert len(ids) == length + crop
    tokens = llama.convert_ids_to_tokens(ids[crop:])
    first = tokens.index("the") if side == "right" else len(tokens) - len(prompt.split()) - 1
    expected = [first + index for index, word in enumerate(prompt.split()) if word == concept]
    assert expected
    assert positions == expected
    assert {tokens[position] for position in positions} == {concept}


def test_braces_in_a_prompt_are_ordinary_characters(t5):
    assert concept_tokens(t5, "{} dog {0}", "dog", template="a {}") == concept_tokens(t5, "a {} dog {0}", "dog")


def test_a_prompt_file(tmp_path):
    file = tmp_path / "prompts.txt"
    lines = [
        "\ufeff# what to erase",
        "",
        "  a nude person in the park \r",
        "a nude person\ta clothed person",
        "  # not this",
    ]
    file.write_bytes("\n".join([*lines, "最後\u2028の行"]).encode())
    # The file of a Windows editor, and one appended to it.
    other = tmp_path / "crlf.txt"
    other.write_bytes(b"\xef\xbb\xbfa dog\r\n\r\n\xef\xbb\xbfa cat\ta car\r\n# no\r\n")
    assert read_prompts(other) == [PromptLine("a dog", None), PromptLine("a cat", "a car")]
    assert read_prompts(file) == [
        PromptLine("a nude person in the park", None),
        PromptLine("a nude person", "a clothed person"),
        PromptLine("最後\u2028の行", None),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected one prompt per line, got none"),
        (b"# nothing\n \n", "got none"),
        (b"a\tb\tc", "line 1: expected 'prompt' or 'prompt<TAB>instead'"),
        (b"a\nb\t", "line 2: expected"),
        (b"\tb", "line 1: expected"),
        (b"a \xff", "expected UTF-8 text"),
        ("a dog".encode("utf-16"), "expected UTF-8 text, got bytes that are not"),
        ("a dog".encode("utf-16-le"), "expected UTF-8 text, got zero bytes; save it as UTF-8"),
        (b"a dog\ta dog", "line 1: expected 'prompt' or 'prompt<TAB>instead', got 'a dog.ta dog'"),
    ],
)
def test_wrong_prompt_files_are_refused(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(file)


def test_a_missing_prompt_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="a text file with one prompt per line"):
        read_prompts(tmp_path / "none.txt")


def test_errors_about_long_prompts_are_short() -> None:
    tokenizer = t5_tokenizer()
    for prompt, message in (("a circle" + "x" * 5000, "whole words"), ("a park " * 2000 + "circle", "first 16 tokens")):
        with pytest.raises(ValueError, match=message) as info:
            concept_tokens(tokenizer, prompt, "circle", max_length=16)
        assert "the prompt's tokens: ▁a" in str(info.value) and len(str(info.value)) < 500


def test_errors_about_long_concepts_are_short() -> None:
    concept, tokenizer = "circle" * 100_000, t5_tokenizer()
    for find in (
        lambda: concept_tokens(tokenizer, "a park", concept),
        lambda: occurrences("a park", " " * 10**6),
        lambda: _refuse_concept(concept, f"a {concept}", "data"),
        lambda: PrepareOptions("tiny", "cache", " " * 10**6),
        lambda: Request(concept, follow="instead"),
        lambda: Batches({concept: None, "b" * 10**6: None}, [TargetGroup(concept + "s")], None, size=1, seed=0),
    ):
        with pytest.raises(ValueError, match="expected") as info:
            find()
        assert len(str(info.value)) < 1000
