"""The files of a teacher cache: written, resumed, read, and checked when they are damaged or hostile."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from random import Random

import pytest
import safetensors.torch
import torch

from fastunlearn.training.cache import TeacherCache, shards, validation
from fastunlearn.training.cache.index import cache_fingerprint, file_entry, sealed
from fastunlearn.training.cache.writer import CacheWriter

LATENT, GRID = (3, 4, 8, 8), (3, 4, 4)
FACTS = {
    "latent_shape": LATENT,
    "token_grid": GRID,
    "dtype": "bfloat16",
    "boundary": 500.0,
    "concept": "circle",
    "seed": 0,
}
CONDITIONS = {
    prompt: {"encoder_hidden_states": torch.full((5, 6), float(number)), "mask": torch.ones(5, dtype=torch.bool)}
    for number, prompt in enumerate(("a circle", "a square", ""))
}
GROUPS = ["target", "target", "kept"]
POINTS = [3, 1, 2]
ORIGIN = {"model": "somewhere", "versions": {"torch": "1"}}


def unit(index):
    """The points of a unit of work, the same at every call."""
    generator = torch.Generator().manual_seed(index)
    count = POINTS[index]
    latents = [torch.randn(count, *LATENT, generator=generator).bfloat16() for _ in range(3)]
    return {
        "prompts": ["a circle" if GROUPS[index] == "target" else "a square"] * count,
        "x_t": latents[0],
        "t": torch.linspace(900, 100, count),
        "v_uncond": latents[1],
        "v_cond": latents[2],
        "mask": torch.rand(count, *GRID, generator=generator) > 0.5 if GROUPS[index] == "target" else None,
    }


def begin(folder, process_index=0, **facts):
    return CacheWriter(folder, FACTS | facts, CONDITIONS, GROUPS, origin=ORIGIN, process_index=process_index)


def write(folder, units=range(3), finish=True, **facts):
    writer = begin(folder, **facts)
    for index in units:
        if not writer.has(index):
            writer.write(index, **unit(index))
    if finish:
        writer.finish()
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "cache")


def rewrite_index(folder, change, keep_fingerprint=False):
    """Changes the index as an attacker would: with a fingerprint and a checksum that match the new entries."""
    index = json.loads((folder / "index.json").read_text())
    change(index)
    if not keep_fingerprint:
        index["fingerprint"] = cache_fingerprint(index["facts"], index["conditions"]["sha256"])
    (folder / "index.json").write_text(json.dumps(sealed(index)))


def test_reading_gives_what_was_written(folder):
    cache = TeacherCache.open(folder, verify=True)
    assert {name: len(points) for name, points in cache.groups.items()} == {"target": 4, "kept": 2}
    assert cache.facts["latent_shape"] == list(LATENT) and cache.facts["concept"] == "circle"
    assert cache.facts["model"] == "somewhere" and cache.prompts == list(CONDITIONS)
    target, kept = cache.groups["target"], cache.groups["kept"]
    first, second = unit(0), unit(1)
    got = target.rows(torch.tensor([3, 0, 2, 0]))  # across shards, out of order, twice
    for name in ("x_t", "v_uncond", "v_cond", "mask"):
        rows = [second[name][0], first[name][0], first[name][2], first[name][0]]
        expected = torch.stack(rows)
        assert getattr(got, name).dtype == expected.dtype and torch.equal(getattr(got, name), expected), name
    assert torch.equal(got.t, torch.tensor([900.0, 900, 100, 900])) and got.t.dtype == torch.float32
    assert got.condition.keys() == CONDITIONS["a circle"].keys()
    assert all(torch.equal(x, CONDITIONS["a circle"][name].expand_as(x)) for name, x in got.condition.items())
    assert got.condition["mask"].dtype == torch.bool and len(got.condition["mask"]) == 4
    assert target.experts.tolist() == [0, 0, 1, 0]  # t = 900, 500, 100, 900; the first expert has the boundary
    kept_row = kept.rows([1])
    assert kept_row.mask is None and not kept.has_masks and target.has_masks
    assert torch.equal(kept_row.condition["encoder_hidden_states"], torch.ones(1, 5, 6))


@pytest.mark.parametrize(
    ("indices", "error"),
    [([], ValueError), ([4], ValueError), ([-1], ValueError), ([0.5], TypeError), ([[0]], ValueError)],
)
def test_wrong_row_indices_are_refused(folder, indices, error):
    with pytest.raises(error, match="indices"):
        TeacherCache.open(folder).groups["target"].rows(indices)


def test_without_a_boundary_there_is_one_expert(tmp_path):
    cache = TeacherCache.open(write(tmp_path, boundary=None))
    assert not cache.groups["target"].experts.any()


def test_several_processes_write_the_same_bytes_as_one(folder, tmp_path):
    shared = tmp_path / "shared"
    second = begin(shared, process_index=1)
    second.write(1, **unit(1))
    first = begin(shared)
    first.write(2, **unit(2))
    with pytest.raises(ValueError, match="expected 3 shards, got 2; shard-00000.* is missing"):
        first.finish()
    first.write(0, **unit(0))
    first.finish()
    assert contents(shared) == contents(folder)


def test_a_shard_is_read_row_by_row(tmp_path):
    """Reading a row of a large shard adds little resident memory to a process that did not write it."""
    facts = {"latent_shape": [1 << 20], "token_grid": [1, 1, 1], "dtype": "float32", "boundary": None}
    writer = CacheWriter(tmp_path, facts, {"": {"encoder_hidden_states": torch.ones(1)}}, ["kept"])
    x = torch.zeros(1, 1 << 20).expand(20, -1)
    writer.write(0, [""] * 20, x_t=x, t=torch.zeros(20), v_uncond=x, v_cond=x)
    writer.finish()
    code = f"""
        from fastunlearn.training.cache import TeacherCache
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
        points = TeacherCache.open({str(tmp_path)!r}).groups["kept"]
        before = resident()
        for _ in range(2):
            rows = points.rows([7])
        print(resident() - before)
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    # One row is 12 MB of the shard's 240.
    assert float(process.stdout) < 60


