"""Make a data set of a text of your own: UTF-8 files in, the same .bin files and meta.json as prepare.py's out.

    python data/own.py notes.txt                          GPT-2 BPE, to data/notes
    python data/own.py "letters/*.md" --name letters      all files of a pattern, or of a folder, as one text
    python data/own.py notes.txt --char                   by character, to data/notes_char

The text streams through memory a piece at a time. An interrupted preparation goes on where it last saved.
"""

import argparse
import codecs
import glob
import hashlib
import json
import os
import re
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

if __name__ == "__main__":      # run as a script, sys.path starts at this folder instead of the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.dataset import DTYPE, FORMAT, CharTokenizer, Dataset, GPT2Tokenizer, Tokenizer, load
from data.fetch import GPT2_FILES, DataError, Unavailable, reason
from data.prepare import NAMES, ROOT, exit_status, find_damage, refusal, write_json

PIECE = 1 << 20                 # bytes read at a time, and about what is encoded at a time
SAVED = 1 << 26                 # bytes of text between two states from which an interrupted preparation goes on
LONGEST = 1 << 25               # characters without a blank: more are no text, and would fill the memory
LAST_VISIBLE = re.compile(r"(?s).*\S(?=[ \n])")     # up to the last place where `pieces` may cut
TAKEN = (*NAMES, "wikitext2_raw", "stand_in_gpt2", "stand_in_char", "raw", "gpt2_cache")
SPLIT_RULE = ("contiguous: the first 90% of the bytes train, the rest validates; cut at the blank line nearest to "
              "that place, else at a line end, else at a character")


def prepare_text(source: Path | str, name: str | None = None, tokenizer: str = "gpt2",
                 root: Path | str = ROOT) -> Path:
    """Prepare a text under `root` and return its folder, for data.dataset.load.

    `source` is a UTF-8 file, a folder (all files in it and below, hidden ones left out) or a glob pattern; files
    follow one another in the order of their paths, each but the last with a line end added where it lacks one.
    `tokenizer` is "gpt2" or "char". The set is called `name`, or else after the source. An intact set of the
    same text is used as it is; another text under this name replaces it. ValueError for a name or tokenizer
    that cannot be; DataError for a text that is missing, empty, too short, or not UTF-8.
    """
    if tokenizer not in ("gpt2", "char"):
        raise ValueError(f"There is no tokenizer {tokenizer!r} for an own text: choose gpt2 or char.")
    root = Path(root)
    folder = root / checked_name(source, name, tokenizer)
    parts = find_parts(source)
    digest, chars = survey(parts, tokenizer == "char")
    if is_of(folder, digest, tokenizer):
        return folder
    made = CharTokenizer(chars) if tokenizer == "char" else gpt2_tokenizer(root)
    cut, end = find_cut(parts), parts[-1].end
    plan = {"text": digest, "tokenizer": tokenizer, "cut": cut}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entries = encode_splits(folder, parts, {"train": (0, cut), "val": (cut, end)}, made, plan)
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({reason(error)}): make room or make it writable, then prepare "
                        "again to go on.") from error
    meta = {"format": FORMAT, "name": folder.name, "title": folder.name, "stand_in": False, "variant": "own",
            "source": Path(source).name, "source_sha256": {"text": digest}, "licence": "not stated",
            "split_rule": SPLIT_RULE, "dtype": "uint16", "tokenizer": tokenizer, "vocab_size": made.vocab_size,
            "splits": entries} | ({"chars": chars} if tokenizer == "char" else {})
    write_json(folder / "meta.json", meta)
    (folder / "progress.json").unlink(missing_ok=True)
    return folder


def checked_name(source: Path | str, name: str | None, tokenizer: str) -> str:
    """The set's name: as given, or made from the source's. ValueError for one that is taken or no folder's."""
    if name is None:
        stem = re.sub(r"[^\w-]+", "_", Path(source).stem).strip("_") or "own"
        name = stem + "_char" * (tokenizer == "char")
    if not re.fullmatch(r"\w[\w.-]*", name) or name in TAKEN:
        raise ValueError(f"A set cannot be called {name!r}: give another name, of letters, digits, - and _.")
    return name


