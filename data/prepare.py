"""Make the data sets: text in, .bin files of uint16 token ids and a meta.json out.

    python data/prepare.py wikitext2            WikiText-2 v1 in GPT-2 BPE, to data/wikitext2
    python data/prepare.py wikitext2 --raw      the raw variant, to data/wikitext2_raw
    python data/prepare.py shakespeare_char     Tiny Shakespeare by character, to data/shakespeare_char
    python data/prepare.py all                  the first and the third
"""

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

if __name__ == "__main__":      # run as a script, sys.path starts at this folder instead of the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.dataset import (DTYPE, FORMAT, ByteTokenizer, CharTokenizer, Dataset, GPT2Tokenizer, Tokenizer,
                          load)
from data.fetch import (GPT2_FILES, SHAKESPEARE, WIKITEXT2, WIKITEXT2_RAW, DataError, Source, Unavailable,
                        WrongBytes, fetch, fetch_gpt2, replacing, zip_member)

ROOT = Path(__file__).resolve().parent
NAMES = ("wikitext2", "shakespeare_char")
MEMBER_LIMIT = 32 << 20         # bytes; the largest file in the raw zip has 11 million

# Another count than these means another text or another tokenizer than the published figures have.
TOKENS = {
    "wikitext2": {"train": 2_448_382, "val": 258_659, "test": 295_877},
    "wikitext2_raw": {"train": 2_428_601, "val": 251_048, "test": 287_644},
    "shakespeare_char": {"train": 1_003_854, "val": 111_540},
}
WIKITEXT_LICENCE = "CC BY-SA 3.0 and GFDL (Wikipedia contributors; collected by Merity et al. 2016)"
OWN_SPLITS = "the files' own train, validation and test parts"


@dataclass(frozen=True)
class Split:
    """The text of one split, with its words plus one end-of-line a line, and its lines."""
    text: str
    words: int
    lines: int


def prepare(name: str, *, variant: str = "v1", allow_stand_in: bool = False,
            root: Path | str = ROOT) -> Path:
    """Prepare the set `name` ("wikitext2" or "shakespeare_char") under `root` and return its folder.

    A set that is there and intact is used as it is; a damaged one is made again. `variant` is "v1" or, for
    WikiText-2 only, "raw". Where the real bytes cannot be had, `allow_stand_in` gives a folder with the
    Python manual instead, whose meta.json says so; without it, and for a mirror with wrong bytes, DataError.
    """
    if name not in NAMES:
        raise ValueError(f"There is no data set {name!r}: choose one of {', '.join(NAMES)}.")
    if variant not in ("v1", "raw") or (variant, name) == ("raw", "shakespeare_char"):
        raise ValueError(f"{name} has no variant {variant!r}: choose v1, or raw for wikitext2.")
    root = Path(root)
    folder = root / (name if variant == "v1" else "wikitext2_raw")
    damage = find_damage(folder)
    if damage is None and (folder / "meta.json").exists():
        return folder
    make, sources = recipe(name, variant)
    try:
        make(folder, root)
    except Unavailable as error:
        if damage:
            raise DataError(f"{damage} (It cannot be made again now: {error}.)") from error
        if not allow_stand_in:
            raise Unavailable(refusal(folder.name, sources, root, error)) from error
        return prepare_stand_in(name, root)
    return folder


def find_damage(folder: Path) -> str | None:
    """What makes a prepared folder unusable; None if it is intact, or if there is none."""
    if not (folder / "meta.json").exists():     # written last: without it, a preparation was not finished
        return None
    try:
        data = load(folder)
    except DataError as error:
        return str(error)
    if data.name != folder.name:
        return f"{folder} holds the set {data.name}: delete the folder and prepare the data again."
    return None


def recipe(name: str, variant: str):
    """The function that makes a set from its raw files, and those files."""
    if name == "shakespeare_char":
        return make_shakespeare, (SHAKESPEARE,)
    if variant == "raw":
        return make_wikitext2_raw, (WIKITEXT2_RAW, *GPT2_FILES)
    return make_wikitext2, (*WIKITEXT2.values(), *GPT2_FILES)


def refusal(name: str, sources: tuple[Source, ...], root: Path, error: Exception) -> str:
    """The sentence that says which files to put where."""
    files = ", ".join(source.path for source in sources)
    return (f"{name} cannot be prepared: put {files} under {root / 'raw'}, or set DATA_MIRROR to a folder or "
            f"address that holds them under these names, since {error}.")


# --- The sets -----------------------------------------------------------------------------------------------

