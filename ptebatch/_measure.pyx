"""C kernels for measuring: the streaming limit, a plain C copy and one in the kernel's shape. Only ptebatch.bench and
ptebatch.peers use it.

What each kernel does is in measure.h. SIMD functions are called only at a level the CPU has; every index that comes out
of an entry is checked.
"""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t

cdef extern from "measure.h" nogil:
    const char *PTEBATCH_COMPILER
    const char *PTEBATCH_CFLAGS
    enum: SIMD_SCALAR, SIMD_AVX2, SIMD_AVX512
    enum: STREAM_PLAIN, STREAM_PREFETCH, STREAM_NONTEMPORAL
    bint simd_supported(int level)
    void stream_clear(uint64_t *src, size_t n, uint64_t a, int level, int variant)
    void stream(uint64_t *src, uint64_t *dst, size_t n, uint64_t a, uint64_t b, int level, int variant)
    struct plain_state:
        uint64_t *src
        uint64_t *dst
        size_t nr_ptes
        const int32_t *folio_of
        int32_t *mapcount
        uint8_t *exclusive
        size_t nr_pages
        const int64_t *folio_end
        int32_t *refcount
        uint64_t base, present, write, young, dirty, saved_dirty_shift, pfn_shift, pfn_mask, ptrs_per_pte
    size_t plain_copy_single(const plain_state *state)
    size_t plain_copy_batched(const plain_state *state)
    struct kernel_page:
        pass
    struct kernel_state:
        plain_state plain
        kernel_page *pages
        uint64_t dst_mm_id
        bint large_mapcount, mm_id, page_mapcount
    size_t kernel_copy_single(const kernel_state *state)
    size_t kernel_copy_batched(const kernel_state *state)

cdef extern from "_clock.h" nogil:
    int64_t now_ns()

cdef extern from *:
    int CYTHON_HEX_VERSION

COMPILER = PTEBATCH_COMPILER.decode()
CFLAGS = PTEBATCH_CFLAGS.decode()
CYTHON = f"{CYTHON_HEX_VERSION >> 24}.{CYTHON_HEX_VERSION >> 16 & 255}.{CYTHON_HEX_VERSION >> 8 & 255}"
SIMD_LEVELS = {"scalar": SIMD_SCALAR, "avx2": SIMD_AVX2, "avx512": SIMD_AVX512}
KERNEL_PAGE_BYTES = sizeof(kernel_page)
STREAM_VARIANTS = {"plain": STREAM_PLAIN, "prefetch": STREAM_PREFETCH, "non-temporal": STREAM_NONTEMPORAL}


def supported():
    """Names of the SIMD levels this CPU has, lowest first."""
    return tuple(name for name, level in SIMD_LEVELS.items() if simd_supported(level))


cdef int level_number(str level) except -1:
    cdef int number = SIMD_LEVELS[level]
    if not simd_supported(number):
        raise ValueError(f"this CPU has no {level}")
    return number


cdef int64_t streamed_ns = 0


def py_streamed_ns():
    """Time the streaming loops of this process took so far, measured inside, as `ptebatch.batch.core_ns` is."""
    return streamed_ns


def py_stream_clear(uint64_t[::1] src not None, uint64_t a, str level not None, str variant not None):
    """src &= ~a."""
    cdef int number = level_number(level), how = STREAM_VARIANTS[variant]
    if how == STREAM_NONTEMPORAL:
        raise ValueError("what is written is read before: it cannot be non-temporal")
    global streamed_ns
    cdef int64_t begin = now_ns()
    if src.shape[0]:
        with nogil:
            stream_clear(&src[0], src.shape[0], a, number, how)
    streamed_ns += now_ns() - begin


