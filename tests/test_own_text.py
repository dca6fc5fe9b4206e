"""A text of one's own: how it is read, split, encoded piece by piece, and gone on with after an interrupt.

python -m pytest tests/test_own_text.py
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from test_faults import CPU, gpt2_tokenizer, one_sentence
from tiktoken_ext.openai_public import r50k_pat_str

from data import own
from data.dataset import GPT2Tokenizer, load
from data.fetch import DataError
from data.prepare import count, manual
from helpers import Settings, make_model, train_model

# what decides where GPT-2's pattern cuts: letters, digits, marks, the contractions, and blanks of many kinds
LETTERS = "aé語1' \n\n\t\r\x0b\x1c\x85\xa0\u2028\u3000.'s"


@pytest.fixture(scope="module")
def merging():
    """An encoding with GPT-2's pattern that merges whatever stands within one of its matches, so that a wrong cut shows."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    used = sorted(set(LETTERS.encode()))
    for length in (2, 3):
        longer = [a + bytes([b]) for a in list(ranks) if len(a) == length - 1 and set(a) <= set(used) for b in used]
        ranks |= {pair: len(ranks) + i for i, pair in enumerate(longer)}
    return tiktoken.Encoding("merging", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})


@pytest.fixture
def small(monkeypatch):
    """Pieces of a few bytes and a saved state after each few of them."""
    monkeypatch.setattr(own, "PIECE", 64)
    monkeypatch.setattr(own, "SAVED", 256)


