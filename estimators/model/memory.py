"""Going on with smaller batches when memory runs out."""

import gc
import logging
from collections.abc import Callable, Sequence

import torch

logger = logging.getLogger(__name__)

_SAID_BY_ALLOCATORS = (
    "can't allocate memory",  # PyTorch's CPU allocator on Linux
    "not enough memory",  # the same on Windows
    "bad_alloc",  # C++ libraries below it
    "out of memory",  # CUDA calls beside PyTorch's own allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class OutOfMemory(RuntimeError):  # noqa: N818 - named for what is wrong
    """Not even one sequence fits into memory."""


class BackOff:
    """Runs work over batches in parts that fit into memory; one for each pass over sequences.

    A part that runs out of memory is done in halves, down to one sequence. The number of padded
    tokens that failed is remembered, so that later batches are cut before they fail. People are
    told once, through logging. A process that the system kills for its memory cannot be helped:
    this needs an allocation that fails (a GPU, a limit of the process, no overcommitment).

    Args:
        lengths: tokens of each sequence; batches are lists of positions in it.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths
        self._most: int | None = None

    def run(self, positions: Sequence[int], work: Callable[[Sequence[int]], None]) -> None:
        """Call ``work`` with ``positions``, or with parts of it that cover it in order.

        ``work`` must be safe to repeat for the two halves of a part that it failed on.

        Raises:
            OutOfMemory: one sequence alone does not fit.
        """
        tokens = self._padded(positions)
        if self._most is None or tokens <= self._most or len(positions) == 1:
            reason = _attempt(positions, work)
            if reason is None:
                return
            _free()  # outside the handler, whose traceback keeps tensors alive
            self._back_off(len(positions), tokens, reason)
        middle = len(positions) // 2
        self.run(positions[:middle], work)
        self.run(positions[middle:], work)

    def _back_off(self, sequences: int, tokens: int, reason: str) -> None:
        if sequences == 1:
            raise OutOfMemory(
                f"Not enough memory for one sequence of {tokens} tokens ({reason}). Cut texts into "
                f"shorter windows (--max-tokens), attribute fewer layers (--layers) or use a "
                f"device with more memory."
            )
        if self._most is None:
            logger.warning(
                "Out of memory with %d padded tokens a batch; going on with smaller batches. A "
                "smaller --token-budget avoids the lost time.",
                tokens,
            )
        self._most = max(1, tokens // 2)

    def _padded(self, positions: Sequence[int]) -> int:
        return len(positions) * max((self._lengths[p] for p in positions), default=0)


def ran_out(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and any(text in said for text in _SAID_BY_ALLOCATORS)


def _attempt(positions: Sequence[int], work: Callable[[Sequence[int]], None]) -> str | None:
    """Do the work; the reason if memory ran out, other errors as they are."""
    try:
        work(positions)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        return str(error).split("\n")[0] or type(error).__name__
    return None


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
