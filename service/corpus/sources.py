"""Where a corpus comes from: which files are read, and why one cannot be."""

import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from lzma import LZMAError
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq

from index.manifest import FILE_NAME

READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".txt": "text",
}
"""The reader of the ``datasets`` library for each ending of a file's name, in small letters."""

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
"""Of files of lines and of comma-separated values, which are unpacked while they are read."""

PACKED = (".7z", ".lz4", ".tar", ".tgz", ".zip")
"""Endings of what has to be unpacked first."""

WIDE = (b"\xff\xfe", b"\xfe\xff")
"""How a text in UTF-16 begins, and one in UTF-32."""

MODEL_FILES = ("*.safetensors", "pytorch_model*.bin", "adapter_config.json", "*.gguf")
NO_EXAMPLES = "there are no examples in it"
KINDS = f"Give a file ending in {', '.join(READERS)}, or the name of a data set."
MOST = 2**63
"""What whole numbers that are read have to stay below, either side of 0."""


def refusal(data: str, reason: str, advice: str = "") -> ValueError:
    """The error of a corpus that cannot be read: what was given, what is wrong, what to do."""
    return ValueError(f"Cannot read the corpus '{data}': {reason}. {advice}".rstrip())


def suffix_of(data: str) -> str:
    """The ending by which the file ``data`` is read, or "" if it is not the name of such a file."""
    path = Path(data)
    packed = path.suffix.lower() in COMPRESSIONS
    suffix = (path.with_suffix("") if packed else path).suffix.lower()
    if packed and READERS.get(suffix) in ("arrow", "parquet"):  # which compress by themselves
        return ""
    return suffix if suffix in READERS and not path.is_dir() else ""


def places_of(data: str | tuple[str, ...]) -> list[str]:
    """Files, folders and data sets that are named, patterns resolved; in order.

    Raises:
        ValueError: nothing matches a pattern.
    """
    found = []
    for one in (data,) if isinstance(data, str) else data:
        if not any(mark in one for mark in "*?[") or Path(one).exists():
            found.append(one)
            continue
        matching = sorted(fsspec.filesystem("file").glob(one))
        if not matching:
            raise refusal(one, "no file matches this pattern")
        found += matching
    return found


