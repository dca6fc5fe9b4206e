"""A prepared data set: its tokens as memory maps, its tokenizer, and the counts that metrics divide by."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from data.fetch import DataError, fetch_gpt2

FORMAT = 1                      # of meta.json and the .bin files; raised when either changes its meaning
DTYPE = np.dtype("<u2")         # uint16, little-endian on every machine
CHUNK = 1 << 22                 # tokens checked at a time, so that a large set is never whole in memory


# --- Tokenizers: encode(text) -> list of ids, decode(ids) -> text, vocab_size, name -------------------------

class GPT2Tokenizer:
    """GPT-2's byte-pair encoding by tiktoken; its two files are looked for under `root` when first needed."""
    name = "gpt2"
    vocab_size = 50257

    def __init__(self, root: Path):
        self.root = root

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        fetch_gpt2(self.root)
        return tiktoken.get_encoding("gpt2")

    def encode(self, text: str) -> list[int]:
        """Ids of the text as it stands: "<|endoftext|>" in it is text, not a special token."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids) -> str:
        """Text of the ids; bytes that are no whole character become U+FFFD. ValueError for an unknown id."""
        return self.encoding.decode(checked(ids, self))


class CharTokenizer:
    """One id a character: its position in `chars`."""
    name = "char"

    def __init__(self, chars: str):
        self.chars = chars
        self.ids = {char: i for i, char in enumerate(chars)}
        if not chars or len(self.ids) != len(chars):
            raise ValueError("The alphabet of a CharTokenizer must hold one character or more, each once.")

    @property
    def vocab_size(self) -> int:
        return len(self.chars)

    def encode(self, text: str) -> list[int]:
        """Ids of the characters; ValueError names those that the alphabet lacks."""
        unknown = sorted(set(text) - self.ids.keys())
        if unknown:
            named = ", ".join(map(repr, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
            raise ValueError(f"The text holds {named}, which this data set's alphabet of {len(self.chars)} "
                             f"characters lacks; write it with these only: {self.chars[:100]!r}.")
        return [self.ids[char] for char in text]

    def decode(self, ids) -> str:
        """Text of the ids; ValueError for an unknown id."""
        return "".join(self.chars[i] for i in checked(ids, self))


class ByteTokenizer:
    """One id a byte of the UTF-8 text: needs no files, and knows every character."""
    name = "bytes"
    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """Ids of the UTF-8 bytes."""
        return list(text.encode("utf-8"))

    def decode(self, ids) -> str:
        """Text of the ids; bytes that are no whole character become U+FFFD. ValueError for an unknown id."""
        return bytes(checked(ids, self)).decode("utf-8", errors="replace")


Tokenizer = GPT2Tokenizer | CharTokenizer | ByteTokenizer


def checked(ids, tokenizer: Tokenizer) -> list[int]:
    """The ids (list, array or tensor of one dimension) as ints; ValueError for one outside the vocabulary."""
    ids = [int(i) for i in ids]
    outside = [i for i in ids if not 0 <= i < tokenizer.vocab_size]
    if outside:
        raise ValueError(f"Token id {outside[0]} is outside the vocabulary of the {tokenizer.name} "
                         f"tokenizer, which ends at {tokenizer.vocab_size - 1}; decode only its own ids.")
    return ids


# --- The data set -------------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Dataset:
    """One prepared set.

    splits: token ids as read-only uint16 memory maps of shape (tokens,), under "train", "val" and, where
        there is one, "test".
    bytes, words: per split, the text's UTF-8 bytes, and its words plus one end-of-line a line, as the
        literature counts them.
    fingerprint: names tokens and vocabulary; a checkpoint that carries another one belongs to other data.
    meta: all of meta.json.
    """
    name: str
    title: str
    stand_in: bool
    folder: Path
    splits: dict[str, np.memmap]
    vocab_size: int
    tokenizer: Tokenizer
    bytes: dict[str, int]
    words: dict[str, int]
    fingerprint: str
    meta: dict[str, Any]

    @property
    def first_context(self) -> int:
        """The id from which a split's first token is predicted: a line end, or id 0 if the alphabet has none."""
        try:
            return self.tokenizer.encode("\n")[0]
        except ValueError:
            return 0