def put(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def play(acts=40):
    return "".join(f"Act {act}\n\nSome words é are said.\nAnd {act * act} more!\n\n\n" for act in range(acts))


def text_of(data, split):
    return data.tokenizer.decode(data.splits[split])


# -------------------------------------------------------------------------------------------------------- pieces


@examples(max_examples=400)
@given(text=st.text(alphabet=LETTERS, min_size=1, max_size=120), piece=st.integers(1, 30))
def test_pieces_encode_as_the_whole_text_does(tmp_path_factory, merging, text, piece):
    source = put(tmp_path_factory.getbasetemp() / "pieces", one=text)
    parts = own.find_parts(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "PIECE", piece)
        pieces = list(own.pieces(parts, 0, parts[-1].end))
    assert "".join(text for text, _ in pieces) == text
    ends = np.cumsum([len(text.encode()) for text, _ in pieces]).tolist()
    assert [end for _, end in pieces] == ends
    ids = [token for text, _ in pieces for token in merging.encode_ordinary(text)]
    assert ids == merging.encode_ordinary(text), [text for text, _ in pieces]
    assert sum(len(text.split()) for text, _ in pieces) == len(text.split())


def test_long_texts_really_come_in_pieces(tmp_path, small):
    parts = own.find_parts(put(tmp_path, one=play()))
    lengths = [len(text) for text, _ in own.pieces(parts, 0, parts[-1].end)]
    assert len(lengths) > 20 and max(lengths) < 150, lengths


def test_gpt2_s_own_tokens(tmp_path, merging, small, monkeypatch):
    monkeypatch.setattr(GPT2Tokenizer, "encoding", merging)  # of fewer ids than GPT-2's, and the same pattern
    source = put(tmp_path / "text", one=play())
    data = load(own.prepare_text(source, "play", root=tmp_path))
    for split in ("train", "val"):
        text = merging.decode(data.splits[split].tolist())
        assert data.splits[split].tolist() == merging.encode_ordinary(text)
    assert merging.decode([*data.splits["train"].tolist(), *data.splits["val"].tolist()]) == play()


# ------------------------------------------------------------------------------------------- splits and counts


@examples(max_examples=100)
@given(st.lists(st.text(alphabet="ab é語\n", max_size=30), min_size=4, max_size=30), st.integers(1, 40))
def test_a_set_holds_the_text_and_its_counts(tmp_path_factory, paragraphs, piece):
    text = "some words\n\n" + "\n\n".join(paragraphs) + "\n\nand an end"
    root = tmp_path_factory.mktemp("own")
    source = put(root / "source", one=text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "PIECE", piece)
        data = load(own.prepare_text(source / "one.txt", tokenizer="char", root=root))
    splits = {split: text_of(data, split) for split in data.splits}
    assert list(splits) == ["train", "val"] and "".join(splits.values()) == text
    for split, part in splits.items():
        wanted = count(part)
        assert data.bytes[split] == len(part.encode())
        assert data.words[split] == wanted.words and data.meta["splits"][split]["lines"] == wanted.lines
    assert (data.name, data.title) == ("one_char", "one_char")


def test_no_paragraph_is_on_both_sides(tmp_path):
    for acts in (12, 40, 333):
        source = put(tmp_path / f"play{acts}", one=play(acts))
        data = load(own.prepare_text(source, tokenizer="char", root=tmp_path))
        train, val = (text_of(data, split) for split in data.splits)
        assert train.endswith("\n\n") and val[0] not in "\n", (train[-20:], val[:20])
        assert 0.85 < len(train) / len(play(acts)) < 0.95


@pytest.mark.parametrize("text, ending", [("word " * 50 + "\n" + "word " * 5, "\n"), ("語" * 200, "語"), ("word" * 100, "d")])
def test_a_text_without_blank_lines_is_cut_at_a_line_or_a_character(tmp_path, text, ending):
    data = load(own.prepare_text(put(tmp_path / "text", one=text), tokenizer="char", root=tmp_path))
    assert text_of(data, "train") + text_of(data, "val") == text
    assert text_of(data, "train").endswith(ending)
    assert 0.85 < len(text_of(data, "train")) / len(text) < 0.95


def test_files_follow_by_path_with_a_line_end_between(tmp_path, small):
    source = put(tmp_path / "texts", b="second\n", c="third", a="first, open", e="")
    put(source / "below", d="last, open")
    put(source / ".hidden", x=b"\xff")
    put(source, **{".hidden": b"\xff"})
    whole = "first, open\nsecond\nlast, open\nthird"
    assert [p.path.name for p in own.find_parts(source)] == ["a.txt", "b.txt", "d.txt", "c.txt"]
    for given_as in (source, str(source / "**" / "*.txt")):
        parts = own.find_parts(given_as)
        assert b"".join(own.read(parts, 0, parts[-1].end)).decode() == whole
    everything = whole.encode()
    parts = own.find_parts(source)
    for start in range(len(everything)):
        for stop in range(start, len(everything) + 1):
            assert b"".join(own.read(parts, start, stop)) == everything[start:stop], (start, stop)


# --------------------------------------------------------------------------------------------------- what is wrong


def refused(*named, **options):
    with pytest.raises(DataError) as error:
        own.prepare_text(**options)
    one_sentence(error, *named)


@pytest.mark.parametrize("where, byte", [("a", 0), ("a", 63), ("b", 66), ("b", 700)])
def test_bad_utf8_names_the_file_and_the_byte(tmp_path, small, where, byte):
    files = {name: bytearray(play().encode()) for name in "ab"}
    files[where][byte] = 0xFF
    source = put(tmp_path / "texts", **{name: bytes(content) for name, content in files.items()})
    refused(source / f"{where}.txt", f"byte {byte} is 0xff", "UTF-8", source=source, root=tmp_path)
    assert not (tmp_path / "texts" / "meta.json").exists()


def test_a_character_that_is_cut_off(tmp_path, small):
    for name, content in (("z", "good é".encode()[:-1]), ("a", "語".encode()[:1])):
        source = put(tmp_path / name, m="words\n", **{name: content})
        refused(source / f"{name}.txt", f"byte {max(0, len(content) - 1)} is", source=source, root=tmp_path)


@pytest.mark.parametrize("content", ["", "a", "ab"])
def test_too_little_text(tmp_path, content):
    source = put(tmp_path / "texts", one=content)
    refused("short" if content else "empty", "give a text", source=source, tokenizer="char", root=tmp_path)
    assert not (tmp_path / "texts_char" / "meta.json").exists()


def test_too_short_for_the_block_is_said_at_training(tmp_path):
    data = load(own.prepare_text(put(tmp_path / "texts", one="a few words\n\nmore\n"), tokenizer="char", root=tmp_path))
    settings = Settings(batch_size=2, block_size=64, n_layer=1, n_head=1, n_embd=8)
    with pytest.raises(ValueError, match="longer text or a smaller block_size"):
        train_model(make_model(settings, data), data, settings, tmp_path / "out", precision=CPU)


def test_nothing_there(tmp_path):
    refused("matches no file", source=tmp_path / "missing.txt", root=tmp_path)
    refused("matches no file", source=str(tmp_path / "*.md"), root=tmp_path)


def test_what_is_no_text_does_not_fill_the_memory(tmp_path, small, monkeypatch):
    monkeypatch.setattr(own, "LONGEST", 500)
    source = put(tmp_path / "texts", one="words\n\n" + "x" * 2000 + "\n\nwords")
    refused("without a blank", source=source, tokenizer="char", root=tmp_path)


def test_more_characters_than_ids(tmp_path):
    source = put(tmp_path / "texts", one="".join(map(chr, (*range(32, 0xD800), *range(0xE000, 0x14000)))))
    refused("different characters", "GPT-2 BPE", source=source, tokenizer="char", root=tmp_path)


@pytest.mark.parametrize("name", ["wikitext2", "stand_in_char", "../elsewhere", "", "gpt2_cache", "a/b"])
def test_names_that_are_taken_or_no_folder_s(tmp_path, name):
    with pytest.raises(ValueError, match="another name"):
        own.prepare_text(put(tmp_path / "texts", one=play()), name, "char", tmp_path)
    with pytest.raises(ValueError, match="gpt2 or char"):
        own.prepare_text(put(tmp_path / "texts", one=play()), None, "words", tmp_path)


def test_a_set_of_another_kind_is_not_replaced(tmp_path):
    folder = own.prepare_text(put(tmp_path / "texts", one=play()), "mine", "char", tmp_path)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"variant": "v1"}))
    refused("another kind", source=tmp_path / "texts", name="mine", tokenizer="char", root=tmp_path)