def saved_by_datasets(folder: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    saved = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return saved or (folder / "dataset_dict.json").is_file()


def corpus_file(data: str) -> Path | None:
    """The file that ``data`` names; None for a folder or a data set, which the library looks for.

    Raises:
        ValueError: there is no such file, or it can be seen that it holds no corpus.
    """
    path = Path(data)
    if not data.strip():
        raise refusal(data, "no corpus is named", KINDS)
    if path.is_dir():
        _check_folder(data, path)
        return None
    if not path.exists():
        if suffix_of(data) or _looks_like_a_path(data):
            raise refusal(data, f"there is no file or folder {path.resolve()}")
        return None
    _check_kind(data, path)
    _check_beginning(data, path)
    return path


def why_unreadable(data: str, path: Path | None, error: Exception) -> ValueError:
    """What to say of an error of the library, found out from the source itself where possible."""
    said = " ".join(str(error).split()).removeprefix("Error tokenizing data. C error: ").rstrip(".")
    if isinstance(error, RuntimeError) and "StopIteration" in said:  # how it finds a file empty
        return refusal(data, NO_EXAMPLES)
    if path is not None:
        if isinstance(error, EOFError):
            return refusal(data, "it ends too early", "Write or download it again.")
        fault = _first_fault(path) if READERS[suffix_of(data)] == "json" else None
        return refusal(data, fault or said)
    if Path(data).is_dir():
        missing = isinstance(error, FileNotFoundError)
        reason = f"the folder holds no file ending in {', '.join(READERS)}" if missing else said
        return refusal(data, reason)
    if isinstance(error, OSError):
        reason = "there is no such file or folder, and no data set of this name was found"
        return refusal(data, f"{reason} ({said})", KINDS)
    return refusal(data, said)


def check_array(data: str, path: Path) -> None:
    """Refuse a JSON array with a text or number that the library would change in silence.

    Raises:
        ValueError: names the row.
    """
    if not begins_with_array(path):
        return
    with unpacked(path) as file:
        content = file.read()
    if b"\\ud" not in content.lower() and not re.search(rb"\d{19}", content):
        return  # every other character can be in a text, every other number is kept
    try:
        rows = json.loads(content.decode(errors="replace"))
    except ValueError:
        return  # the library says so, too
    for number, row in enumerate(rows):
        if half := _half_pair(row):
            raise refusal(data, f"row {number} holds {half}")
        _refuse_large(data, number, row)


def begins_with_array(path: Path) -> bool:
    """Whether a file of JSON is one array instead of an object a line."""
    with unpacked(path) as file:
        beginning: bytes = file.read(1024)
    return beginning.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def unpacked(path: Path) -> Any:
    """The bytes of a file, decompressed if its name says that they are compressed."""
    return fsspec.open(str(path), "rb", compression=COMPRESSIONS.get(path.suffix.lower()))


def with_exact_numbers(
    data: str, path: Path, rows: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The rows; one whose whole numbers the library rounded is refused.

    The file is read beside them only as far as a number may have been too large for 64 bits.

    Raises:
        ValueError: names the row and the number.
    """
    values, read = _values(path), 0
    for number, row in enumerate(rows):
        if any(map(_may_be_rounded, row.values())):
            _, value = next(islice(values, number - read, None))
            read = number + 1
            _refuse_large(data, number, value)
        yield row


def _refuse_large(data: str, number: int, row: Any) -> None:
    large = _large(row)
    if large is not None:
        raise refusal(
            data,
            f"row {number} holds the whole number {large}, which would be changed because it does "
            f"not fit into 64 bits",
            "Write it as a text.",
        )


def _may_be_rounded(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_may_be_rounded, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and abs(value) >= MOST and value.is_integer()


def _large(value: Any) -> int | None:
    """The first whole number in it that does not fit into 64 bits."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return next((n for n in map(_large, inner) if n is not None), None)
    return value if type(value) is int and not -MOST <= value < MOST else None


def is_one_object(data: str) -> bool:
    """Whether the file is .json and all of it is a single object."""
    if suffix_of(data) != ".json":
        return False
    try:
        with unpacked(Path(data)) as file:
            return isinstance(json.loads(file.read().decode(errors="replace")), dict)
    except ValueError:
        return False


def _looks_like_a_path(data: str) -> bool:
    """Names of data sets have at most one slash and nothing of these."""
    return data.startswith((".", "/", "~")) or data.count("/") > 1 or "\\" in data


def _check_folder(data: str, path: Path) -> None:
    if (path / FILE_NAME).is_file() and (path / "parts").is_dir():
        raise refusal(data, "it holds no examples; this looks like an index of Etymon")
    if _holds_model(path):
        reason = "it holds no examples; this looks like a model"
        raise refusal(data, reason, "Give the texts that it was trained on.")


def _holds_model(folder: Path) -> bool:
    if any(True for pattern in MODEL_FILES for _ in folder.glob(pattern)):
        return True
    try:
        found = json.loads((folder / "config.json").read_text(errors="replace"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and bool({"model_type", "architectures"} & set(found))


def _check_kind(data: str, path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix in PACKED:
        raise refusal(data, "the file is packed", "Unpack it first.")
    if not suffix_of(data):
        named = f"'{suffix}' is none that is read" if suffix else "this name has none"
        raise refusal(data, f"the ending of a file's name tells its kind, and {named}", KINDS)


def _check_beginning(data: str, path: Path) -> None:
    """Refuse what can be seen without reading all of it."""
    try:
        with unpacked(path) as file:
            beginning = file.read(1 << 16)
    except (OSError, EOFError, LZMAError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise refusal(data, f"{reason[:1].lower()}{reason[1:]}".rstrip(".")) from error
    if not beginning or (len(beginning) < 1 << 16 and not beginning.strip()):
        raise refusal(data, NO_EXAMPLES)
    if path.suffix.lower() == ".parquet":
        _check_parquet(data, path)
    elif beginning.startswith(WIDE):
        raise refusal(data, "its text is in UTF-16 or UTF-32", "Save it as UTF-8.")


def _check_parquet(data: str, path: Path) -> None:
    try:
        rows = pq.read_metadata(path).num_rows
    except (OSError, ValueError) as error:
        reason = "it is no Parquet file, or not all of one"
        raise refusal(data, reason, "Write or download it again.") from error
    if not rows:
        raise refusal(data, NO_EXAMPLES)


def _first_fault(path: Path) -> str | None:
    """The first line that is not an object of JSON or holds a text that is none, and why."""
    if begins_with_array(path):
        try:
            with unpacked(path) as file:
                json.loads(file.read().decode("utf-8-sig", errors="replace"))
        except json.JSONDecodeError as error:
            return _broken(error.lineno, error)
        return None
    return next(_faults(path), None)


def _faults(path: Path) -> Iterator[str]:
    for row, (number, value) in enumerate(_values(path)):
        if isinstance(value, json.JSONDecodeError):
            yield _broken(number, value)
        elif not isinstance(value, dict):
            yield f"line {number} is {kind_of(value)}, expected an object with columns"
        elif half := _half_pair(value):
            yield f"row {row} (line {number}) holds {half}"


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    """What stands on each line that is not blank, or why it is not JSON, with the line's number.

    Of an array its rows, whose lines are not known.
    """
    with unpacked(path) as raw:
        file = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace", newline="\n")
        if begins_with_array(path):
            yield from ((0, value) for value in json.load(file))
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line, strict=False)
                except json.JSONDecodeError as error:
                    yield number, error


def _broken(number: int, error: json.JSONDecodeError) -> str:
    where = f"{error.msg.removesuffix(' at')} at character {error.colno}"
    return f"line {number} is not JSON ({where}). Correct the line or remove it"


def _half_pair(value: object) -> str | None:
    """The half of a surrogate pair that a text in ``value`` holds, in words."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        return f"{half}, half of a surrogate pair, which is no character"
    return None


def kind_of(value: Any) -> str:
    """What a value that should be a text is instead, in words."""
    if isinstance(value, bool):
        return "true or false"
    words = {int: "a number", float: "a number", list: "a list", dict: "an object", str: "a text"}
    return words.get(type(value), f"a value of type {type(value).__name__}")
