"""Which of several finished indexes is served: a root folder's file CURRENT names one of them."""

from pathlib import Path

from index.errors import IndexMissing
from index.files import write_whole

CURRENT = "CURRENT"


def current_folder(root: Path) -> Path:
    """The folder of the index to serve: what ``root/CURRENT`` names, or ``root`` itself.

    Raises:
        IndexMissing: the file names something that is not a folder in ``root``.
    """
    pointer = root / CURRENT
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return root
    if not name or Path(name).name != name or name in (".", "..") or not (root / name).is_dir():
        raise IndexMissing(
            f"{pointer} names '{name}', which is no folder beside it; write the name of an index "
            f"folder in {root} into it."
        )
    return root / name


def point_to(root: Path, name: str) -> None:
    """Make the index in ``root/name`` the current one, at once or not at all.

    Raises:
        IndexMissing: there is no such folder.
    """
    if Path(name).name != name or not (root / name).is_dir():
        raise IndexMissing(f"There is no folder '{name}' in {root}; name one that holds an index.")
    write_whole(root / CURRENT, f"{name}\n".encode())
