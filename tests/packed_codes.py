"""The rows of packed one-bit codes, read one byte at a time from their documented layout."""

import numpy as np

BLOCK, PIECE_BYTES = 32, 256


def unpack(packed: np.ndarray, rows: int) -> np.ndarray:
    """Codes by row: bits in order of dimension, then four bytes of the factor.

    The bytes of a piece of a block: 32 for every eight dimensions, of which the first 16 hold the
    lower four bits and the others the upper four. Byte j of 16 has row ``order[j]`` in its lower
    half and row ``order[j] + 16`` in its upper one.
    """
    padded, size = packed.shape
    width = size - 4
    flat = packed.reshape(-1)
    codes = np.zeros((padded, size), dtype=np.uint8)
    order = [row + 8 * half for row in range(8) for half in range(2)]
    place = 0
    for start in range(0, width, PIECE_BYTES):
        for block in range(0, padded, BLOCK):
            for byte in range(start, min(start + PIECE_BYTES, width)):
                for shift in (0, 4):
                    for row in order:
                        codes[block + row, byte] |= (flat[place] & 15) << shift
                        codes[block + row + 16, byte] |= (flat[place] >> 4) << shift
                        place += 1
    codes[:, width:] = flat[place:].reshape(padded, 4)
    assert not codes[rows:].any()
    return codes[:rows]