def make_wikitext2(folder: Path, root: Path) -> None:
    """WikiText-2 v1: each file's exact text in GPT-2 BPE, `<unk>` and blank lines included."""
    found = {split: fetch(source, root / "raw") for split, source in WIKITEXT2.items()}
    splits = {split: count(read_text(path)) for split, (path, _) in found.items()}
    facts = dict(title="WikiText-2", variant="v1", licence=WIKITEXT_LICENCE, split_rule=OWN_SPLITS,
                 **provenance(WIKITEXT2.values(), (origin for _, origin in found.values())))
    write_set(folder, splits, GPT2Tokenizer(root), facts)


def make_wikitext2_raw(folder: Path, root: Path) -> None:
    """WikiText-2 raw: the files' rows joined by blank lines, in GPT-2 BPE."""
    path, origin = fetch(WIKITEXT2_RAW, root / "raw")
    facts = dict(title="WikiText-2 raw", variant="raw", licence=WIKITEXT_LICENCE, split_rule=OWN_SPLITS,
                 **provenance([WIKITEXT2_RAW], [origin]))
    write_set(folder, raw_splits(path.read_bytes()), GPT2Tokenizer(root), facts)


def make_shakespeare(folder: Path, root: Path) -> None:
    """Tiny Shakespeare by character: the first 90% of the characters train, the rest validates."""
    path, origin = fetch(SHAKESPEARE, root / "raw")
    text = read_text(path)
    cut = len(text) * 9 // 10
    facts = dict(title="Tiny Shakespeare", variant="char", licence="public domain",
                 split_rule="contiguous: the first 90% of the characters train, the rest validates",
                 **provenance([SHAKESPEARE], [origin]))
    write_set(folder, {"train": count(text[:cut]), "val": count(text[cut:])}, alphabet(text), facts)


def prepare_stand_in(name: str, root: Path) -> Path:
    """The Python manual in place of a set: never under that set's folder, name or title."""
    folder = root / ("stand_in_char" if name == "shakespeare_char" else "stand_in_gpt2")
    text = manual()
    if name == "shakespeare_char":
        tokenizer, unit, shares = alphabet(text), "characters", {"train": 90, "val": 10}
    else:
        tokenizer, unit, shares = *bpe_or_bytes(root), {"train": 80, "val": 10, "test": 10}
    rule = " / ".join(f"{split} {share}%" for split, share in shares.items())
    facts = dict(title=f"stand-in: Python manual (pydoc topics), {unit}", variant="stand-in", stand_in=True,
                 licence="Python Software Foundation License", source="pydoc_data.topics of this Python",
                 source_sha256={"pydoc_data.topics": hashlib.sha256(text.encode()).hexdigest()},
                 split_rule=f"contiguous, cut at a line's end: {rule}")
    if not is_same(folder, tokenizer, facts):
        write_set(folder, cut_at_lines(text, shares), tokenizer, facts)
    return folder


def bpe_or_bytes(root: Path) -> tuple[Tokenizer, str]:
    """GPT-2's BPE where its files can be had, else bytes, with the unit's name for the title."""
    try:
        fetch_gpt2(root)
        return GPT2Tokenizer(root), "GPT-2 BPE"
    except Unavailable:
        return ByteTokenizer(), "bytes"


def is_same(folder: Path, tokenizer: Tokenizer, facts: dict) -> bool:
    """Whether an intact stand-in of this very text and tokenizer is there already."""
    if find_damage(folder) or not (folder / "meta.json").exists():
        return False
    meta = load(folder).meta
    return meta["tokenizer"] == tokenizer.name and meta["source_sha256"] == facts["source_sha256"]


# --- Texts --------------------------------------------------------------------------------------------------

def read_text(path: Path) -> str:
    """The file's exact characters: no newline is translated."""
    return path.read_bytes().decode("utf-8")


def count(text: str, counted: str | None = None) -> Split:
    """A split with its words and lines, counted in `counted` where that is not the text itself.

    As in the published WikiText-2 figures, every line, blank ones too, ends with one end-of-line that counts.
    """
    lines = (text if counted is None else counted).split("\n")
    if not lines[-1]:
        lines.pop()
    return Split(text, sum(len(line.split()) + 1 for line in lines), len(lines))


def raw_splits(archive: bytes) -> dict[str, Split]:
    """The three texts of the raw zip, rows joined by blank lines; words are counted in the file itself."""
    splits = {}
    for split, member in {"train": "train", "val": "valid", "test": "test"}.items():
        content = zip_member(archive, f"wikitext-2-raw/wiki.{member}.raw", MEMBER_LIMIT)
        text = content.decode("utf-8")
        splits[split] = count("\n\n".join(rows(text)), text)
    return splits