def py_stream(uint64_t[::1] src not None, uint64_t[::1] dst not None, uint64_t a, uint64_t b, str level not None,
              str variant not None):
    """src &= ~a; dst = src & ~b."""
    global streamed_ns
    cdef int number = level_number(level), how = STREAM_VARIANTS[variant]
    cdef int64_t begin = now_ns()
    if dst.shape[0] != src.shape[0]:
        raise ValueError("src and dst differ in length")
    if src.shape[0]:
        with nogil:
            stream(&src[0], &dst[0], src.shape[0], a, b, number, how)
    streamed_ns += now_ns() - begin


cdef plain_state with_entries(uint64_t[::1] src, uint64_t[::1] dst, const uint64_t[::1] words):
    cdef plain_state s
    s.src = &src[0]
    s.dst = &dst[0]
    s.nr_ptes = src.shape[0]
    s.base, s.present, s.write, s.young, s.dirty = words[0], words[1], words[2], words[3], words[4]
    s.saved_dirty_shift, s.pfn_shift, s.pfn_mask, s.ptrs_per_pte = words[5], words[6], words[7], words[8]
    s.folio_of = NULL
    s.mapcount = NULL
    s.exclusive = NULL
    s.nr_pages = 0
    s.folio_end = NULL
    s.refcount = NULL
    return s


def py_plain_copy(uint64_t[::1] src not None, uint64_t[::1] dst not None, const int32_t[::1] folio_of not None,
                  int32_t[::1] mapcount not None, uint8_t[::1] exclusive not None,
                  const int64_t[::1] folio_end not None, int32_t[::1] refcount not None,
                  const uint64_t[::1] words not None, bint batched):
    """Copy; returns how many entries were. words: base, present, write, young, dirty, saved_dirty_shift, pfn_shift,
    pfn_mask, ptrs_per_pte. The caller answers for folio_of and folio_end (ptebatch.peers.flatten makes them)."""
    cdef plain_state s
    cdef size_t done
    if (dst.shape[0] != src.shape[0] or mapcount.shape[0] != folio_of.shape[0] or words.shape[0] != 9
            or exclusive.shape[0] != folio_of.shape[0] or refcount.shape[0] != folio_end.shape[0]):
        raise ValueError("shapes differ")
    if not src.shape[0] or not folio_of.shape[0] or not refcount.shape[0]:
        return 0
    s = with_entries(src, dst, words)
    s.folio_of = &folio_of[0]
    s.mapcount = &mapcount[0]
    s.exclusive = &exclusive[0]
    s.nr_pages = folio_of.shape[0]
    s.folio_end = &folio_end[0]
    s.refcount = &refcount[0]
    with nogil:
        done = plain_copy_batched(&s) if batched else plain_copy_single(&s)
    return done


def py_kernel_copy(uint64_t[::1] src not None, uint64_t[::1] dst not None, uint8_t[::1] pages not None,
                   const uint64_t[::1] words not None, uint64_t dst_mm_id, bint large_mapcount, bint mm_id,
                   bint page_mapcount, bint batched):
    """Copy over kernel_page records; returns how many entries were. words as in py_plain_copy; the caller answers for
    what the records say of their folios (ptebatch.peers.kernel_pages makes them)."""
    cdef kernel_state s
    cdef size_t done
    if dst.shape[0] != src.shape[0] or words.shape[0] != 9 or pages.shape[0] % sizeof(kernel_page):
        raise ValueError("shapes differ")
    if not src.shape[0] or not pages.shape[0]:
        return 0
    if <size_t>&pages[0] % sizeof(kernel_page):
        raise ValueError("pages must be aligned to their size")
    s.plain = with_entries(src, dst, words)
    s.plain.nr_pages = pages.shape[0] // sizeof(kernel_page)
    s.pages = <kernel_page *>&pages[0]
    s.dst_mm_id = dst_mm_id
    s.large_mapcount, s.mm_id, s.page_mapcount = large_mapcount, mm_id, page_mapcount
    with nogil:
        done = kernel_copy_batched(&s) if batched else kernel_copy_single(&s)
    return done