def test_resuming_keeps_existing_files(folder, tmp_path):
    begun = tmp_path / "begun"
    write(begun, [0], finish=False)
    with pytest.raises(ValueError, match="not finished; run prepare again"):
        TeacherCache.open(begun)
    before = (begun / "shard-00000.safetensors").stat()
    (begun / "shard-00001.safetensors.0.partial").write_bytes(b"half of it")
    (begun / "notes.txt").write_text("a user's own")
    write(begun)
    assert (begun / "shard-00000.safetensors").stat() == before
    assert contents(begun) == contents(folder) | {"notes.txt": b"a user's own"}
    write(begun)  # finished already
    assert contents(begun) == contents(folder) | {"notes.txt": b"a user's own"}
    (begun / "shard-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="shard-00002.*run prepare again"):
        TeacherCache.open(begun)
    write(begun)
    (begun / "index.json").unlink()  # the labels of the shards say what they belong to
    (begun / "prompts.safetensors").write_bytes(b"damaged")
    (begun / "notes.txt").unlink()
    write(begun)
    assert contents(begun) == contents(folder)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-10])


def one_bit_changed(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def emptied(path):
    path.write_bytes(b"")


def copied_from_another_unit(path):
    path.write_bytes((path.parent / "shard-00000.safetensors").read_bytes())


def without_a_label(path):
    safetensors.torch.save_file({"x_t": torch.zeros(1)}, path)


DAMAGES = {
    truncated: "not a whole safetensors file",
    one_bit_changed: "tensors that match its digest",
    emptied: "not a whole safetensors file",
    copied_from_another_unit: "another run.*unit is 0, not 1",
    without_a_label: "expected a shard of a teacher cache",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_wrong_shard_is_named_and_left_alone(tmp_path, damage):
    write(tmp_path, [0, 1], finish=False)
    damage(tmp_path / "shard-00001.safetensors")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"(?s)shard-00001.safetensors: .*{DAMAGES[damage]}.*delete the file"):
        write(tmp_path)
    assert contents(tmp_path) == before


def test_a_shard_of_other_arguments_is_recognised_without_an_index(tmp_path):
    write(tmp_path, [0], finish=False, seed=1)
    (tmp_path / "index.json").unlink()
    with pytest.raises(ValueError, match="shard-00000.*other arguments.*fingerprint"):
        write(tmp_path)


def test_changed_arguments_are_listed(folder):
    before = contents(folder)
    with pytest.raises(ValueError) as caught:
        write(folder, seed=3, concept="square", extra=[1, 2])
    lines = str(caught.value).splitlines()
    assert lines[1:] == ["  concept: 'circle' -> 'square'", "  seed: 0 -> 3", "  extra: None -> [1, 2]"]
    with pytest.raises(ValueError, match="text encoders or their precision changed"):
        changed = CONDITIONS | {"": {name: 0 * x for name, x in CONDITIONS[""].items()}}
        changed["a circle"] = {name: x + 1 if x.is_floating_point() else x for name, x in changed["a circle"].items()}
        CacheWriter(folder, FACTS, changed, GROUPS, origin=ORIGIN)
    assert contents(folder) == before


def test_resuming_with_other_versions_warns(folder):
    before = contents(folder)
    with pytest.warns(UserWarning, match="begun with.*'1'.*continues with.*'2'"):
        CacheWriter(folder, FACTS, CONDITIONS, GROUPS, origin=ORIGIN | {"versions": {"torch": "2"}}).finish()
    assert contents(folder) == before


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="expected a new folder or a teacher cache, got one with thesis.tex"):
        begin(tmp_path)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="expected the index of a teacher cache"):
        begin(tmp_path)
    assert contents(tmp_path) == {"thesis.tex": b"years of work", "index.json": b"{}"}


