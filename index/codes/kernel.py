"""FAISS's fast-scan kernel, which it exports from C++ but not to Python."""

import ctypes
import functools
import logging
from typing import Any

from index.codes.faiss_module import import_faiss

logger = logging.getLogger(__name__)


@functools.cache
def accumulate_to_mem() -> Any:
    """``faiss::accumulate_to_mem``, which FAISS exports from C++ but not to Python.

    void accumulate_to_mem(int nq, size_t ntotal2, int nsq, const uint8_t* codes,
    const uint8_t* LUT, uint16_t* accu)

    None, with a warning, where this build of FAISS has no such function: the name is that of Linux
    and macOS compilers, and nothing promises that FAISS keeps it.
    """
    faiss = import_faiss()
    try:
        library = ctypes.CDLL(faiss.swigfaiss._swigfaiss.__file__)
        function = library["_ZN5faiss17accumulate_to_memEimiPKhS1_Pt"]
    except (AttributeError, OSError) as error:
        logger.warning(
            "FAISS %s as installed here has no fast-scan kernel that can be called (%s); searches "
            "take many times as long.",
            faiss.__version__,
            error,
        )
        return None
    pointer = ctypes.c_void_p
    function.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int, pointer, pointer, pointer]
    function.restype = None
    return function
