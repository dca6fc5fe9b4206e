"""The data: fetching, preparing, loading, tokenizers, and every bad input that has its own message.

Run with `python -m pytest tests/test_data.py`. Nothing here uses the network: sources are small files that
the tests make. The tests of the real sets run when DATA_MIRROR names a folder or address that holds them (see
data/README.md).
"""

import hashlib
import http.server
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data import fetch as fetching
from data import prepare as preparing
from data.dataset import ByteTokenizer, CharTokenizer, GPT2Tokenizer, load
from data.fetch import DataError, Source, Unavailable, WrongBytes, fetch
from data.prepare import prepare

MIRROR = os.environ.get("DATA_MIRROR")
with_real_data = pytest.mark.skipif(not MIRROR, reason="DATA_MIRROR is not set: no real data to compare with")

CONTENT = "To be, or not to be:\n\nthat is the question.\n".encode() * 40
NAMES = ("wikitext2", "shakespeare_char")


@pytest.fixture(autouse=True)
def hermetic(monkeypatch):
    """No network, no mirror, no proxy between a test and its own server."""
    monkeypatch.setenv("NANOGPT_OFFLINE", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("DATA_MIRROR", raising=False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")    # restores what fetch_gpt2 sets


def source_of(content: bytes, *addresses: str, archives=()) -> Source:
    return Source("some/text.txt", hashlib.sha256(content).hexdigest(), len(content), addresses, archives)


def files_under(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def put(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def server():
    """A web server with pages: path -> (status, declared length or None, body); it notes User-Agents."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            agents.append(self.headers["User-Agent"])
            status, length, body = pages.get(self.path, (404, None, b"no such page"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    pages, agents = {}, []
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.pages, httpd.agents = pages, agents
    httpd.handle_error = lambda *arguments: None    # a client that hangs up is what some tests are about
    httpd.address = f"http://127.0.0.1:{httpd.server_port}"
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def online(monkeypatch):
    """Let public addresses be asked; the tests that use it name only their own server."""
    monkeypatch.delenv("NANOGPT_OFFLINE")


# --- Fetching ----------------------------------------------------------------------------------------------

def test_mirror_folder_is_copied_and_then_not_needed(tmp_path, monkeypatch):
    source = source_of(CONTENT)
    put(tmp_path / "mirror", source.path, CONTENT)
    monkeypatch.setenv("DATA_MIRROR", str(tmp_path / "mirror"))
    path, origin = fetch(source, tmp_path / "raw")
    assert (path, origin) == (tmp_path / "raw" / source.path, "DATA_MIRROR")
    assert path.read_bytes() == CONTENT
    monkeypatch.delenv("DATA_MIRROR")
    assert fetch(source, tmp_path / "raw") == (path, "data/raw")
    assert files_under(tmp_path / "raw") == [source.path]


@pytest.mark.parametrize("wrong", [b"", CONTENT[:-1], CONTENT + b"x", b"y" + CONTENT[1:]],
                         ids=["empty", "short", "long", "changed"])
def test_wrong_mirror_is_an_error_and_leaves_nothing(tmp_path, monkeypatch, server, online, wrong):
    server.pages["/text"] = (200, None, CONTENT)
    source = source_of(CONTENT, server.address + "/text")
    address = put(tmp_path / "mirror", source.path, wrong)
    monkeypatch.setenv("DATA_MIRROR", str(tmp_path / "mirror"))
    with pytest.raises(WrongBytes) as caught:
        fetch(source, tmp_path / "raw")
    for part in (source.path, str(address), source.sha256, hashlib.sha256(wrong).hexdigest(), "DATA_MIRROR"):
        assert part in str(caught.value)
    assert files_under(tmp_path / "raw") == []
    assert not server.agents, "a wrong mirror was passed over to the public address"


def test_mirror_at_an_address(tmp_path, monkeypatch, server):
    source = source_of(CONTENT)
    server.pages["/data/" + source.path] = (200, None, CONTENT)
    monkeypatch.setenv("DATA_MIRROR", server.address + "/data/")
    path, origin = fetch(source, tmp_path)
    assert path.read_bytes() == CONTENT and origin == "DATA_MIRROR"
    assert "urllib" not in server.agents[0].lower()


@pytest.mark.parametrize("page", [(200, len(CONTENT), CONTENT[:100]), (200, None, b"<html>try later</html>"),
                                  (503, None, CONTENT)], ids=["truncated", "error page", "status 503"])
def test_bad_answer_is_never_kept(tmp_path, monkeypatch, server, page):
    source = source_of(CONTENT)
    server.pages["/" + source.path] = page
    monkeypatch.setenv("DATA_MIRROR", server.address)
    with pytest.raises(DataError, match=source.path):
        fetch(source, tmp_path)
    assert files_under(tmp_path) == []


def test_falls_to_the_next_address_and_says_what_each_gave(tmp_path, server, online):
    addresses = [server.address + path for path in ("/missing", "/wrong", "/right")]
    server.pages["/wrong"] = (200, None, b"something else")
    with pytest.raises(Unavailable) as caught:
        fetch(source_of(CONTENT, *addresses), tmp_path)
    for part in (*addresses, "404", hashlib.sha256(b"something else").hexdigest()):
        assert part in str(caught.value)
    assert files_under(tmp_path) == []
    server.pages["/right"] = (200, None, CONTENT)
    path, origin = fetch(source_of(CONTENT, *addresses), tmp_path)
    assert path.read_bytes() == CONTENT and origin.startswith("127.0.0.1")


def test_endless_answer_is_cut_off(tmp_path, server, online):
    server.pages["/text"] = (200, None, CONTENT * 5000)
    with pytest.raises(Unavailable, match=f"more than {len(CONTENT)} bytes"):
        fetch(source_of(CONTENT, server.address + "/text"), tmp_path)
    assert files_under(tmp_path) == []
    taken = []
    with pytest.raises(WrongBytes):
        chunks = (taken.append(1) or CONTENT for _ in range(9))
        fetching.save(chunks, tmp_path / "text", source_of(CONTENT), "here")
    assert len(taken) == 2, "more was read after it was known to be too much"


def test_offline_asks_no_public_address(tmp_path, server):
    server.pages["/text"] = (200, None, CONTENT)
    with pytest.raises(Unavailable):
        fetch(source_of(CONTENT, server.address + "/text", archives=(("pypi:nothing", "x"),)), tmp_path)
    assert not server.agents


def test_damaged_cache_is_fetched_again(tmp_path, monkeypatch):
    source = source_of(CONTENT)
    put(tmp_path / "raw", source.path, CONTENT[:50])
    with pytest.raises(Unavailable, match=hashlib.sha256(CONTENT[:50]).hexdigest()):
        fetch(source, tmp_path / "raw")
    put(tmp_path / "mirror", source.path, CONTENT)
    monkeypatch.setenv("DATA_MIRROR", str(tmp_path / "mirror"))
    assert fetch(source, tmp_path / "raw")[0].read_bytes() == CONTENT


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


def test_member_of_a_zip(tmp_path, server, online):
    server.pages["/texts.zip"] = (200, None, zipped(folder__text=CONTENT, other=b"other"))
    source = source_of(CONTENT, archives=((server.address + "/texts.zip", "folder/text"),))
    assert fetch(source, tmp_path)[0].read_bytes() == CONTENT


@pytest.mark.parametrize("content", [zipped(other=b"other"), zipped(text=bytes(10_000_000)), b"PK no zip"],
                         ids=["member missing", "bomb", "no zip"])
def test_bad_zip_is_refused(content):
    with pytest.raises(WrongBytes, match="member text"):
        fetching.zip_member(content, "text", limit=1000)


def test_wheel_from_pip(tmp_path, monkeypatch, online):
    def pip(command, **options):
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        assert command[-1] == "some_package==1.0" and options["timeout"] > 0
        wheel = "some_package-1.0-py3-none-any.whl"
        put(Path(command[command.index("-d") + 1]), wheel, zipped(a__text=CONTENT))
        return subprocess.CompletedProcess(command, 0, "", "")
    monkeypatch.setattr(subprocess, "run", pip)
    source = source_of(CONTENT, archives=(("pypi:some_package==1.0", "a/text"),))
    path, origin = fetch(source, tmp_path)
    assert path.read_bytes() == CONTENT and origin == "some_package==1.0"


def test_pip_that_fails_is_reported(tmp_path, monkeypatch, online):
    failed = subprocess.CompletedProcess("pip", 1, "", "one\nERROR: none")
    monkeypatch.setattr(subprocess, "run", lambda command, **options: failed)
    with pytest.raises(Unavailable, match="ERROR: none"):
        fetch(source_of(CONTENT, archives=(("pypi:some_package==1.0", "a/text"),)), tmp_path)


def test_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device.*make room"):
        prepare("shakespeare_char", allow_stand_in=True, root=tmp_path)
    assert files_under(tmp_path) == []


# --- Preparing ---------------------------------------------------------------------------------------------

@pytest.fixture
def small_play(tmp_path, monkeypatch):
    """The Shakespeare recipe on a small text; returns its root and puts the raw file there."""
    source = Source("tinyshakespeare/input.txt", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), ())
    monkeypatch.setattr(preparing, "SHAKESPEARE", source)
    monkeypatch.setattr(preparing, "TOKENS", {})
    put(tmp_path / "raw", source.path, CONTENT)
    return tmp_path


def test_prepare_by_character(small_play):
    data = load(prepare("shakespeare_char", root=small_play))
    text = CONTENT.decode()
    cut = len(text) * 9 // 10
    assert data.folder == small_play / "shakespeare_char"
    assert data.title == "Tiny Shakespeare" and not data.stand_in
    assert data.tokenizer.decode(data.splits["train"]) == text[:cut]
    assert data.tokenizer.decode(data.splits["val"]) == text[cut:]
    assert data.vocab_size == len(set(text)) and data.splits["train"].dtype == np.uint16
    assert data.bytes == {"train": cut, "val": len(text) - cut}
    assert files_under(data.folder) == ["meta.json", "train.bin", "val.bin"]


def test_meta_holds_no_path(small_play, monkeypatch):
    shutil.move(small_play / "raw", small_play / "mirror")
    monkeypatch.setenv("DATA_MIRROR", str(small_play / "mirror"))
    meta = load(prepare("shakespeare_char", root=small_play)).meta
    assert meta["source"] == "DATA_MIRROR" and str(small_play) not in json.dumps(meta)


def test_prepared_set_is_reused_and_a_damaged_one_made_again(small_play):
    folder = prepare("shakespeare_char", root=small_play)
    before = (folder / "train.bin").stat().st_mtime_ns
    assert prepare("shakespeare_char", root=small_play) == folder
    assert (folder / "train.bin").stat().st_mtime_ns == before
    good = (folder / "train.bin").read_bytes()
    put(folder, "train.bin", good[:-2])
    prepare("shakespeare_char", root=small_play)
    assert (folder / "train.bin").read_bytes() == good


def test_damaged_set_without_raw_files_is_refused_even_if_a_stand_in_is_allowed(small_play):
    folder = prepare("shakespeare_char", root=small_play)
    shutil.rmtree(small_play / "raw")
    put(folder, "val.bin", b"\0\0")
    with pytest.raises(DataError, match="val.bin.*delete the folder"):
        prepare("shakespeare_char", root=small_play, allow_stand_in=True)


@pytest.mark.parametrize("fails_at", ["val.bin", "meta.json"])
def test_interrupted_preparation_is_not_reused(small_play, monkeypatch, fails_at):
    real = os.replace

    def interrupted(temporary, target):
        if Path(target).name == fails_at:
            raise KeyboardInterrupt
        real(temporary, target)
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare("shakespeare_char", root=small_play)
    folder = small_play / "shakespeare_char"
    assert "train.bin" in files_under(folder) and "meta.json" not in files_under(folder)
    assert not [name for name in files_under(folder) if name.endswith(".tmp")]
    with pytest.raises(DataError, match="meta.json does not exist"):
        load(folder)
    monkeypatch.setattr(os, "replace", real)
    assert load(prepare("shakespeare_char", root=small_play)).splits["val"].size


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with fetching.replacing(tmp_path / "file") as first, fetching.replacing(tmp_path / "file") as second:
        first.write(b"whole")
        second.write(b"whole")
    assert files_under(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"whole"


def test_two_processes_at_once(tmp_path):
    """Both finish, with the same whole set: what one renames, the other may rename again."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=prepare, args=("shakespeare_char",),
                               kwargs={"allow_stand_in": True, "root": tmp_path}) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert load(tmp_path / "stand_in_char").stand_in
    assert files_under(tmp_path / "stand_in_char") == ["meta.json", "train.bin", "val.bin"]


def test_wrong_token_count_is_refused(small_play, monkeypatch):
    monkeypatch.setattr(preparing, "TOKENS", {"shakespeare_char": {"train": 1, "val": 1}})
    with pytest.raises(WrongBytes, match="where 1 are right"):
        prepare("shakespeare_char", root=small_play)
    assert not (small_play / "shakespeare_char").exists()


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="wikitext2, shakespeare_char"):
        prepare("wikitext", root=tmp_path)
    with pytest.raises(ValueError, match="raw for wikitext2"):
        prepare("shakespeare_char", variant="raw", root=tmp_path)


def test_words_are_counted_as_the_literature_counts():
    split = preparing.count(" \n = Title = \n \n One <unk> three . \n")
    assert (split.words, split.lines) == (3 + 4 + 4, 4)
    assert (preparing.count("no end of line").words, preparing.count("").words) == (4 + 1, 0)
    assert preparing.count("one\x85two\n").lines == 1, "only a newline ends a line"


def test_text_is_read_as_it_stands(tmp_path):
    path = put(tmp_path, "text", "one\r\ntwo\rthré\n".encode())
    assert preparing.read_text(path) == "one\r\ntwo\rthré\n"


def raw_zip(text: str) -> bytes:
    """The raw archive with this text in each of its three files."""
    return zipped(**{f"wikitext-2-raw__wiki.{s}.raw": text.encode() for s in ("train", "valid", "test")})


def test_raw_rows_are_joined_by_blank_lines():
    text = " \n = Title = \n \n Text é . \n"
    splits = preparing.raw_splits(raw_zip(text))
    assert list(splits) == ["train", "val", "test"]
    joined = "\n\n".join(["", " = Title = \n", "", " Text é . \n"])
    assert splits["test"] == preparing.Split(joined, words=3 + 3 + 4, lines=4)
    without_blanks = len(text.encode()) - 2 * 2
    assert len(joined.encode()) == without_blanks + 2 * 3


# --- The stand-in ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
def test_without_data_the_refusal_says_which_files_to_put_where(tmp_path, name):
    with pytest.raises(Unavailable) as caught:
        prepare(name, root=tmp_path)
    wanted = {"wikitext2": ["wikitext-2/train.txt", "wikitext-2/valid.txt", "wikitext-2/test.txt",
                            "gpt2/vocab.bpe", "gpt2/encoder.json"],
              "shakespeare_char": ["tinyshakespeare/input.txt"]}[name]
    for part in (*wanted, str(tmp_path / "raw"), "DATA_MIRROR"):
        assert part in str(caught.value)
    assert files_under(tmp_path) == []


@pytest.mark.parametrize("name, splits", [("wikitext2", ["train", "val", "test"]),
                                          ("shakespeare_char", ["train", "val"])])
def test_stand_in(tmp_path, name, splits):
    data = load(prepare(name, allow_stand_in=True, root=tmp_path))
    assert data.stand_in and list(data.splits) == splits
    assert data.folder.name == {"wikitext2": "stand_in_gpt2", "shakespeare_char": "stand_in_char"}[name]
    texts = [data.tokenizer.decode(tokens) for tokens in data.splits.values()]
    assert "".join(texts) == preparing.manual()
    assert all(text.endswith("\n") for text in texts)
    assert data.bytes == {split: len(text.encode()) for split, text in zip(splits, texts)}
    assert 0.75 < data.bytes["train"] / sum(data.bytes.values()) < 0.95
    assert prepare(name, allow_stand_in=True, root=tmp_path) == data.folder


@pytest.mark.parametrize("name", NAMES)
def test_stand_in_never_bears_the_real_name(tmp_path, name):
    folder = prepare(name, allow_stand_in=True, root=tmp_path)
    everything = ((folder / "meta.json").read_text() + folder.name).lower()
    assert "stand-in: python manual" in everything
    assert "wikitext" not in everything and "shakespeare" not in everything
    assert not (tmp_path / name).exists()


def test_stand_in_in_bytes_says_so(tmp_path):
    data = load(prepare("wikitext2", allow_stand_in=True, root=tmp_path))
    assert data.tokenizer.name == "bytes" and data.vocab_size == 256 and "bytes" in data.title


# --- Loading -----------------------------------------------------------------------------------------------

@pytest.fixture
def prepared(small_play):
    return prepare("shakespeare_char", root=small_play)


def edit(folder: Path, **changes) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        load(folder)
    message = str(caught.value)
    for part in (*parts, "prepare"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("change", [lambda b: b[:-2], lambda b: b[:-1], lambda b: b"", lambda b: b + b"\0\0"],
                         ids=["truncated", "odd", "empty", "longer"])
def test_bin_of_another_size(prepared, change):
    path = prepared / "train.bin"
    path.write_bytes(change(path.read_bytes()))
    refused(prepared, "train.bin", f"{path.stat().st_size} bytes", "delete the folder")


def test_bin_missing(prepared):
    (prepared / "val.bin").unlink()
    refused(prepared, "val.bin", "cannot be read", "delete the folder")


def test_bin_with_a_foreign_sum(prepared):
    tokens = np.fromfile(prepared / "val.bin", dtype=np.uint16)
    tokens[0], tokens[1] = tokens[1], tokens[0]
    tokens.tofile(prepared / "val.bin")
    refused(prepared, "val.bin", "SHA-256", "delete the folder")


def test_id_beyond_the_vocabulary(prepared):
    meta = json.loads((prepared / "meta.json").read_text())
    tokens = np.fromfile(prepared / "val.bin", dtype=np.uint16)
    tokens[-1] = meta["vocab_size"]
    tokens.tofile(prepared / "val.bin")
    meta["splits"]["val"]["sha256"] = hashlib.sha256(tokens.tobytes()).hexdigest()
    edit(prepared, splits=meta["splits"])
    refused(prepared, "val.bin", f"token id {meta['vocab_size']}", "delete the folder")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"{}", b"null", b"[" * 100_000],
                         ids=["empty", "cut", "binary", "list", "no fields", "null", "deep"])
def test_broken_meta(prepared, content):
    (prepared / "meta.json").write_bytes(content)
    refused(prepared, "meta.json", "delete the folder")


@pytest.mark.parametrize("changes", [
    {"format": 2}, {"format": "1"}, {"format": True}, {"dtype": "uint32"}, {"stand_in": 0},
    {"vocab_size": True}, {"vocab_size": 3}, {"splits": {}}, {"splits": {"train": [], "val": []}},
    {"tokenizer": "other"}, {"chars": None}, {"chars": ""}, {"chars": "aa"}], ids=str)
def test_meta_of_another_kind(prepared, changes):
    edit(prepared, **changes)
    refused(prepared, "delete the folder")


def test_meta_cannot_name_files_elsewhere(prepared):
    meta = json.loads((prepared / "meta.json").read_text())
    shutil.copy(prepared / "val.bin", prepared.parent / "val.bin")
    meta["splits"]["val"]["file"] = "../val.bin"
    edit(prepared, splits=meta["splits"])
    refused(prepared, "'../val.bin'", "outside")


def test_missing_folder(tmp_path):
    refused(tmp_path / "nothing", "meta.json does not exist")


def test_fingerprint_follows_the_tokens_and_the_alphabet(small_play, monkeypatch):
    first = load(prepare("shakespeare_char", root=small_play)).fingerprint
    shutil.rmtree(small_play / "shakespeare_char")
    assert load(prepare("shakespeare_char", root=small_play)).fingerprint == first
    other = CONTENT.replace(b"q", b"p")     # the same ids, another alphabet
    monkeypatch.setattr(preparing, "SHAKESPEARE", source_of(other))
    put(small_play / "raw", "some/text.txt", other)
    shutil.rmtree(small_play / "shakespeare_char")
    assert load(prepare("shakespeare_char", root=small_play)).fingerprint != first


# --- Tokenizers --------------------------------------------------------------------------------------------

def test_char_tokenizer_round_trip():
    tokenizer = CharTokenizer("\n abcé")
    assert tokenizer.encode("cab é\n") == [4, 2, 3, 1, 5, 0] and tokenizer.vocab_size == 6
    assert tokenizer.decode(np.array([4, 2, 3, 1, 5, 0], dtype=np.uint16)) == "cab é\n"


def test_char_tokenizer_names_unknown_characters():
    with pytest.raises(ValueError, match=r"'X', 'é'.*alphabet of 3 characters.*'abc'"):
        CharTokenizer("abc").encode("aXbéXc")


@pytest.mark.parametrize("text", ["", "plain", "naïve — 日本語 🙂\r\n\0"])
def test_byte_tokenizer_round_trip(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) == len(text.encode())


def test_byte_tokenizer_decodes_half_a_character():
    assert ByteTokenizer().decode([65, 0xC3]) == "A\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("tokenizer", [CharTokenizer("abc"), ByteTokenizer()], ids=["char", "bytes"])
@pytest.mark.parametrize("beyond", [-1, 1])
def test_decoding_a_foreign_id_is_an_error(tokenizer, beyond):
    foreign = -1 if beyond < 0 else tokenizer.vocab_size
    with pytest.raises(ValueError, match=f"Token id {foreign} .*{tokenizer.name}"):
        tokenizer.decode([0, foreign])


# --- The command -------------------------------------------------------------------------------------------

def run_command(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The command on a copy of the code, so that nothing is written into the project."""
    code = Path(preparing.__file__).parent
    (folder / "data").mkdir()
    for file in code.glob("*.py"):
        shutil.copy(file, folder / "data")
    inside = environment.pop("inside", "")
    return subprocess.run([sys.executable, "prepare.py" if inside else "data/prepare.py", *arguments],
                          cwd=folder / "data" if inside else folder, env={**os.environ, **environment},
                          capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("inside", ["", "yes"], ids=["from the top", "from data/"])
def test_command_without_data_exits_1_with_one_sentence(tmp_path, inside):
    result = run_command(tmp_path, "shakespeare_char", inside=inside)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: shakespeare_char cannot be prepared: put tinyshakespeare/")
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


def test_command_refuses_the_raw_variant_of_shakespeare(tmp_path):
    result = run_command(tmp_path, "shakespeare_char", "--raw")
    assert result.returncode == 1 and "no variant 'raw'" in result.stderr


# --- The real data -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def real_root(tmp_path_factory):
    return tmp_path_factory.mktemp("real")


@pytest.fixture
def mirror(monkeypatch):
    monkeypatch.setenv("DATA_MIRROR", MIRROR)


@with_real_data
def test_wikitext2_is_exact(real_root, mirror):
    data = load(prepare("wikitext2", root=real_root))
    assert {split: len(tokens) for split, tokens in data.splits.items()} == \
        {"train": 2_448_382, "val": 258_659, "test": 295_877}
    assert data.words == {"train": 2_088_628, "val": 217_646, "test": 245_569}
    assert data.bytes == {"train": 10_797_148, "val": 1_121_681, "test": 1_256_449}
    for split, source in fetching.WIKITEXT2.items():
        text = (real_root / "raw" / source.path).read_bytes()
        assert data.tokenizer.decode(data.splits[split]).encode() == text, f"{split}: not the text"


@with_real_data
def test_shakespeare_is_exact(real_root, mirror):
    data = load(prepare("shakespeare_char", root=real_root))
    assert {split: len(tokens) for split, tokens in data.splits.items()} == data.bytes
    assert data.vocab_size == 65 and data.bytes == {"train": 1_003_854, "val": 111_540}
    text = (real_root / "raw" / fetching.SHAKESPEARE.path).read_bytes()
    assert "".join(data.tokenizer.decode(tokens) for tokens in data.splits.values()).encode() == text


@with_real_data
def test_gpt2_tokenizer(real_root, mirror):
    tokenizer = GPT2Tokenizer(real_root)
    text = " = Title = \n \n <|endoftext|> naïve 日本語 🙂  \n\n\n x"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 50256 not in tokenizer.encode(text), "<|endoftext|> in a text became the special token"
    for foreign in (-1, 50257):
        with pytest.raises(ValueError, match=f"Token id {foreign} "):
            tokenizer.decode([foreign])


@with_real_data
def test_stand_in_in_bpe(tmp_path, mirror, monkeypatch):
    """A mirror with the BPE files alone: the stand-in is tokenized like the set it stands for."""
    monkeypatch.setattr(preparing, "WIKITEXT2", {"train": source_of(CONTENT)})
    data = load(prepare("wikitext2", allow_stand_in=True, root=tmp_path))
    assert data.tokenizer.name == "gpt2" and "GPT-2 BPE" in data.title
    assert "".join(data.tokenizer.decode(tokens) for tokens in data.splits.values()) == preparing.manual()


@with_real_data
def test_raw_variant_end_to_end_on_a_small_zip(tmp_path, mirror, monkeypatch):
    content = raw_zip(" \n = Title = \n")
    source = Source("raw.zip", hashlib.sha256(content).hexdigest(), len(content), ())
    monkeypatch.setattr(preparing, "WIKITEXT2_RAW", source)
    monkeypatch.setattr(preparing, "TOKENS", {})
    put(tmp_path / "raw", source.path, content)
    data = load(prepare("wikitext2", variant="raw", root=tmp_path))
    assert data.folder.name == "wikitext2_raw" and data.title == "WikiText-2 raw"
    assert data.tokenizer.decode(data.splits["test"]) == "\n\n = Title = \n"


@with_real_data
def test_command_on_real_data(tmp_path):
    mirror = MIRROR if "://" in MIRROR else str(Path(MIRROR).absolute())
    result = run_command(tmp_path, "shakespeare_char", DATA_MIRROR=mirror)
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.splitlines()[1] == ("Tiny Shakespeare, val: 111,540 tokens (char), 111,540 bytes, "
                                             "24,628 words, from DATA_MIRROR")
