"""What can be wrong with an index.

IndexFault (ValueError)
|-- IndexMissing    no complete index, or no such row or id
|-- IndexCorrupt    a file is truncated, tampered with or of another format
|-- IndexMismatch   the index belongs to another model, tokenizer, estimator or corpus
|-- IndexBusy       another process is building in the folder
|-- DuplicateIds    two examples have the same id
`-- DiskFull        there is no room to write
"""


class IndexFault(ValueError):  # noqa: N818 - the tree is named for what is wrong
    """Base of all errors of this package."""


class IndexMissing(IndexFault):
    """There is no complete index in the folder, or no such row or id in the index."""


class IndexCorrupt(IndexFault):
    """A file of the index is truncated, tampered with or of another format."""


class IndexMismatch(IndexFault):
    """The index belongs to another model, tokenizer, estimator or corpus."""


class IndexBusy(IndexFault):
    """Another process is building in the folder."""


class DuplicateIds(IndexFault):
    """Two examples have the same id."""


class DiskFull(IndexFault):
    """There is no room on the disk."""