def test_a_full_disk(tmp_path, folder, monkeypatch):
    begun = tmp_path / "begun"
    write(begun, [0], finish=False)
    before = contents(begun)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            OSError, match="no space left.*make room and run the same command again.*shard-00001"
        ) as caught:
            write(begun)
    assert caught.value.errno == errno.ENOSPC
    assert contents(begun) == before  # nor is there a partial file
    assert contents(write(begun)) == contents(folder)


def test_points_that_are_not_finite_or_do_not_fit_are_not_written(tmp_path):
    writer = begin(tmp_path)
    good = unit(0)
    bad = good["v_cond"].clone()
    bad[1, 0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="v_cond: expected finite values.*in unit 0.*'a circle'.*mixed_precision"):
        writer.write(0, **good | {"v_cond": bad})
    with pytest.raises(ValueError, match="x_t"):
        writer.write(0, **good | {"x_t": good["x_t"][:, :1]})
    with pytest.raises(ValueError, match="mask"):
        writer.write(0, **good | {"mask": good["mask"][:, :1]})
    assert not (tmp_path / "shard-00000.safetensors").exists()


def flip(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def header_size(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_a_shard_is_verified_when_it_is_first_read(folder, monkeypatch):
    flip(folder / "shard-00001.safetensors", -1)
    points = TeacherCache.open(folder).groups["target"]
    points.rows([0, 2])  # the other shard
    for _ in range(2):
        with pytest.raises(ValueError, match="shard-00001.*: expected the checksum that index.json lists, got another"):
            points.rows([3, 0])
    with pytest.raises(ValueError, match="shard-00001.*checksum"):
        TeacherCache.open(folder, verify=True)
    assert len(TeacherCache.open(folder, verify=False).groups["target"].rows([3]).t) == 1


def test_every_file_is_hashed_once(folder, monkeypatch):
    hashed = []

    def count(path):
        hashed.append(path.name)
        return file_entry(path)

    monkeypatch.setattr(validation, "file_entry", count)
    for verify, at_first, later in ((None, 1, 2), (True, 4, 0), (False, 0, 0)):
        cache = TeacherCache.open(folder, verify=verify)
        assert len(hashed) == len(set(hashed)) == at_first, verify
        hashed.clear()
        for _ in range(3):
            cache.groups["target"].rows([0, 3])
        assert len(hashed) == len(set(hashed)) == later, verify
        hashed.clear()


def test_any_byte_that_is_changed_is_noticed(folder, tmp_path):
    """Every file is changed at random: reading all points raises, or gives what was written."""
    random = Random(0)
    names = sorted(contents(folder))
    before = {name: points.rows(range(len(points))) for name, points in TeacherCache.open(folder).groups.items()}
    harmless = 0
    for number in range(250):
        changed = tmp_path / "changed"
        shutil.copytree(folder, changed, dirs_exist_ok=True)
        path = changed / names[number % len(names)]
        size = len(path.read_bytes())
        end = header_size(path) if path.suffix == ".safetensors" and random.random() < 0.5 else size
        flip(path, random.randrange(end), random.randrange(8))
        try:
            cache = TeacherCache.open(changed)
            after = {name: points.rows(range(len(points))) for name, points in cache.groups.items()}
        except ValueError as error:
            assert "changed" in str(error)  # the folder's name, too
            continue
        harmless += 1
        assert path.name == "index.json" and after.keys() == before.keys()
        assert cache.facts == TeacherCache.open(folder).facts
        for name, rows in before.items():
            for field in ("x_t", "t", "v_uncond", "v_cond", "mask"):
                a, b = getattr(rows, field), getattr(after[name], field)
                assert (a is None and b is None) or torch.equal(a, b)
    assert harmless < 5  # white space, for example


def dropped_shard(index):
    index["shards"].pop()


def other_model(index):
    index["origin"]["model"] = "elsewhere"


def shards_in_another_order(index):
    index["shards"].reverse()


@pytest.mark.parametrize("change", [dropped_shard, other_model, shards_in_another_order])
def test_an_edited_list_of_shards_is_noticed(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))
    match = "index.json: expected entries that match its checksum, got others; .*run prepare again"
    with pytest.raises(ValueError, match=match):
        TeacherCache.open(folder)
    with pytest.raises(ValueError, match=match):
        write(folder)


def test_timesteps_are_verified_before_the_points_are_read(folder):
    """They decide which points a step draws, even if it draws none of this shard."""
    path = folder / "shard-00001.safetensors"
    tensors = safetensors.torch.load_file(path)
    position = path.read_bytes().index(tensors["t"].numpy().tobytes())
    flip(path, position + 2, 3)
    with pytest.raises(ValueError, match="shard-00001.*: expected the timesteps and prompts that index.json lists"):
        TeacherCache.open(folder)


def test_a_cache_of_an_earlier_version_can_be_read_and_resumed(folder):
    before = contents(folder)
    index = json.loads((folder / "index.json").read_text())
    del index["sha256"]
    for entry in index["shards"]:
        del entry["steps_sha256"]
    (folder / "index.json").write_text(json.dumps(index))
    assert len(TeacherCache.open(folder, verify=True).groups["target"].rows([0, 3]).t) == 2
    write(folder)
    assert contents(folder) == before


def test_resuming_refuses_a_shard_that_differs_from_the_one_listed(folder):
    """Even if its own label fits: as if it had been computed by a run with the same arguments elsewhere."""
    path = folder / "shard-00001.safetensors"
    tensors = safetensors.torch.load_file(path)
    index = json.loads((folder / "index.json").read_text())
    path.write_bytes(
        shards.serialize(tensors | {"x_t": 2 * tensors["x_t"]}, shards.Label(index["fingerprint"], 1, "target"))
    )
    before = contents(folder)
    match = "shard-00001.*: expected the checksum that index.json lists, got another; .*delete the file to compute it"
    with pytest.raises(ValueError, match=match):
        write(folder)
    with pytest.raises(ValueError, match=match):
        begin(folder, process_index=1).finish()  # a process that did not look at the shard before
    assert contents(folder) == before
    path.unlink()
    write(folder)
    TeacherCache.open(folder, verify=True)


def test_finishing_checks_the_shards_of_other_processes(tmp_path):
    write(tmp_path, [0, 1], finish=False)
    writer = begin(tmp_path, process_index=1)
    writer.write(2, **unit(2))
    flip(tmp_path / "shard-00000.safetensors", -1)
    with pytest.raises(ValueError, match="shard-00000.*: expected tensors that match its digest"):
        writer.finish()
    assert json.loads((tmp_path / "index.json").read_text())["finished"] is False


@pytest.mark.parametrize(
    "change", [{"x_t": torch.zeros(1, *LATENT)}, {"t": torch.zeros(1, 1)}, {"extra": torch.zeros(1)}, {"t": None}]
)
def test_resuming_refuses_tensors_that_do_not_fit_under_a_fitting_label(tmp_path, change):
    writer = begin(write(tmp_path, [0, 1], finish=False))
    path = tmp_path / "shard-00001.safetensors"
    tensors = {name: x for name, x in (safetensors.torch.load_file(path) | change).items() if x is not None}
    path.write_bytes(shards.serialize(tensors, shards.Label(writer.fingerprint, 1, "target")))
    with pytest.raises(
        ValueError, match="shard-00001.*: expected .* points with .*delete the file to compute it again"
    ):
        write(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'\\"unit\\": 1', b'\\"unit\\":01'), (b'\\"unit\\": 1}', b'\\"unit\\":1 }'), (b'\\"digest', b'\\"Digest')],
)
def test_resuming_refuses_a_label_that_was_not_written_so(tmp_path, old, new):
    write(tmp_path, [0, 1], finish=False)
    path = tmp_path / "shard-00001.safetensors"
    assert len(old) == len(new) and path.read_bytes().count(old) == 1
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(ValueError, match="shard-00001.*label.*delete the file to compute it again"):
        write(tmp_path)