def gpt2_tokenizer(root: Path) -> GPT2Tokenizer:
    """GPT-2's tokenizer, once its files are there. Unavailable says which to put where."""
    tokenizer = GPT2Tokenizer(root)
    try:
        tokenizer.encode("")
    except Unavailable as error:
        raise Unavailable(refusal("The text", GPT2_FILES, root, error) + " By character it needs no files.") from error
    return tokenizer


def is_of(folder: Path, digest: str, tokenizer: str) -> bool:
    """Whether an intact set of this very text is there. DataError for a set that is no own text."""
    if not (folder / "meta.json").exists() or find_damage(folder):
        return False
    meta = load(folder).meta
    if meta["variant"] != "own":
        raise DataError(f"{folder} holds another kind of set: choose another name, or delete the folder.")
    return (meta["source_sha256"], meta["tokenizer"]) == ({"text": digest}, tokenizer)


# --- The text -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Part:
    """One file of the text, from byte `start` on, and the line end, or nothing, that is added after it."""
    path: Path
    start: int
    size: int
    added: bytes

    @property
    def end(self) -> int:
        return self.start + self.size + len(self.added)


def find_parts(source: Path | str) -> list[Part]:
    """The files of the text, in order, empty ones left out. DataError if there are none."""
    try:
        sized = [(path, path.stat().st_size) for path in find_files(source)]
        if not sized:
            raise DataError(f"{source} matches no file: give a UTF-8 text file, a folder of such files or a pattern.")
        parts, start = [], 0
        sized = [(path, size) for path, size in sized if size]
        for path, size in sized:
            parts.append(Part(path, start, size, b"" if path == sized[-1][0] or ends_a_line(path) else b"\n"))
            start = parts[-1].end
    except OSError as error:
        raise DataError(f"{source} cannot be read ({reason(error)}): check the path and its permissions.") from error
    if not parts:
        raise DataError(f"{source} is empty: give a text of some thousand characters or more.")
    return parts


def find_files(source: Path | str) -> list[Path]:
    """The files that a path, a folder or a pattern means, sorted by path."""
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        below = (found for found in path.rglob("*") if not any(p.startswith(".") for p in found.relative_to(path).parts))
    else:
        below = map(Path, glob.glob(str(source), recursive=True))
    return sorted((found for found in below if found.is_file()), key=lambda found: found.as_posix())


def ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read(parts: list[Part], start: int, stop: int):
    """Yield the text's bytes from `start` up to `stop`, at most PIECE at a time."""
    for part in parts:
        low, high = max(start, part.start), min(stop, part.start + part.size)
        if low < high:
            try:
                with open(part.path, "rb") as file:
                    file.seek(low - part.start)
                    while low < high and (block := file.read(min(PIECE, high - low))):
                        low += len(block)
                        yield block
            except OSError as error:
                raise DataError(f"{part.path} cannot be read ({reason(error)}): check its permissions.") from error
            if low < high:
                raise changed(part.path)
        if part.added and start < part.end <= stop:
            yield part.added


def changed(what: Path | str) -> DataError:
    return DataError(f"{what} changed while it was read: prepare it again once nothing writes to it.")


def decoded(parts: list[Part], start: int, stop: int):
    """Yield that stretch as (text, byte at which it ends), in order. DataError names a byte that is no UTF-8."""
    decoder, done = codecs.getincrementaldecoder("utf-8")(), start
    for block in chain(read(parts, start, stop), [b""]):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = done - pending + error.start
            part = next(part for part in parts if place < part.end)
            raise DataError(f"{part.path} is not UTF-8 text (byte {place - part.start} is 0x{error.object[error.start]:02x}): "
                            "convert it to UTF-8, or leave it out.") from None
        done += len(block)
        yield text, done - len(decoder.getstate()[0])