def rows(text: str) -> list[str]:
    """The rows of the Hugging Face edition: a line with its line end, and nothing for a line of white space.

    So the rows hold 1,144,248 (validation) and 1,287,656 bytes (test): the files' 1,146,846 and 1,290,590
    less the two bytes " \\n" of each of their 1,299 and 1,467 blank lines.
    """
    lines = text.split("\n")
    ended = [line + "\n" for line in lines[:-1]] + lines[-1:] * bool(lines[-1])
    return [line if line.strip() else "" for line in ended]


def manual() -> str:
    """The language manual that comes with Python for help(), topics in alphabetical order."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise Unavailable("This Python comes without pydoc_data.topics, so there is no stand-in text: put "
                          "the raw files in place instead, as data/README.md says.") from error
    return "\n\n".join(topics[key].strip("\n") for key in sorted(topics)) + "\n"


def cut_at_lines(text: str, shares: dict[str, int]) -> dict[str, Split]:
    """Contiguous splits of about these percentages, each ending with a whole line."""
    splits, start, done = {}, 0, 0
    for split, share in shares.items():
        done += share
        end = len(text) if done == 100 else text.rfind("\n", 0, len(text) * done // 100) + 1
        splits[split] = count(text[start:end])
        start = end
    return splits


def alphabet(text: str) -> CharTokenizer:
    """A tokenizer of all characters of the text, validation included, in code point order as in nanoGPT."""
    return CharTokenizer("".join(sorted(set(text))))


# --- Files --------------------------------------------------------------------------------------------------

def provenance(sources, origins) -> dict:
    """The meta.json fields that say where the raw bytes came from."""
    return {"source": ", ".join(sorted(set(origins))),
            "source_sha256": {source.path: source.sha256 for source in sources}}


def write_set(folder: Path, splits: dict[str, Split], tokenizer: Tokenizer, facts: dict) -> None:
    """Write one .bin a split and then meta.json, without which the folder does not count as prepared."""
    entries = {split: write_split(folder, split, part, tokenizer) for split, part in splits.items()}
    meta = {"format": FORMAT, "name": folder.name, "stand_in": False, **facts, "dtype": "uint16",
            "tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, "splits": entries}
    if isinstance(tokenizer, CharTokenizer):
        meta["chars"] = tokenizer.chars
    write_json(folder / "meta.json", meta)


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file whole or not at all. DataError if it cannot be written."""
    with replacing(path) as out:
        out.write(json.dumps(value, indent=1).encode())


def write_split(folder: Path, split: str, part: Split, tokenizer: Tokenizer) -> dict:
    """Encode and write one split; return its entry in meta.json. WrongBytes if its length is not as known."""
    ids = np.array(tokenizer.encode(part.text), dtype=DTYPE)
    known = TOKENS.get(folder.name, {}).get(split, len(ids))
    if len(ids) != known:
        raise WrongBytes(f"{folder.name} {split} came to {len(ids)} tokens where {known} are right: install "
                         "the tiktoken of requirements.txt and prepare again.")
    with replacing(folder / f"{split}.bin") as out:
        out.write(ids)
    return {"file": f"{split}.bin", "tokens": len(ids), "bytes": len(part.text.encode("utf-8")),
            "words": part.words, "lines": part.lines, "sha256": hashlib.sha256(ids).hexdigest()}


# --- The command --------------------------------------------------------------------------------------------

def describe(data: Dataset) -> str:
    """A line a split: tokens, bytes, words, and where the text is from."""
    return "\n".join(
        f"{data.title}, {split}: {len(tokens):,} tokens ({data.tokenizer.name}), "
        f"{data.bytes[split]:,} bytes, {data.words[split]:,} words, from {data.meta['source']}"
        for split, tokens in data.splits.items())


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Prepare the data sets (see data/README.md).")
    parser.add_argument("name", choices=(*NAMES, "all"))
    parser.add_argument("--raw", action="store_true", help="WikiText-2 raw instead of v1")
    options = parser.parse_args(arguments)
    names = NAMES if options.name == "all" else (options.name,)

    def work():
        for name in names:
            variant = "raw" if options.raw and (name == "wikitext2" or options.name != "all") else "v1"
            yield prepare(name, variant=variant)

    return exit_status(work(), "finish")


def exit_status(folders, again: str) -> int:
    """Describe each prepared folder as it comes; the command's exit status, with its error or interrupt in a sentence."""
    try:
        for folder in folders:
            print(describe(load(folder)))
    except (DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped: run the command again to {again}; nothing half-made will be used", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