# -------------------------------------------------------------------------------------- interrupts, and once more


@pytest.fixture
def counted(monkeypatch):
    """Counts the characters that are encoded; `stop_at` interrupts at that many."""
    state = {"encoded": 0, "stop_at": None}
    real = own.encoder

    def encoder(tokenizer):
        encode = real(tokenizer)

        def counting(text):
            state["encoded"] += len(text)
            if state["stop_at"] is not None and state["encoded"] >= state["stop_at"]:
                raise KeyboardInterrupt
            return encode(text)

        return counting

    monkeypatch.setattr(own, "encoder", encoder)
    return state


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def interrupted(source, root, counted, at):
    counted |= {"encoded": 0, "stop_at": at}
    with pytest.raises(KeyboardInterrupt):
        own.prepare_text(source, "mine", "char", root)
    counted |= {"encoded": 0, "stop_at": None}
    with pytest.raises(DataError, match="no data is prepared"):
        load(root / "mine")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.85, 0.95])
def test_an_interrupted_preparation_goes_on_to_the_same_files(tmp_path, small, counted, share):
    text = play(200)
    source = put(tmp_path / "texts", one=text[::-1])
    own.prepare_text(source, "mine", "char", tmp_path)  # an older text, whose set may not be taken for the new one's
    put(source, one=text)
    whole = contents(own.prepare_text(source, "mine", "char", tmp_path / "whole"))
    interrupted(source, tmp_path, counted, share * len(text))
    folder = own.prepare_text(source, "mine", "char", tmp_path)
    assert contents(folder) == whole
    most = (1 - share) * len(text) + 256 + 8 * 150  # a saved state's distance, and the pieces that threads had ahead
    assert counted["encoded"] <= most, f"{counted['encoded']} characters encoded anew, of {len(text)}"


@pytest.mark.parametrize("change", ["the source", "the tokens", "their number", "the state", "the state's file"])
def test_what_does_not_fit_is_not_gone_on_from(tmp_path, small, counted, change):
    source = put(tmp_path / "texts", one=play(200))
    interrupted(source, tmp_path, counted, 5000)
    written = tmp_path / "mine" / "train.bin"
    state = tmp_path / "mine" / "progress.json"
    if change == "the source":
        put(source, one=play(200).replace("Act 0", "Alt 0"))
    elif change == "the tokens":
        written.write_bytes(b"\1\0" + written.read_bytes()[2:])
    elif change == "their number":
        written.write_bytes(written.read_bytes()[:100])
    elif change == "the state":
        state.write_text(state.read_text().replace('"cut"', '"other"'))
    else:
        state.write_text(state.read_text()[:-40])
    folder = own.prepare_text(source, "mine", "char", tmp_path)
    whole = own.prepare_text(source, "mine", "char", tmp_path / "whole")
    assert contents(folder) == contents(whole)


