import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]

LAYOUT_FIELDS: tuple[str, ...]
RULE_FIELDS: tuple[str, ...]
STAT_FIELDS: tuple[str, ...]
ZAP_RULE_FIELDS: tuple[str, ...]
ZAP_STAT_FIELDS: tuple[str, ...]
HELPERS: tuple[str, ...]
MEMMAP_CONSTANTS: dict[str, int]
SWAP_CONSTANTS: dict[str, int]
SWP_KINDS: tuple[str, ...]
RESULTS: dict[str, int]
SIMD_LEVELS: dict[str, int]
SIMD_SUPPORTED: tuple[str, ...]
MAX_THREADS: int

def mark_words(nr_pages: int) -> int: ...
def py_folio_pte_batch(
    table: U64,
    idx: int,
    pte: int,
    max_nr: int,
    folio_end: int,
    layout: U64,
    respect_dirty: bool,
    respect_soft_dirty: bool,
    respect_write: bool,
    clamp: bool,
) -> tuple[int, bool, bool, bool, int]: ...
def py_wrprotect_ptes(table: U64, idx: int, nr: int, layout: U64) -> None: ...
def py_set_ptes(
    table: U64, idx: int, pte: int, nr: int, layout: U64, words: U64, aux: U64, top: I32, sub: I32
) -> None: ...
def py_copy_present_ptes(
    dst: U64,
    src: U64,
    idx: int,
    max_nr: int,
    layout: U64,
    rules: U64,
    words: U64,
    aux: U64,
    top: I32,
    sub: I32,
    rss: I64,
    stats: I64,
    prealloc: int | None,
) -> tuple[int, bool, int, bool]: ...
def py_copy_nonpresent_pte(
    dst: U64,
    src: U64,
    idx: int,
    layout: U64,
    rules: U64,
    words: U64,
    aux: U64,
    top: I32,
    sub: I32,
    slots: U64,
    counts: I64,
    rss: I64,
    stats: I64,
    allocations: int,
) -> tuple[int, int, int, bool]: ...
def py_copy_page_range(
    dst: U64,
    src: U64,
    vpns: I64,
    dst_row: int,
    src_row: int,
    nr_rows: int,
    start: int,
    end: int,
    layout: U64,
    rules: U64,
    words: U64,
    aux: U64,
    top: I32,
    sub: I32,
    slots: U64,
    counts: I64,
    pool: U64,
    rss: I64,
    stats: I64,
    state: I64,
    fast: U64,
    marks: U64,
) -> tuple[int, int, bool, int]: ...
def py_check_range(
    table: U64,
    vpns: I64,
    first_row: int,
    nr_rows: int,
    start: int,
    end: int,
    layout: U64,
    words: U64,
    aux: U64,
    top: I32,
    sub: I32,
    as_kernel: bool,
    kinds: int,
    kinds_high: int,
    fast: U64,
    marks: U64,
) -> tuple[int, int, int, int]: ...
def py_wrprotect_range(
    table: U64,
    vpns: I64,
    first_row: int,
    nr_rows: int,
    start: int,
    end: int,
    batching: bool,
    clamp: bool,
    layout: U64,
    words: U64,
    aux: U64,
    top: I32,
    sub: I32,
    stats: I64,
    fast: U64,
) -> tuple[int, int, int]: ...
def py_clear_full_ptes(table: U64, idx: int, nr: int, layout: U64) -> int: ...
def py_zap_range(
    table: U64,
    vpns: I64,
    first_row: int,
    nr_rows: int,
    start: int,
    end: int,
    once: bool,
    layout: U64,
    rules: U64,
    words: U64,
    aux: U64,
    top: I32,
    sub: I32,
    slots: U64,
    counts: I64,
    rss: I64,
    stats: I64,
) -> tuple[int, int, int, int | None]: ...
def py_apply_helper(helper: int, values: U64, arg: int, out: U64, layout: U64) -> None: ...