FAMILY = {"backbone": "hunyuan_video", "dtype": "bfloat16"}
HUNYUAN = {
    "encoder_hidden_states": torch.zeros(5, 6, dtype=torch.bfloat16),
    "encoder_attention_mask": torch.ones(5, dtype=torch.int64),
    "pooled_projections": torch.zeros(4, dtype=torch.bfloat16),
}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({}, None),
        ({"encoder_hidden_states": torch.zeros(5, 6)}, r"\(L, D\) of BF16 as '0.encoder_hidden_states', got .* of F32"),
        ({"encoder_hidden_states": torch.zeros(5, 6, dtype=torch.int64)}, "got .* of I64"),
        (
            {"encoder_attention_mask": torch.ones(5)},
            r"\(L\) of I64 or BOOL as '0.encoder_attention_mask', got .* of F32",
        ),
        ({"encoder_hidden_states": torch.zeros(0, 6, dtype=torch.bfloat16)}, r"got \(0, 6\)"),
        ({"pooled_projections": torch.zeros(1, 4, dtype=torch.bfloat16)}, r"\(P\) of BF16 .*, got \(1, 4\)"),
        ({"pooled_projections": None}, "pooled_projections for each of 1 prompts, got"),
        ({"other": torch.zeros(1)}, "for each of 1 prompts, got"),
    ],
)
def test_conditions_are_those_of_the_family(tmp_path, change, match):
    condition = {name: x for name, x in (HUNYUAN | change).items() if x is not None}
    writer = CacheWriter(tmp_path, FACTS | FAMILY, {"a circle": condition}, ["target"], origin=ORIGIN)
    writer.write(0, **unit(0) | {"prompts": ["a circle"] * 3})
    writer.finish()
    if match is None:
        cache = TeacherCache.open(tmp_path)
        assert cache.condition_shapes == {name: tuple(x.shape) for name, x in HUNYUAN.items()}
    else:
        with pytest.raises(ValueError, match=f"prompts.safetensors: expected .*{match}"):
            TeacherCache.open(tmp_path)


