import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]

COMPILER: str
CFLAGS: str
CYTHON: str
SIMD_LEVELS: dict[str, int]
STREAM_VARIANTS: dict[str, int]
KERNEL_PAGE_BYTES: int

def supported() -> tuple[str, ...]: ...
def py_streamed_ns() -> int: ...
def py_stream_clear(src: U64, a: int, level: str, variant: str) -> None: ...
def py_stream(src: U64, dst: U64, a: int, b: int, level: str, variant: str) -> None: ...
def py_plain_copy(
    src: U64,
    dst: U64,
    folio_of: I32,
    mapcount: I32,
    exclusive: U8,
    folio_end: I64,
    refcount: I32,
    words: U64,
    batched: bool,
) -> int: ...
def py_kernel_copy(
    src: U64,
    dst: U64,
    pages: U8,
    words: U64,
    dst_mm_id: int,
    large_mapcount: bool,
    mm_id: bool,
    page_mapcount: bool,
    batched: bool,
) -> int: ...
