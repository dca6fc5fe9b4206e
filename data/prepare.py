"""Make the data sets: text in, .bin files of uint16 token ids and a meta.json out.

    python data/prepare.py wikitext2    or wikitext2_words, shakespeare_char, all: see README.md
    python data/prepare.py notes.txt    your own text in GPT-2 BPE, to data/notes
    python data/prepare.py "letters/*.md" --char --name letters

A text streams through memory a piece at a time, so that its size does not matter.
"""

import argparse
import contextlib
import glob
import hashlib
import json
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby, islice, pairwise
from pathlib import Path
from pydoc_data.topics import topics

from filelock import FileLock
from tqdm import tqdm

if __name__ == "__main__":  # run as a script, sys.path starts at this folder, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.dataset import UNK, CharTokenizer, GPT2Tokenizer, WordTokenizer, load, read_meta, sealed
from data.fetch import SHAKESPEARE, WIKITEXT2, DataError, Unavailable, atomic_write, fetch, reason

ROOT = Path(__file__).resolve().parent
PIECE = 1 << 18  # characters read, and about as many encoded, at a time
LONGEST = 1 << 25  # characters without a blank that GPT-2's encoding can hold in memory
OURS = re.compile(r"(train|val|test)-[0-9a-f]{8}\.bin|\..+\.[0-9a-f]{32}\.tmp")  # file names here
LAST_VISIBLE = re.compile(r"(?s).*\S(?=[ \n])")  # up to the last place where `_pieces` may cut

# Another count than these means another text or tokenizer than the published figures have.
TOKENS = {
    "wikitext2": {"train": 2_448_382, "val": 258_659, "test": 295_877},
    "wikitext2_words": {"train": 2_088_628, "val": 217_646, "test": 245_569},
    "shakespeare_char": {"train": 1_003_854, "val": 111_540},
}
NAMES = tuple(TOKENS)
STAND_INS = dict(zip(NAMES, ("stand_in_gpt2", "stand_in_words", "stand_in_char"), strict=True))
TAKEN = (*NAMES, "shakespeare", *STAND_INS.values(), "raw", "gpt2_cache", "all")


def prepare(name, *, allow_stand_in=False, root=ROOT):
    """The Dataset of this name, one of NAMES, made under `root` if it is not there.

    A damaged set is made again. Where the real bytes cannot be had, `allow_stand_in` gives the
    Python manual instead, and the set says so; without it, or for a mirror with wrong bytes,
    DataError.
    """
    if name not in NAMES:
        raise ValueError(f"There is no data set {name!r}: choose one of {', '.join(NAMES)}.")
    root, folder = Path(root), Path(root) / name
    parts = _shakespeare if name == "shakespeare_char" else _wikitext2
    try:
        return _intact(folder) or _open_or_make(folder, *parts(name, root))
    except Unavailable as error:
        with _readable(folder), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(folder / "meta.json")  # exists() says no where it may not look
            raise DataError(f"{folder} is damaged and cannot be made again: {error}") from error
        if not allow_stand_in:
            raise
    return _stand_in(name, root)


def prepare_alike(names, *, allow_stand_in=False, root=ROOT):
    """The Datasets of these names: all real, or all the stand-in, so that they are of one text."""
    found = [prepare(name, allow_stand_in=allow_stand_in, root=root) for name in names]
    alike = len({data.stand_in for data in found}) == 1
    return found if alike else [_stand_in(name, Path(root)) for name in names]