@pytest.mark.parametrize("file", ["shard-00001.safetensors", "prompts.safetensors"])
def test_truncated_files_are_found_on_opening(folder, file):
    truncated(folder / file)
    with pytest.raises(ValueError, match=f"{file}: expected .* bytes.*truncated"):
        TeacherCache.open(folder)


def set_shard(key, value):
    return lambda index: index["shards"][1].__setitem__(key, value)


def set_fact(key, value):
    return lambda index: index["facts"].__setitem__(key, value)


HOSTILE = {
    "path outside": (set_shard("file", "../../secret.safetensors"), "file name.*secret"),
    "absolute path": (set_shard("file", "/etc/passwd"), "file name.*passwd"),
    "other file": (set_shard("file", "prompts.safetensors"), "file name.*prompts"),
    "no file name": (set_shard("file", None), "file name.*None"),
    "huge count": (set_shard("points", 10**18), "1000000000000000000 points"),
    "negative count": (set_shard("points", -1), "-1 points"),
    "long count": (set_shard("points", "x" * 9999), "expected 'xxx"),
    "other group": (set_shard("group", "kept"), "another run or unit"),
    "no list of shards": (lambda index: index.__setitem__("shards", {"0": 1}), "list of objects as 'shards'"),
    "no conditions": (lambda index: index["conditions"].__setitem__("file", "shard-00000.safetensors"), "file name"),
    "another unit's file": (set_shard("file", "shard-00000.safetensors"), "bytes"),
}
HOSTILE_FACTS = {
    "latent shape": (set_fact("latent_shape", [2**40]), "'latent_shape'"),
    "latent shape of text": (set_fact("latent_shape", "ab"), "'latent_shape'"),
    "dtype": (set_fact("dtype", "os.system"), "'dtype'"),
    "dtype no text": (set_fact("dtype", ["float32"]), "'dtype'"),
    "boundary": (set_fact("boundary", "x"), "'boundary'"),
    "boundary true": (set_fact("boundary", True), "'boundary'"),
    "prompts": (set_fact("prompts", [1]), "'prompts'"),
    "few prompts": (set_fact("prompts", []), "0 prompts"),
    "other seed": (set_fact("seed", 7), "another run"),
}