def test_the_same_text_is_used_as_it_is_and_another_made_anew(tmp_path, monkeypatch):
    source = put(tmp_path / "texts", one=play())
    folder = own.prepare_text(source, tokenizer="char", root=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(own, "encode_splits", lambda *args: pytest.fail("encoded again"))
        assert own.prepare_text(source, tokenizer="char", root=tmp_path) == folder
    mapped = load(folder)
    before = mapped.splits["train"].copy()
    other = play(60)[::-1]
    put(source, one=other)
    again = load(own.prepare_text(source, tokenizer="char", root=tmp_path))
    assert text_of(again, "train") + text_of(again, "val") == other
    assert again.fingerprint != mapped.fingerprint
    assert np.array_equal(mapped.splits["train"], before), "the tokens of an open set changed under its reader"


def test_a_damaged_set_is_made_again(tmp_path):
    source = put(tmp_path / "texts", one=play())
    folder = own.prepare_text(source, tokenizer="char", root=tmp_path)
    whole = contents(folder)
    (folder / "val.bin").write_bytes(b"")
    own.prepare_text(source, tokenizer="char", root=tmp_path)
    assert contents(folder) == whole


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(own.os, "fsync", full)
    refused("No space left", "go on", source=put(tmp_path / "texts", one=play()), tokenizer="char", root=tmp_path)


# ------------------------------------------------------------------------------------------------------ as a whole


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(own, "PIECE", 1 << 12)
    peaks = []
    for acts in (2_000, 20_000):
        source = put(tmp_path / f"play{acts}", one=play(acts))
        tracemalloc.start()
        own.prepare_text(source, tokenizer="char", root=tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    size = (source / "one.txt").stat().st_size
    assert peaks[1] - peaks[0] < size / 4, f"{peaks} bytes for texts of {size // 10} and {size}"


def test_a_text_of_one_s_own_is_trained_on(tmp_path):
    data = load(own.prepare_text(put(tmp_path / "texts", one=play(200)), tokenizer="char", root=tmp_path))
    settings = Settings(batch_size=4, block_size=16, n_layer=1, n_head=2, n_embd=16, learning_rate=1e-2, min_lr=1e-3,
                        dropout=0.0, max_iters=60, warmup_iters=3, eval_interval=60, eval_iters=4)  # fmt: skip
    history = train_model(make_model(settings, data), data, settings, tmp_path / "out", precision=CPU)
    assert history["val_loss"][-1] < 0.8 * history["val_loss"][0]


NUMBERED = "".join(f"\n\nParagraph {number} says a few words of its own." for number in range(100))


@pytest.mark.parametrize("text", [NUMBERED, "Ein Wort\tnach dem anderen, ohne Leerzeile " * 30, "x" * 500])
def test_prompts_are_openings_of_the_text(tmp_path, text):
    data = load(own.prepare_text(put(tmp_path / "texts", one=text), tokenizer="char", root=tmp_path))
    prompts = own.openings(data)
    assert len(prompts) == 3 and all(prompt and prompt in text_of(data, "val") for prompt in prompts), prompts
    assert all(data.tokenizer.encode(prompt) for prompt in prompts)
    assert text != NUMBERED or [prompt.split()[0] for prompt in prompts] == 3 * ["Paragraph"] and len(set(prompts)) == 3, prompts


def test_the_command(tmp_path):
    code = Path(own.__file__).parent
    (tmp_path / "data").mkdir()
    for file in code.glob("*.py"):
        shutil.copy(file, tmp_path / "data")
    put(tmp_path, notes=play(), bad=b"\xe9t\xe9")

    def command(*arguments):
        return subprocess.run([sys.executable, "data/own.py", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60)

    result = command("notes.txt", "--char")
    assert result.returncode == 0 and "notes_char, train: " in result.stdout and not result.stderr, result
    digest = hashlib.sha256(play().encode()).hexdigest()
    assert load(tmp_path / "data" / "notes_char").meta["source_sha256"] == {"text": digest}
    assert str(tmp_path) not in (tmp_path / "data" / "notes_char" / "meta.json").read_text()
    result = command("bad.txt", "--name", "other")
    assert result.returncode == 1 and result.stderr.startswith("error: bad.txt is not UTF-8") and result.stderr.count("\n") == 1


def test_gpt2_tokens_of_a_real_text(tmp_path, monkeypatch):
    tokenizer = gpt2_tokenizer()
    if tokenizer is None:
        pytest.skip("needs GPT-2's two files: DATA_MIRROR is not set, and data/gpt2_cache is not there")
    monkeypatch.setattr(GPT2Tokenizer, "encoding", tokenizer.encoding)
    monkeypatch.setattr(own, "PIECE", 1 << 12)
    text = manual()[:200_000] + "<|endoftext|> é\u3000語  \n\n\t don't"
    data = load(own.prepare_text(put(tmp_path / "texts", one=text) / "one.txt", root=tmp_path))
    cut = data.bytes["train"]
    assert data.splits["train"].tolist() == tokenizer.encode(text.encode()[:cut].decode())
    assert data.splits["val"].tolist() == tokenizer.encode(text.encode()[cut:].decode())


def test_without_gpt2_s_files_the_refusal_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGPT_OFFLINE", "1")
    monkeypatch.delenv("DATA_MIRROR", raising=False)
    refused("gpt2/vocab.bpe", "DATA_MIRROR", "char", source=put(tmp_path / "texts", one=play()), root=tmp_path)
