"""Where a corpus comes from: which files are read, and why one cannot be."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from index.manifest import FILE_NAME

READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
}
"""The reader of the ``datasets`` library for each ending of a file's name, in small letters."""

COMPRESSED = (".bz2", ".gz", ".lz4", ".tar", ".xz", ".zip", ".zst")
WIDE = (b"\xff\xfe", b"\xfe\xff")
"""How a text in UTF-16 begins, and one in UTF-32."""

MODEL_FILES = ("*.safetensors", "pytorch_model*.bin", "adapter_config.json", "*.gguf")
NO_EXAMPLES = "there are no examples in it"
KINDS = f"Give a file ending in {', '.join(READERS)}, or the name of a data set."


def refusal(data: str, reason: str, advice: str = "") -> ValueError:
    """The error of a corpus that cannot be read: what was given, what is wrong, what to do."""
    return ValueError(f"Cannot read the corpus '{data}': {reason}. {advice}".rstrip())


def suffix_of(data: str) -> str:
    """The ending by which the file ``data`` is read, or "" if it is not the name of such a file."""
    path = Path(data)
    suffix = path.suffix.lower()
    return suffix if suffix in READERS and not path.is_dir() else ""


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
    """Refuse a JSON array with a text that is none; the library would drop what is wrong in it.

    Raises:
        ValueError: names the row.
    """
    content = path.read_bytes()
    if b"\\ud" not in content.lower():  # every other character can be in a text
        return
    try:
        rows = json.loads(content.decode(errors="replace"))
    except ValueError:
        return  # the library says so, too
    for number, row in enumerate(rows):
        if half := _half_pair(row):
            raise refusal(data, f"row {number} holds {half}")


def begins_with_array(path: Path) -> bool:
    """Whether a file of JSON is one array instead of an object a line."""
    with path.open("rb") as file:
        return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def is_one_object(data: str) -> bool:
    """Whether the file is .json and all of it is a single object."""
    if suffix_of(data) != ".json":
        return False
    try:
        return isinstance(json.loads(Path(data).read_bytes().decode(errors="replace")), dict)
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
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        raise refusal(
            data,
            "it was written by save_to_disk, which is not read",
            "Write it as Parquet: datasets.load_from_disk(FOLDER).to_parquet('corpus.parquet').",
        )


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
    if suffix in COMPRESSED:
        raise refusal(data, "the file is compressed", "Unpack it first.")
    if suffix not in READERS:
        named = f"'{suffix}' is none that is read" if suffix else "this name has none"
        raise refusal(data, f"the ending of a file's name tells its kind, and {named}", KINDS)


def _check_beginning(data: str, path: Path) -> None:
    """Refuse what can be seen without reading all of it."""
    try:
        with path.open("rb") as file:
            beginning = file.read(1 << 16)
    except OSError as error:
        raise refusal(data, str(error.strerror).lower()) from error
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
            json.loads(path.read_bytes().decode("utf-8-sig", errors="replace"))
        except json.JSONDecodeError as error:
            return _broken(error.lineno, error)
        return None
    return next(_faults(path), None)


def _faults(path: Path) -> Iterator[str]:
    row = 0
    with path.open(encoding="utf-8-sig", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line, strict=False)
            except json.JSONDecodeError as error:
                yield _broken(number, error)
            else:
                if not isinstance(value, dict):
                    yield f"line {number} is {kind_of(value)}, expected an object with columns"
                elif half := _half_pair(value):
                    yield f"row {row} (line {number}) holds {half}"
            row += 1


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