@pytest.mark.parametrize("case", HOSTILE | HOSTILE_FACTS)
def test_a_hostile_index_is_refused(folder, case):
    change, message = (HOSTILE | HOSTILE_FACTS)[case]
    rewrite_index(folder, change)
    with pytest.raises(ValueError, match=message) as raised:
        TeacherCache.open(folder)
    assert len(str(raised.value)) < 1200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"format": "fastunlearn-teacher-cache", "format_version": 99}', "format_version 1, got 99"),
        ('{"format": "fastunlearn-teacher-cache", "format_version": 1}', "'facts'"),
        ('{"format": NaN}', "NaN is not JSON"),
        ("\xff\xfe", "not valid JSON"),
    ],
)
def test_a_damaged_index_is_refused(folder, text, message):
    (folder / "index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"index.json: .*({message})"):
        TeacherCache.open(folder)


def test_facts_edited_by_hand_are_noticed(folder):
    rewrite_index(folder, set_fact("concept", "square"), keep_fingerprint=True)
    with pytest.raises(ValueError, match="expected a fingerprint that matches its facts"):
        TeacherCache.open(folder)


HOSTILE_TENSORS = {
    "NaN timestep": ({"t": torch.full((1,), float("nan"))}, "timesteps from 0 to 1000"),
    "prompt out of range": ({"prompt": torch.full((1,), 3, dtype=torch.int32)}, "indices of the 3 prompts"),
    "negative prompt": ({"prompt": torch.full((1,), -1, dtype=torch.int32)}, "indices of the 3 prompts"),
    "other dtype": ({"x_t": torch.zeros(1, *LATENT)}, "1 points"),
    "other shape": ({"v_cond": torch.zeros(1, 3, dtype=torch.bfloat16)}, "1 points"),
    "other count": ({"t": torch.zeros(2)}, "1 points"),
    "one more tensor": ({"extra": torch.zeros(2)}, "1 points"),
    "no mask": ({"mask": None}, "masks in all shards of group 'target' or in none"),
}


@pytest.mark.parametrize("case", HOSTILE_TENSORS)
def test_hostile_tensors_are_refused(folder, case):
    change, message = HOSTILE_TENSORS[case]
    path = folder / "shard-00001.safetensors"
    tensors = safetensors.torch.load(path.read_bytes()) | change
    index = json.loads((folder / "index.json").read_text())
    label = shards.Label(index["fingerprint"], 1, "target")
    content = shards.serialize({name: x for name, x in tensors.items() if x is not None}, label)
    path.write_bytes(content)
    sums = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    sums["steps_sha256"] = shards.steps_digest(tensors["t"], tensors["prompt"])
    rewrite_index(folder, lambda index: index["shards"][1].update(sums))
    with pytest.raises(ValueError, match=message):
        TeacherCache.open(folder, verify=True)


def test_a_missing_cache(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a teacher cache.*run prepare first"):
        TeacherCache.open(tmp_path / "nowhere")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("file", ["index.json", "prompts.safetensors", "shard-00001.safetensors"])
def test_opening_a_cache_runs_no_code(folder, tmp_path, file):
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    (folder / file).write_bytes(bomb)
    if file != "index.json":
        sums = {"bytes": len(bomb), "sha256": hashlib.sha256(bomb).hexdigest()}
        rewrite_index(
            folder, lambda index: (index["shards"][1] if "shard" in file else index["conditions"]).update(sums)
        )
    with pytest.raises(ValueError, match=file):
        TeacherCache.open(folder, verify=True)
    with pytest.raises(ValueError):
        write(folder)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)
    assert (tmp_path / "exploded").exists()


def test_a_dtype_that_no_cache_can_hold_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="facts: expected one of float32, bfloat16, float16 as 'dtype', got 'float64'"):
        CacheWriter(tmp_path / "cache", FACTS | {"dtype": "float64"}, {}, [])
    assert not (tmp_path / "cache").exists()
