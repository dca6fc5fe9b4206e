"""A prepared data set: its tokens as memory maps, its tokenizer, and what metrics divide by."""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from data.fetch import DataError, fetch_gpt2, reason

FORMAT = 2  # of meta.json and the .bin files; raised when either changes its meaning
DTYPE = np.dtype("<u2")  # uint16, little-endian on every machine
UNK, EOS = "<unk>", "<eos>"  # of a vocabulary of words
READABLE = (  # what WikiText's tokenization is undone by, in this order
    (rf" ?{EOS} ?", "\n"),
    (r" ?@([-,.])@ ?", r"\1"),  # inside words and numbers
    (r"= (?==)", "="),  # "= = Title = =" becomes "== Title =="
    (r" ([,.;:?!)\]%]|\.\.\.|'(?:s|t|d|m|re|ve|ll))(?!\S)", r"\1"),
    (r"\b([A-Za-z]) (?='\w)", r"\1"),  # O'Brien, d'état
    (r"([(\[$£]) ", r"\1"),
    (r'(?<![^\s(\[])" ([^"\n]*) "', r'"\1"'),  # a line's quotes, two by two; once is as twice
)


# ----- tokenizers -----
class Tokenizer:
    """`encode(text)` gives a list of ids, `encode_array` a uint16 array, `decode(ids)` the text."""

    name: str  # as in meta.json
    unit: str  # what one id stands for
    vocab_size: int
    vocabulary: dict = {}  # what meta.json keeps of it

    def encode(self, text):
        return self.encode_array(text).tolist()

    def checked(self, ids):
        """Ids of any sequence as ints; ValueError for one outside the vocabulary."""
        ids = np.asarray(ids).astype(np.int64).tolist()
        if outside := [i for i in ids if not 0 <= i < self.vocab_size]:
            text = f"Token id {outside[0]} is none of the {self.vocab_size:,} of the {self.name}"
            raise ValueError(f"{text} tokenizer: decode only its own ids.")
        return ids


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding by tiktoken; its files are sought under `root` when needed."""

    name, unit, vocab_size = "gpt2", "token", 50257

    def __init__(self, root):
        self.root = root

    @cached_property
    def encoding(self):
        fetch_gpt2(self.root)
        return tiktoken.get_encoding("gpt2")

    def encode_array(self, text):
        """Ids of the text as it stands: "<|endoftext|>" in it is text, not a special token."""
        return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(DTYPE)

    def decode(self, ids):
        """Text of the ids; bytes that are no whole character become U+FFFD."""
        return self.encoding.decode(self.checked(ids))


class CharTokenizer(Tokenizer):
    """One id a character: its position in `chars`."""

    name, unit = "char", "character"

    def __init__(self, chars):
        self.chars, self.vocab_size, self.vocabulary = chars, len(chars), {"chars": chars}
        if not chars or len(set(chars)) != len(chars):
            raise ValueError("A CharTokenizer needs one or more characters, each once.")
        self.table = np.zeros(ord(max(chars)) + 1, DTYPE)  # from code point to id
        self.table[[ord(char) for char in chars]] = np.arange(len(chars))

    def encode_array(self, text):
        """Ids of the characters; ValueError names those that the alphabet lacks."""
        if unknown := sorted(set(text).difference(self.chars)):
            named = ", ".join(map(repr, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
            text = f"The text holds {named}, which this data set's alphabet of {len(self.chars)}"
            raise ValueError(f"{text} characters lacks: write it with these: {self.chars[:100]!r}.")
        return self.table[np.frombuffer(text.encode("utf-32-le"), "<u4")]

    def decode(self, ids):
        return "".join(self.chars[i] for i in self.checked(ids))


class WordTokenizer(Tokenizer):
    """One id a word between white space, and EOS for a line end; other words become UNK."""

    name = unit = "word"

    def __init__(self, words):
        self.words, self.vocab_size, self.vocabulary = words, len(words), {"words": words}
        self.ids = {word: i for i, word in enumerate(words)}
        if len(self.ids) != len(words) or not {UNK, EOS} <= self.ids.keys():
            raise ValueError(f"A WordTokenizer needs different words, with {UNK} and {EOS}.")

    @staticmethod
    def split(text):
        """The words of a text, with an EOS for a blank line too."""
        return text.replace("\n", f" {EOS} ").split()

    def encode_array(self, text):
        return np.array([self.ids.get(word, self.ids[UNK]) for word in self.split(text)], DTYPE)

    def decode(self, ids):
        """A text for readers: WikiText's spaces around punctuation go where it is safe."""
        text = " ".join(self.words[i] for i in self.checked(ids))
        for pattern, readable in READABLE:
            text = re.sub(pattern, readable, text)
        return text


