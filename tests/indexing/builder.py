"""Builds an index in a process of its own: ``python -m tests.indexing.builder HOW INPUTS``.

``share`` builds the shards of the second of two workers and prints "ready" before it begins;
``halted`` prints "one shard" when the first is on disk, and goes no further.
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from service.corpus.source import CorpusSource
from service.indexing.building import BuildOptions, Worker, build_index, build_share
from service.models import load_model

T = TypeVar("T")


def stop_after_one(description: str, items: Iterable[T]) -> Iterator[T]:
    """Hand on all items, but of shards only the first."""
    for number, item in enumerate(items):
        if description == "index" and number == 1:
            print("one shard", flush=True)
            time.sleep(600)
        yield item


def main(how: str, given: dict[str, str], options: BuildOptions) -> None:
    """Build as told."""
    folder, factors = Path(given["folder"]), Path(given["factors"])
    loaded = load_model(given["model"])
    source = CorpusSource(data=given["corpus"], id_column="id")
    if how == "share":
        print("ready", flush=True)
        build_share(folder, loaded, factors, source, options, Worker(number=1, count=2))
    else:
        build_index(folder, loaded, factors, source, options, stop_after_one)


if __name__ == "__main__":
    inputs = json.loads(sys.argv[2])
    main(sys.argv[1], inputs, BuildOptions(**inputs.pop("options")))