def load(folder: Path | str) -> Dataset:
    """Open a prepared folder; DataError says which file is missing, damaged or foreign, and what to do."""
    folder = Path(folder)
    meta = read_meta(folder)
    entries = meta["splits"]
    return Dataset(
        name=meta["name"], title=meta["title"], stand_in=meta["stand_in"], folder=folder,
        splits={split: open_split(folder / entry["file"], entry, meta["vocab_size"])
                for split, entry in entries.items()},
        vocab_size=meta["vocab_size"],
        tokenizer=make_tokenizer(meta, folder),
        bytes={split: entry["bytes"] for split, entry in entries.items()},
        words={split: entry["words"] for split, entry in entries.items()},
        fingerprint=fingerprint(meta),
        meta=meta)


META_TYPES = {"format": int, "name": str, "title": str, "stand_in": bool, "variant": str, "source": str,
              "source_sha256": dict, "licence": str, "split_rule": str, "tokenizer": str, "vocab_size": int,
              "dtype": str, "splits": dict}
SPLIT_TYPES = {"file": str, "tokens": int, "bytes": int, "words": int, "lines": int, "sha256": str}


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a prepared folder, with every field that `load` uses checked for type and sense."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist, so no data is prepared: run data/prepare.py, "
                        "or data/own.py for a text of your own.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, f"is not readable JSON ({error})") from error
    check_fields(path, meta, META_TYPES)
    if meta["format"] != FORMAT or meta["dtype"] != "uint16":
        raise damaged(path, f"has format {meta['format']} in {meta['dtype']}, not {FORMAT} in uint16")
    if not {"train", "val"} <= meta["splits"].keys():
        raise damaged(path, "lacks the split train or val")
    for entry in meta["splits"].values():
        check_fields(path, entry, SPLIT_TYPES)
        if Path(entry["file"]).name != entry["file"]:
            raise damaged(path, f"names the file {entry['file']!r} outside its own folder")
        if min(entry["tokens"], entry["bytes"], entry["words"]) < 1:
            raise damaged(path, "has a split without tokens, bytes or words")
    return meta


def check_fields(path: Path, record: Any, types: dict[str, type]) -> None:
    """DataError unless `record` is a dict whose fields have exactly these types (a bool is no int here)."""
    record = record if isinstance(record, dict) else {}
    wrong = [field for field, kind in types.items() if type(record.get(field)) is not kind]
    if wrong:
        raise damaged(path, f"lacks {', '.join(wrong)} or has the wrong type there")


def open_split(path: Path, entry: dict[str, Any], vocab_size: int) -> np.memmap:
    """The tokens of one split, shape (tokens,), once its size, its largest id and its sum are right."""
    needed = entry["tokens"] * DTYPE.itemsize
    try:
        size = path.stat().st_size
        if size != needed:
            raise damaged(path, f"has {size} bytes, its {entry['tokens']} tokens need {needed}")
        tokens = np.memmap(path, dtype=DTYPE, mode="r")
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror or error})") from error
    digest = hashlib.sha256()
    for start in range(0, len(tokens), CHUNK):
        part = tokens[start:start + CHUNK]
        digest.update(part)
        if part.max() >= vocab_size:
            raise damaged(path, f"holds the token id {part.max()}, its vocabulary ends at {vocab_size - 1}")
    if digest.hexdigest() != entry["sha256"]:
        raise damaged(path, f"has SHA-256 {digest.hexdigest()}, meta.json says {entry['sha256']}")
    return tokens


def damaged(path: Path, what: str) -> DataError:
    """The error for a file of a prepared folder that cannot be used."""
    return DataError(f"{path} {what}: delete the folder {path.parent} and prepare the data again.")


def make_tokenizer(meta: dict[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer that meta.json names; GPT-2's files lie beside the prepared folder."""
    tokenizer = None
    if meta["tokenizer"] == "gpt2":
        tokenizer = GPT2Tokenizer(folder.parent)
    elif meta["tokenizer"] == "bytes":
        tokenizer = ByteTokenizer()
    elif meta["tokenizer"] == "char" and isinstance(meta.get("chars"), str):
        chars = meta["chars"]
        tokenizer = CharTokenizer(chars) if chars and len(set(chars)) == len(chars) else None
    if tokenizer is None or tokenizer.vocab_size != meta["vocab_size"]:
        raise damaged(folder / "meta.json",
                      f"names no usable tokenizer ({meta['tokenizer']!r} with {meta['vocab_size']} ids)")
    return tokenizer


def fingerprint(meta: dict[str, Any]) -> str:
    """16 hexadecimal digits over the tokenizer, its vocabulary and the sums of all splits."""
    parts = [meta["tokenizer"], meta["vocab_size"], meta.get("chars", ""),
             sorted((split, entry["sha256"]) for split, entry in meta["splits"].items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