# ----- the data set -----
class Splits(dict):
    """Token ids (N,), read-only uint16 memory maps, under "train", "val" and perhaps "test"."""

    def __missing__(self, name):
        raise ValueError(f"There is no split {name!r}: choose one of {', '.join(self)}.")


@dataclass(frozen=True, eq=False)
class Dataset:
    """One prepared set."""

    name: str
    title: str
    stand_in: bool
    folder: Path
    splits: Splits
    prepared: dict  # the same arrays; in `splits` others may be put, as to try less text
    vocab_size: int
    tokenizer: Tokenizer
    meta: dict[str, Any]  # all of meta.json

    def entry(self, split):
        """meta.json's entry of a split; of other tokens the sum, with bytes and words as NaN."""
        tokens = self.splits[split]
        if tokens is self.prepared.get(split) and not tokens.flags.writeable:
            return self.meta["splits"][split]
        sha256 = hashlib.sha256(np.ascontiguousarray(tokens)).hexdigest()
        return {"bytes": np.nan, "words": np.nan, "sha256": sha256}

    @property
    def bytes(self):  # by split, of its UTF-8 text
        return {split: self.entry(split)["bytes"] for split in self.splits}

    @property
    def words(self):  # by split, including one <eos> a line, as the literature counts
        return {split: self.entry(split)["words"] for split in self.splits}

    @property
    def fingerprint(self):  # of tokens and vocabulary: a checkpoint with another is of other data
        sums = {split: self.entry(split)["sha256"] for split in self.splits}
        vocabulary = self.meta.get("words") or self.meta.get("chars", "")
        parts = [self.meta["tokenizer"], self.vocab_size, vocabulary, sorted(sums.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def final_split(self):  # that final figures are of
        return "test" if "test" in self.splits else "val"

    @property
    def bos_id(self):
        """The id before a split's first token: a line end, or id 0 if the alphabet has none."""
        try:
            return self.tokenizer.encode("\n")[0]
        except ValueError:
            return 0


def load(folder):
    """Open a prepared folder; DataError says which file is missing or damaged, and what to do."""
    folder, meta = Path(folder), read_meta(Path(folder))
    splits = {split: _open_split(folder, entry) for split, entry in meta["splits"].items()}
    facts = {field: meta[field] for field in ("name", "title", "stand_in", "vocab_size")}
    facts |= {"folder": folder, "tokenizer": _make_tokenizer(meta, folder), "meta": meta}
    return Dataset(**facts, splits=Splits(splits), prepared=splits)


def sealed(meta):
    """meta.json's content: with its format, and a SHA-256 that says whether it is as written."""
    content = {"format": FORMAT} | {key: value for key, value in meta.items() if key != "sha256"}
    sha256 = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return content | {"sha256": sha256}


def read_meta(folder):
    """meta.json of a prepared folder, as it was written."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: prepare the data with data/prepare.py.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, f"is not readable JSON ({reason(error)})", error) from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise damaged(path, f"is not of format {FORMAT}")
    if meta != sealed(meta):
        raise damaged(path, "is not as it was written")
    return meta


def _open_split(folder, entry):
    """The tokens (N,) of one split, once their sum is right."""
    path = folder / entry["file"]
    try:
        with open(path, "rb") as file:  # one file: the path may come to name another meanwhile
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != entry["sha256"]:
                raise damaged(path, f"has SHA-256 {digest}, meta.json says {entry['sha256']}")
            return np.memmap(file, dtype=DTYPE, mode="r")
    except OSError as error:
        raise damaged(path, f"cannot be read ({reason(error)})", error) from error


def damaged(path, what, error=None):
    """The error for a file of a prepared folder that cannot be used, or may not be read."""
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return DataError(f"{path} cannot be read ({reason(error)}): see to its permissions.")
    return DataError(f"{path} {what}: delete the set's files there, and prepare the data again.")


def _make_tokenizer(meta, folder):
    """The tokenizer that meta.json names; GPT-2's files lie beside the prepared folder."""
    if "words" in meta:
        return WordTokenizer(meta["words"])
    return CharTokenizer(meta["chars"]) if "chars" in meta else GPT2Tokenizer(folder.parent)