def survey(parts: list[Part], char: bool) -> tuple[str, str]:
    """The SHA-256 of the whole text, once it has been read as UTF-8, and its characters where `char` asks for them."""
    digest, seen = hashlib.sha256(), set()
    with progress("reading", parts[-1].end) as bar:
        for text, done in decoded(parts, 0, parts[-1].end):
            digest.update(text.encode())
            seen.update(text if char else "")
            bar.update(done - bar.n)
    if len(seen) > np.iinfo(DTYPE).max + 1:
        raise DataError(f"The text has {len(seen)} different characters, more than uint16 numbers: use GPT-2 BPE.")
    return digest.hexdigest(), "".join(sorted(seen))


def find_cut(parts: list[Part]) -> int:
    """The byte at which validation begins: where SPLIT_RULE says, within 5% of the text or 4 MiB of the place."""
    end = parts[-1].end
    mark = end * 9 // 10
    reach = min(max(end // 20, 64), 1 << 22)
    start = max(0, mark - reach)
    near = b"".join(read(parts, start, mark + reach))
    for ends in (rb"\n(?:[ \t\r]*\n)+", rb"\n", rb"(?=[\x00-\x7f\xc0-\xff])"):  # the last: where a character begins
        places = [start + match.end() for match in re.finditer(ends, near)]
        places = [place for place in places if 0 < place < end]
        if places:
            return min(places, key=lambda place: abs(place - mark))
    raise DataError(f"{parts[0].path} is too short to be split: give a text of some thousand characters or more.")


def pieces(parts: list[Part], start: int, stop: int):
    """Yield that stretch as (text, byte at which it ends), cut where the encoding of the whole has a cut anyway.

    That is before a blank that follows a visible character. In GPT-2's pattern no token goes on from visible to
    blank, what it matches from there on depends only on what comes after, and the matches before it look no
    further ahead than to the blank. Words are not cut there either.
    """
    rest = ""
    for text, end in decoded(parts, start, stop):
        text = rest + text
        visible = LAST_VISIBLE.match(text) if end < stop else None
        cut = visible.end() if visible else 0 if end < stop else len(text)
        rest = text[cut:]
        if len(rest) > LONGEST:
            raise DataError(f"{parts[0].path} and what follows has {len(rest):,} characters without a blank after "
                            "a visible one: leave out what is no text.")
        if cut:
            yield text[:cut], end - len(rest.encode())


# --- The tokens ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Done:
    """How far a split's .bin has come: what has been written of it, and of how much text."""
    tokens: int = 0
    bytes: int = 0
    words: int = 0              # without ends of line
    line_ends: int = 0
    open_line: int = 0          # 1 where the text so far ends within a line
    sha256: str = ""


def encode_splits(folder: Path, parts: list[Part], stretches: dict[str, tuple[int, int]], tokenizer: Tokenizer,
                  plan: dict) -> dict[str, dict]:
    """Write one .bin a split and return their entries in meta.json; goes on from what was saved of the same plan."""
    (folder / "meta.json").unlink(missing_ok=True)      # from here on nothing counts as prepared
    saved = read_saved(folder / "progress.json", plan)
    with progress("encoding", parts[-1].end) as bar:
        for split, (start, stop) in stretches.items():
            for done in encode_split(folder / f"{split}.bin", parts, start, stop, tokenizer, saved.get(split), bar):
                saved[split] = done
                splits = {name: asdict(state) for name, state in saved.items()}
                write_json(folder / "progress.json", plan | {"splits": splits})
    short = [split for split, done in saved.items() if done.tokens < 2]
    if short:
        raise DataError(f"The text is too short: its split {short[0]} has {saved[short[0]].tokens} tokens where the "
                        "smallest block needs two; give a text of some thousand characters or more.")
    return {split: entry(f"{split}.bin", done) for split, done in saved.items()}


def encode_split(path: Path, parts: list[Part], start: int, stop: int, tokenizer: Tokenizer, done: Done | None, bar):
    """Write a split's tokens, after those of `done` if they are there; yield what is done whenever it is on the disk."""
    digest = digest_of(path, done)
    if digest is None:
        done, digest = Done(), hashlib.sha256()
        path.unlink(missing_ok=True)        # not emptied: another process may have the old one mapped
    saved = done.bytes
    bar.update(start + saved - bar.n)
    with open(path, "ab") as out:
        out.truncate(done.tokens * DTYPE.itemsize)
        for end, ids, words, line_ends, open_line in encoded(pieces(parts, start + saved, stop), tokenizer):
            out.write(ids)
            digest.update(ids)
            done = Done(done.tokens + len(ids), end - start, done.words + words, done.line_ends + line_ends,
                        open_line, digest.hexdigest())
            bar.update(end - bar.n)
            if end == stop or done.bytes - saved >= SAVED:
                out.flush()
                os.fsync(out.fileno())
                saved = done.bytes
                yield done


def digest_of(path: Path, done: Done | None):
    """The running SHA-256 of the tokens that are done, None unless the file holds just these at its beginning."""
    digest, left = hashlib.sha256(), done.tokens * DTYPE.itemsize if done else 0
    if not left or not path.exists():
        return None
    with open(path, "rb") as file:
        while left and (block := file.read(min(PIECE, left))):
            digest.update(block)
            left -= len(block)
    return digest if (left, digest.hexdigest()) == (0, done.sha256) else None


def encoded(texts, tokenizer: Tokenizer):
    """Yield (end, ids, words, line ends, 1 if its last line is open) of each piece, in order, a few pieces ahead.

    Threads do it: tiktoken and NumPy let go of Python's lock, so that every core is used.
    """
    encode, waiting = encoder(tokenizer), deque()

    def work(text, end):
        return end, encode(text), len(text.split()), text.count("\n"), int(text[-1] != "\n")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for piece in texts:
            waiting.append(pool.submit(work, *piece))
            if len(waiting) > 2 * os.cpu_count():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def encoder(tokenizer: Tokenizer):
    """A function from text to ids as an array, faster than the tokenizer's own list of them."""
    if isinstance(tokenizer, GPT2Tokenizer):
        encoding = tokenizer.encoding
        return lambda text: encoding.encode_to_numpy(text, disallowed_special=()).astype(DTYPE)
    table = np.zeros(sys.maxunicode + 1, DTYPE)
    table[[ord(char) for char in tokenizer.chars]] = np.arange(tokenizer.vocab_size)
    return lambda text: table[np.frombuffer(text.encode("utf-32-le"), "<u4")]


def entry(file: str, done: Done) -> dict:
    """A finished split's entry in meta.json, counted as data/prepare.py counts."""
    lines = done.line_ends + done.open_line
    return {"file": file, "tokens": done.tokens, "bytes": done.bytes, "words": done.words + lines, "lines": lines,
            "sha256": done.sha256}


def read_saved(path: Path, plan: dict) -> dict[str, Done]:
    """What an interrupted preparation of this plan has done of each split; nothing, if it was of another."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        splits = {split: Done(**done) for split, done in state.pop("splits").items()}
        return splits if state == plan else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def progress(what: str, total: int):
    """A bar over bytes: in a terminal, silence in logs and in notebooks that are kept."""
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, leave=False, disable=None)


def openings(data: Dataset, count: int = 3) -> tuple[str, ...]:
    """The first words of `count` paragraphs from the beginning of the validation split: prompts that fit the text."""
    text = data.tokenizer.decode(data.splits["val"][:PIECE // 4])
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text) if len(part.split()) > 6] or [text.strip()]
    chosen = (paragraphs[len(paragraphs) * i // count] for i in range(count))
    return tuple(re.match(r"(?:\S+\s+){0,5}\S*", paragraph)[0][:80].strip() for paragraph in chosen)


# --- The command --------------------------------------------------------------------------------------------

def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Prepare a text of your own (see data/README.md).")
    parser.add_argument("source", help="a UTF-8 text file, a folder of such files, or a pattern in quotes")
    parser.add_argument("--name", help="of the set (default: the source's)")
    parser.add_argument("--char", action="store_true", help="by character instead of in GPT-2 BPE")
    options = parser.parse_args(arguments)

    def work():
        yield prepare_text(options.source, options.name, "char" if options.char else "gpt2")

    return exit_status(work(), "go on")


if __name__ == "__main__":
    sys.exit(main())