def prepare_text(source, name=None, tokenizer="gpt2", root=ROOT):
    """A Dataset of your own text under `root`, or the one that is there of the same text.

    `source` is a UTF-8 file, a folder (all files in it and below, hidden ones left out) or a glob
    pattern; files follow one another by path, each once and all but the last ended by a line end.
    `tokenizer` is "gpt2" or "char". The set is called `name`, and replaces another own text's of
    this name; without one it is called after the source, and replaces only a text from the same
    place. DataError says why a text cannot be used, ValueError why a name or tokenizer cannot.
    """
    if tokenizer not in ("gpt2", "char"):
        raise ValueError(f"There is no tokenizer {tokenizer!r} for a text: choose gpt2 or char.")
    root, path = Path(root), Path(os.path.abspath(source))  # "." has no name of its own
    folder, files = root / _set_name(path, name, tokenizer), _find_files(source)
    if any(folder.resolve() in file.resolve().parents for file in files):
        raise DataError(f"{folder} holds the text itself: choose another name for its set.")
    digest, chars, length = hashlib.sha256(), set(), 0
    for text in _read("reading", files, digest):
        chars.update(text)
        length += len(text)
    if not length:
        raise DataError(f"{source} is empty: give a text of some thousand characters or more.")
    texts = _read("encoding", files, hashlib.sha256(), wanted=digest.hexdigest())
    texts = _split_at(length * 9 // 10, min(length // 20, LONGEST), texts)
    made = _alphabet(chars) if tokenizer == "char" else GPT2Tokenizer(root)
    facts = {"title": folder.name, "variant": "own", "licence": "not stated"}
    facts |= {"source": path.name, "source_sha256": {"text": digest.hexdigest()}}
    facts["place"] = hashlib.sha256(os.fsencode(os.path.realpath(source))).hexdigest()[:16]
    facts["split_rule"] = "90% train; cut at the next blank line, else line end, in 5%, else there"
    return _open_or_make(folder, texts, made, facts, None if name else facts["place"])


def _check_folder(folder, wanted=(), place=None):
    """DataError if a folder holds another's files, or a text neither `wanted` nor of `place`."""
    path, meta = folder / "meta.json", {}
    ours = all(OURS.fullmatch(file.name) for file in folder.glob("[!.]*"))
    if os.path.exists(path) and path.read_bytes().startswith(b'{\n "format"'):  # as written here
        ours, meta = True, {"place": "unknown where it is damaged"}
    with contextlib.suppress(DataError):
        meta = read_meta(folder)
        ours = meta["name"] == folder.name
    if not ours:
        text = f"{folder} holds files that are not the set {folder.name}'s"
        raise DataError(f"{text}: move them away, or choose another name for your text.")
    own = dict(wanted, place=place, source_sha256=meta.get("source_sha256"))
    if place and meta and meta not in (meta | own, meta | wanted):
        text = f"{folder} is of another place or tokenizer: give your text a name of its own"
        raise DataError(f"{text} (--name, in Python name=), or {folder.name!r} to replace that.")


def _open_or_make(folder, texts, tokenizer, facts, place=None):
    """The set in `folder` if it is the same; else it is made, by one process at a time."""
    wanted = {"source_sha256": facts["source_sha256"], "tokenizer": tokenizer.name}
    if data := _intact(folder, wanted):
        return data
    try:
        _check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if not _intact(folder, wanted):  # another process may have made it meanwhile
                _check_folder(folder, wanted, place)
                write_set(folder, texts, tokenizer, facts)
            return load(folder)  # before another process replaces it by another text
    except OSError as error:
        raise DataError(f"{folder} cannot be used ({reason(error)}): make it writable.") from error


def _intact(folder, wanted=()):
    """The set in `folder` if it is whole, of that name and has the `wanted` facts; else None."""
    with contextlib.suppress(DataError):
        data = load(folder)
        return data if data.meta == data.meta | dict(wanted, name=folder.name) else None


# ----- the sets: texts by split, a tokenizer, and the facts for meta.json -----
def _wikitext2(name, root):
    """WikiText-2 v1: each file's exact text in GPT-2 BPE or by word, blank lines included."""
    texts, facts = _fetch_texts(WIKITEXT2.values(), root)
    by_word = name == "wikitext2_words"
    facts |= {"title": "WikiText-2 by word" if by_word else "WikiText-2", "variant": "v1"}
    facts["licence"] = "CC BY-SA 3.0 and GFDL (Wikipedia contributors; Merity et al. 2016)"
    facts["split_rule"] = "the files' own train, validation and test parts"
    tokenizer = _vocabulary(texts[0]) if by_word else GPT2Tokenizer(root)
    return zip(WIKITEXT2, texts, strict=True), tokenizer, facts


def _shakespeare(name, root):
    """Tiny Shakespeare by character: the first 90% of the characters train, the rest validates."""
    (text,), facts = _fetch_texts([SHAKESPEARE], root)
    cut = len(text) * 9 // 10
    facts |= {"title": "Tiny Shakespeare", "variant": "char", "licence": "public domain"}
    facts["split_rule"] = "contiguous: the first 90% of the characters train, the rest validates"
    return [("train", text[:cut]), ("val", text[cut:])], _alphabet(text), facts


def _fetch_texts(sources, root):
    found = [fetch(source, root / "raw") for source in sources]
    facts = {"source": ", ".join(sorted({origin for _, origin in found}))}
    facts["source_sha256"] = {source.path: source.sha256 for source in sources}
    return [path.read_bytes().decode() for path, _ in found], facts


def _stand_in(name, root):
    """The Python manual in place of a set: never under that set's folder, name or title."""
    text = "\n\n".join(topics[key].strip("\n") for key in sorted(topics)) + "\n"
    ends = {"train": 80, "val": 90, "test": 100}  # percent of the text
    if name == "shakespeare_char":
        ends = {"train": 90, "val": 100}
    cuts = [text.index("\n", len(text) * end // 100 - 1) + 1 for end in ends.values()]
    texts, tokenizer = [text[a:b] for a, b in pairwise([0, *cuts])], _alphabet(text)
    if name != "shakespeare_char":  # rare words become UNK in the text, as in WikiText-2 itself
        known = _vocabulary(texts[0]).ids
        texts = [re.sub(r"\S+", lambda m: m[0] if m[0] in known else UNK, t) for t in texts]
    if name == "wikitext2_words":
        tokenizer = _vocabulary(texts[0])
    if name == "wikitext2":
        with contextlib.suppress(Unavailable):  # without its files, by character as well
            (gpt2 := GPT2Tokenizer(root)).encode("")  # seeks them
            tokenizer = gpt2
    title = f"stand-in: Python manual (pydoc topics), by {tokenizer.unit}"
    facts = {"title": title, "variant": "stand-in", "stand_in": True}
    facts |= {"licence": "Python Software Foundation License", "source": "pydoc_data.topics"}
    facts["source_sha256"] = {"text": hashlib.sha256("".join(texts).encode()).hexdigest()}
    facts["split_rule"] = f"contiguous, to the line end after these % of the characters: {ends}"
    texts = zip(ends, texts, strict=True)
    return _open_or_make(root / STAND_INS[name], texts, tokenizer, facts)


# ----- texts -----
def _alphabet(text):
    """All characters of the text, validation included, in code point order as in nanoGPT."""
    if len(set(text)) > 1 << 16:
        raise DataError("The text has more than 65,536 different characters: use GPT-2 BPE.")
    return CharTokenizer("".join(sorted(set(text))))


def _vocabulary(text):
    """UNK and a text's words that occur three times or more: by frequency, then in its order."""
    counts = Counter(WordTokenizer.split(text))
    words = [word for word, count in counts.most_common() if count >= 3]
    return WordTokenizer(words if UNK in words else [*words, UNK])


def _split_at(cut, reach, texts):
    """Yield ("train", text) for the first `cut` characters, then ("val", text).

    A blank line's or else a line's end in the next `reach` characters moves the cut there.
    """
    texts, near = iter(texts), ""
    for text in texts:
        yield "train", text[:cut]
        if near := text[cut:]:
            break
        cut -= len(text)
    while len(near) < reach and (text := next(texts, "")):
        near += text
    blank = re.compile(r"\n(?:[ \t\r]*\n)+").search(near, 0, reach)
    cut = blank.end() if blank else near.find("\n", 0, reach) + 1
    for split, start, end in (("train", 0, cut), ("val", cut, len(near))):
        for i in range(start, end, PIECE):
            yield split, near[i : min(i + PIECE, end)]
    yield from (("val", text) for text in texts)


# ----- your own text -----
def _set_name(path, name, tokenizer):
    """The set's name: as given, or made from its path. ValueError for one that cannot be."""
    if name is None:
        stem = path.name if os.path.isdir(path) else path.stem
        name = re.sub(r"[^\w-]+", "_", stem).strip("_") or "own"
        name += "_char" * (tokenizer == "char")
    if not re.fullmatch(r"\w[\w.-]{,59}", name) or name.lower() in TAKEN:
        text = f"A set cannot be called {name!r}: give a name (--name, in Python name=) of at most"
        raise ValueError(f"{text} 60 letters, digits, - and _, but none of {', '.join(TAKEN)}.")
    return name


@contextlib.contextmanager
def _readable(what):
    try:
        yield
    except OSError as error:
        text = f"{what} cannot be read ({reason(error)}): check the path and its permissions."
        raise DataError(text) from error


def _find_files(source):
    """The files that a path, a folder or a pattern means, by path, each once, and their sizes."""
    path = Path(source) / ("*" if Path(source).name == "**" else "")  # which means the same files
    with _readable(source):
        for parent in filter(glob.has_magic, map(str, path.parents)):
            for folder in map(os.path.realpath, glob.iglob(parent, recursive=True)):
                with _readable(folder):  # glob leaves out without a word what cannot be read
                    os.path.isfile(folder) or os.listdir(f"{folder}/.")
        glob.has_magic(str(path)) or os.stat(path)  # is_file() says no where it may not look
        found = [path] if path.is_file() else map(Path, glob.glob(str(source), recursive=True))
        if str(source) and path.is_dir():  # Path("") is the current folder
            found = list(_walk(path, set()))
    files = {}
    for file in sorted(found, key=Path.as_posix):
        with _readable(file):
            facts = os.stat(os.path.realpath(file))  # fails for a link that leads nowhere
            place = (facts.st_dev, facts.st_ino) if facts.st_ino else os.path.realpath(file)
            if file.is_file():  # the first path counts, however many links lead to it
                files.setdefault(place, (file, facts.st_size))
    if not files:
        raise DataError(f"{str(source)!r} matches no file: give a file, a folder or a pattern.")
    return dict(files.values())


def _walk(folder, seen):
    """The files in a folder and below, hidden ones left out; a folder that is `seen` is not."""
    if folder.resolve() in seen:  # a link leads back to it
        return
    seen.add(folder.resolve())
    for path in sorted(folder.iterdir()):
        if not path.name.startswith("."):
            yield from _walk(path, seen) if path.is_dir() else [path]


def _parts(path):
    """Yield the text of a file, at most PIECE characters at a time."""
    with _readable(path), open(path, encoding="utf-8-sig", newline="") as file:
        try:
            while part := file.read(PIECE):
                if "\0" in part:
                    raise UnicodeError("a zero byte, as in UTF-16,")
                yield part
        except UnicodeError as error:
            what = getattr(error, "reason", error)
            text = f"{path} is not UTF-8 text ({what} before byte {file.buffer.tell():,})"
            raise DataError(f"{text}: convert it to UTF-8, or leave it out.") from None


def _read(what, files, digest, wanted=None):
    """Yield all files' text in order, each but the last ended by a line end; check its sum."""
    total, text = sum(files.values()), "\n"  # a bar in a terminal, silence in logs and notebooks
    with tqdm(desc=what, total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for path in files:
            before = [] if text[-1] == "\n" else ["\n"]
            for text in chain(before, _parts(path)):
                content = text.encode()
                digest.update(content)
                bar.update(len(content))
                yield text
    if wanted and digest.hexdigest() != wanted:
        raise DataError("The text changed while it was read: prepare it again once it stays.")


def openings(data, count=3):
    """A few words from `count` places of the validation split: prompts that fit the text."""
    text = data.tokenizer.decode(data.splits["val"][: PIECE // 4])
    near = (text[len(text) * i // count :][:100] for i in range(count))
    found = ((re.search(r"\s(\S+(?:\s\S+){0,5})", part), part) for part in near)
    return tuple(match[1] if match else part[:20] for match, part in found)


# ----- tokens -----
def write_set(folder, texts, tokenizer, facts):
    """Write one .bin a split and meta.json, which makes them the set: until then the old one is.

    `texts` are (split, text) pairs, a split's own in a row; `facts` are meta.json's other fields.
    """
    digits = hashlib.sha256(f"{facts['source_sha256']} {tokenizer.name}".encode()).hexdigest()[:8]
    entries = dict.fromkeys(["train", "val"], {"tokens": 0, "words": 0, "lines": 0})  # at least
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(atomic_write(folder / "meta.json"))  # gets its name last
        for split, group in groupby(texts, key=lambda pair: pair[0]):
            name = f"{split}-{digits}.bin"
            file, parts = stack.enter_context(atomic_write(folder / name)), (t for _, t in group)
            entries[split] = {"file": name} | _write_split(file, parts, tokenizer)
        _check_sizes(folder.name, entries)
        meta = {"name": folder.name, "stand_in": False, **facts}
        meta |= {"dtype": "uint16", "tokenizer": tokenizer.name, "splits": entries}
        meta |= {"vocab_size": tokenizer.vocab_size, **tokenizer.vocabulary}
        out.write(json.dumps(sealed(meta), indent=1).encode())
    for path in folder.iterdir():  # what the old set and killed processes leave
        if OURS.fullmatch(path.name) and not path.name.endswith(f"-{digits}.bin"):
            with contextlib.suppress(OSError):  # Windows keeps what a notebook reads
                path.unlink()


def _check_sizes(name, entries):
    for split, entry in entries.items():
        tokens, words = entry["tokens"], entry["words"] - entry["lines"]
        known = TOKENS.get(name, {}).get(split, tokens)
        if tokens != known:
            text = f"{name} {split} came to {tokens} tokens where {known} are right: install the"
            raise DataError(f"{text} tiktoken of requirements.txt and prepare again.")
        if tokens < 2 or words < 1:
            text = f"The text is too short: its split {split} has {tokens} tokens and {words} words"
            raise DataError(f"{text}; give some thousand characters or more.")


def _write_split(out, texts, tokenizer):
    """Encode and write one split; return its entry in meta.json. Each line's end is a word too."""
    digest, tokens, size, words, line_ends, before = hashlib.sha256(), 0, 0, 0, 0, "\n"
    for text, ids in _encoded(texts, tokenizer):
        out.write(ids)
        digest.update(ids)
        tokens, size = tokens + len(ids), size + len(text.encode())
        goes_on = not before.isspace() and not text[0].isspace()  # a word cut in two counts once
        words += len(text.split()) - goes_on
        line_ends += text.count("\n")
        before = text[-1]
    lines = line_ends + (before != "\n")
    counts = {"tokens": tokens, "bytes": size, "words": words + lines, "lines": lines}
    return counts | {"sha256": digest.hexdigest()}


def _encoded(texts, tokenizer):
    """Yield (text, ids) in order, encoded by all cores: tiktoken lets go of Python's lock."""
    texts = _pieces(texts) if isinstance(tokenizer, GPT2Tokenizer) else (t for t in texts if t)
    threads = min(8, os.cpu_count() or 1)  # so that the memory does not grow with the cores
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(islice(texts, 2 * threads)):
            yield from zip(batch, pool.map(tokenizer.encode_array, batch), strict=True)


def _pieces(texts):
    """The same text in pieces that encode as the whole does.

    They are cut before a blank after a visible character. In GPT-2's pattern no token goes on from
    one to the other, matches from there on depend only on what comes after, and those before look
    no further ahead than the blank.
    """
    rest = ""
    for text in texts:
        rest += text
        if visible := LAST_VISIBLE.match(rest):
            yield rest[: visible.end()]
            rest = rest[visible.end() :]
        if len(rest) > LONGEST:
            text = f"The text has {len(rest):,} characters without a blank, too many for GPT-2 BPE"
            raise DataError(f"{text}: leave out what is no text, or prepare it by character.")
    if rest:
        yield rest


# ----- the command -----
def main(arguments=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Prepare data sets (see data/README.md).")
    named = f"{', '.join(NAMES)}, all, or your text: a file, a folder or a pattern"
    parser.add_argument("source", help=named)
    parser.add_argument("--name", help="of the set made of your text (default: the source's)")
    parser.add_argument("--char", action="store_true", help="your text by character, not GPT-2 BPE")
    options = parser.parse_args(arguments)
    names = NAMES if options.source == "all" else [options.source]
    if names[0] in NAMES and (options.name or options.char):
        parser.error("--name and --char are for your own text.")
    tokenizer = "char" if options.char else "gpt2"
    try:
        for name in names:
            data = prepare(name) if name in NAMES else prepare_text(name, options.name, tokenizer)
            for split, tokens in data.splits.items():
                sizes = f"{len(tokens):,} tokens ({data.tokenizer.name}), "
                sizes += f"{data.bytes[split]:,} bytes, {data.words[split]:,} words with line ends"
                try:
                    print(f"{data.title}, {split}: {sizes}, from {data.meta['source']}", flush=True)
                except BrokenPipeError:  # of `| head`: the next sets are made all the same
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: run the command again.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
