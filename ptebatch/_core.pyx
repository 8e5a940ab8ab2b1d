"""The hot loops of fork()'s page-table copy.

Design note
-----------
* One entry point per VMA: :func:`copy_page_range` walks every table of the range in one call, without the GIL.
  The other entries expose the primitives the walk is made of, over one table each.
* ``pte_layout`` and ``copy_rules`` are plain structs of 64-bit words, filled once per call from arrays whose field
  order is exported (``LAYOUT_FIELDS``, ``RULE_FIELDS``): the names live here, beside the structs, and nowhere else.
* Page tables are typed memoryviews, addressed by (row, idx): an entry's index in its table is part of its meaning.
  The memmap is reached through ``memmap``, raw pointers with their lengths: those indices come from page-table
  *contents*, so they are checked in every build, not only in the bounds-checked one.
* Counts cannot overflow their bit field. A folio's counters are checked before they change. The mapcounts of a large
  folio's pages are checked beforehand only where some count of the memmap is near the limit (``near_limit``, which the
  walk itself sets early enough); the common walk reads every page once.
* Counters that others imply (batches, single and batched entries, reference and rmap operations) are derived from
  the batch histogram when a call ends, so the loop itself counts little.
* Order-0 folios run the same code in batched and in single mode.

Order of this file: constants and structs, scalar helpers, loops, entries.
"""
from libc.errno cimport EAGAIN, EBUSY, EIO, ENOENT, ENOMEM
from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcmp, memcpy, memset

cdef extern from "<errno.h>" nogil:
    int EHWPOISON

cdef extern from "_clock.h" nogil:
    int64_t now_ns()

cdef extern from * nogil:
    """
    #if defined(__GNUC__) || defined(__clang__)
    #define PTEBATCH_PREFETCH(p) __builtin_prefetch((p), 1)
    #else
    #define PTEBATCH_PREFETCH(p) ((void)(p))
    #endif
    """
    void prefetch "PTEBATCH_PREFETCH"(const void *p)

cdef extern from "_lane.h" nogil:
    enum: LANE_OFF, LANE_SCALAR, LANE_AVX2, LANE_AVX512
    enum: LANE_PFN_SHIFT
    const uint64_t LANE_HALF_MAPCOUNT, LANE_HALF_COUNTER
    # The memmap word.
    enum: MAPCOUNT_BITS_, COUNTER_SHIFT_, COUNTER_BITS_, ORDER_SHIFT_, ORDER_BITS_, DEVICE_BIT_, AE_BIT_, ANON_BIT_
    enum: SWAPBACKED_BIT_, KSM_BIT_, HUGETLB_BIT_, PINNED_BIT_, HWPOISON_BIT_, VALID_BIT_
    enum: AUX_COUNT_BITS_, AUX_ID_BITS_, AUX_DIRTY_BIT_, AUX_LOCKED_BIT_, AUX_SHARED_BIT_, SECTION_SHIFT_, TOP_SHIFT_
    enum: INLINE_MIN_ORDER_, INLINE_MAX_ORDER_, INLINE_COUNT_BITS_
    # MM-ID slots, wherever they are.
    const uint64_t SLOT_COUNT, SLOT_ID, SLOT_SHARED
    struct mm_slots:
        uint64_t slot[2]
    bint slots_inline(uint64_t w)
    mm_slots load_mm_slots(const uint64_t *words, const uint64_t *aux, size_t head, bint inlined)
    void store_mm_slots(uint64_t *words, uint64_t *aux, size_t head, bint inlined, mm_slots s)
    struct lane_change:
        uint64_t keep, set, mask, value, then_keep, then_set
    enum: KEY_TYPE_SHIFT_, SWAP_MAP_MAX_, LANE_ORDERS
    struct lane_like:
        pass
    struct lane:
        uint64_t none_value, none_ignore, present, valid, special, pfn_mask, write, writable, inverted
        lane_change wrprotect, mkwrite, norm
        uint64_t child_keep, child_set
        int level, cow, clamp, prefetch, batching, far, bypass
        size_t ptrs
        uint64_t *words
        uint64_t *aux
        size_t nr_words
        const int32_t *top
        const int32_t *sub
        size_t nr_top, nr_sub
        uint64_t extent_pfn, extent_len
        size_t extent_at
        uint64_t small_mask, small_value, large_mask
        int large_mapcount, mm_id, large_ok
        uint64_t page_mapcount, mm
        uint64_t swp_types, swp_type_mask, swp_offset_mask, swp_inverted, swp_exclusive, swp_keep
        int swp_type_shift, swp_offset_shift
        const uint64_t *slots
        int64_t *slot_counts
        size_t nr_slots
        lane_like (*likes)[2]
        int64_t *hist
        int64_t none, swapped, exclusive, reads, wrprotects, wrprotected
        int64_t rss[4]
        uint64_t mapcounts
    bint lane_supported(int level)
    void lane_settle_all(lane *l)
    size_t lane_run(lane *l, uint64_t *src, uint64_t *dst, size_t n, size_t left, size_t ahead)
    size_t lane_protect_run(lane *l, uint64_t *src, size_t n, size_t left, size_t ahead)
    size_t lane_check(const lane *l, const uint64_t *entries, size_t n)
    enum: LANE_THREADS
    size_t lane_mark_words(uint64_t extent_len)
    struct lane_rest:
        size_t from_slot "from"
        size_t until
    size_t lane_marks(const lane *l, const uint64_t *src, size_t n, size_t left, uint64_t *marks, size_t nr,
                      size_t nr_words)
    size_t lane_threads(lane *l, uint64_t *src, uint64_t *dst, size_t n, size_t left, const uint64_t *marks, size_t nr,
                        size_t nr_words, lane_rest **rests, size_t *nr_rests)


# ---------------------------------------------------------------------------------------------------------------------
# Constants and structs
# ---------------------------------------------------------------------------------------------------------------------

# Swap-type entries; ptebatch.arch.SWP_KINDS has the names and ptebatch.swap the numbers of the swap map.
cdef enum:
    SWP_SWAP, SWP_HWPOISON, SWP_MIGRATION_READ, SWP_MIGRATION_READ_EXCLUSIVE, SWP_MIGRATION_WRITE, SWP_DEVICE_WRITE,
    SWP_DEVICE_READ, SWP_DEVICE_EXCLUSIVE, SWP_DEVICE_EXCLUSIVE_WRITE, SWP_DEVICE_EXCLUSIVE_READ, SWP_MARKER
    SWP_TYPES = 32
    SWP_PTE_MARKER = 31
    PTE_MARKER_UFFD_WP = 1
    PTE_MARKER_POISONED = 2
    PTE_MARKER_GUARD = 4
    MAX_SWAP_COUNT_ = 0x7fffffff

SWP_KINDS = ("swap", "hwpoison", "migration read", "migration read-exclusive", "migration write", "device write",
             "device read", "device exclusive", "device exclusive write", "device exclusive read", "marker")
SWAP_CONSTANTS = {"KEY_TYPE_SHIFT": KEY_TYPE_SHIFT_, "SWAP_MAP_MAX": SWAP_MAP_MAX_, "MAX_SWAP_COUNT": MAX_SWAP_COUNT_}

# How many entries ahead of the walk the memmap is prefetched, and pages whose words share a cache line (log2).
cdef enum:
    PREFETCH_AHEAD = 64
    LINE_PAGES_SHIFT = 3
    PREFETCH_WORDS = 1 << 12  # a smaller memmap is in the cache anyway
    LANE_RETRY = 8  # entries checked one by one before the lane is asked again
    LANE_PATIENCE = 64  # most entries copied one by one before the lane is asked again

cdef uint64_t ONE = 1
cdef enum:
    GUP_PIN_COUNTING_BIAS = 1024

# Results of a walk that are not kernel errnos.
cdef enum:
    E_NO_PAGE = -1001       # a PFN that has no page in the memmap
    E_OVERFLOW = -1002      # a page or folio count reached its limit
    E_UNSUPPORTED = -1003   # a swap type that no kernel uses
    E_PREALLOC = -1004      # the pool of preallocated pages is empty
    E_GEOMETRY = -1005      # a folio that does not lie in the memmap as its order says
    E_SWAP_SLOT = -1006     # a swap slot that the swap map does not have yet
    E_SWAP_FULL = -1007     # a swap slot whose count reached its limit
    E_NOT_DEVICE = -1008    # a device-private entry of ordinary memory
    E_UNMAPPED = -1009      # more would be unmapped than is counted as mapped

ctypedef struct pte_step:
    # One change of an entry; ptebatch.arch.Step, with what it leaves in place of what it clears.
    uint64_t keep
    uint64_t set
    uint64_t mask       # where v & mask == value before,
    uint64_t value
    uint64_t then_keep  # this also
    uint64_t then_set

cdef struct pte_layout:
    uint64_t pfn_shift
    uint64_t pfn_mask
    uint64_t plain          # an entry without any of these bits stores its PFN inverted
    uint64_t none_value
    uint64_t none_ignore
    uint64_t present_mask   # present: one of these
    uint64_t present_need   # and all of these
    uint64_t valid
    uint64_t write
    uint64_t writable       # write, and what else counts as it
    uint64_t young
    uint64_t dirty          # dirty: one of these,
    uint64_t saved_dirty    # this,
    uint64_t dirty_mask     # or v & dirty_mask == dirty_value
    uint64_t dirty_value
    uint64_t soft_dirty
    uint64_t uffd_wp
    uint64_t special
    pte_step wrprotect
    pte_step ptep_set_wrprotect
    pte_step mkwrite
    pte_step mkwrite_shstk
    pte_step mkclean
    pte_step mkdirty
    pte_step mkold
    pte_step mkyoung
    pte_step mkuffd_wp
    pte_step mk_pte
    uint64_t set_ptes_clear
    uint64_t cont           # arm64 contpte: the bit of entries in folded blocks, 0 elsewhere
    uint64_t cont_ptes      # entries a block
    uint64_t cont_hint      # pte_batch_hint() knows of blocks
    uint64_t mkcont         # what pte_mkcont() sets
    uint64_t page_shift
    uint64_t swp_base
    uint64_t swp_type_shift
    uint64_t swp_type_bits
    uint64_t swp_offset_shift
    uint64_t swp_offset_bits
    uint64_t swp_offset_inverted
    uint64_t swp_pfn_bits
    uint64_t swp_exclusive
    uint64_t swp_soft_dirty
    uint64_t swp_uffd_wp
    const pte_layout *apart  # the same once more, for functions that are not inlined: see read_layout

LAYOUT_FIELDS = ("pfn_shift", "pfn_mask", "plain", "none_value", "none_ignore", "present_mask", "present_need", "valid",
                 "write", "writable", "young", "dirty", "saved_dirty", "dirty_mask", "dirty_value", "soft_dirty",
                 "uffd_wp", "special", "wrprotect", "ptep_set_wrprotect", "mkwrite", "mkwrite_shstk", "mkclean",
                 "mkdirty", "mkold", "mkyoung", "mkuffd_wp", "mk_pte", "set_ptes_clear", "cont", "cont_ptes",
                 "cont_hint", "mkcont", "page_shift", "swp_base",
                 "swp_type_shift", "swp_type_bits", "swp_offset_shift", "swp_offset_bits", "swp_offset_inverted",
                 "swp_pfn_bits", "swp_exclusive", "swp_soft_dirty", "swp_uffd_wp")

ctypedef struct copy_rules:
    uint64_t batching            # copy_present_ptes may batch
    uint64_t cow                 # is_cow_mapping(src_vma)
    uint64_t shared              # VM_SHARED in src_vma
    uint64_t src_shadow_stack    # VM_SHADOW_STACK in src_vma
    uint64_t respect_dirty
    uint64_t respect_soft_dirty
    uint64_t fpb_clamp
    uint64_t dst_uffd_wp         # userfaultfd_wp(dst_vma)
    uint64_t dst_write           # VM_WRITE in dst_vma
    uint64_t dst_shadow_stack
    uint64_t dst_prot            # dst_vma->vm_page_prot
    uint64_t has_pinned          # MMF_HAS_PINNED of the source mm
    uint64_t large_mapcount
    uint64_t mm_id               # MM-ID slots are maintained
    uint64_t page_mapcount       # per-page mapcount of large folios is maintained
    uint64_t copy_mc             # copying a poisoned page fails with -EHWPOISON
    uint64_t dst_mm_id
    uint64_t as_kernel           # a PFN without a page is vm_normal_page() == NULL, not an error
    uint64_t near_limit          # some mapcount in the memmap is within reach of its limit
    uint64_t dst_cow             # is_cow_mapping(dst_vma)
    uint64_t swp_kinds           # kind of swap types 0..15, four bits each
    uint64_t swp_kinds_high      # of types 16..31
    uint64_t swp_migration_read  # the type of a readable migration entry
    uint64_t swp_device_read     # and of a readable device-private one
    uint64_t markers             # PTE markers that every child gets
    uint64_t src_prot            # src_vma->vm_page_prot
    uint64_t src_write           # VM_WRITE in src_vma
    uint64_t src_can_write       # private, VM_WRITE and not PROT_NONE: an exclusive page may be made writable
    uint64_t src_uffd_wp
    uint64_t src_mm_id
    uint64_t single_device_exclusive

RULE_FIELDS = ("batching", "cow", "shared", "src_shadow_stack", "respect_dirty", "respect_soft_dirty", "fpb_clamp",
               "dst_uffd_wp", "dst_write", "dst_shadow_stack", "dst_prot", "has_pinned", "large_mapcount", "mm_id",
               "page_mapcount", "copy_mc", "dst_mm_id", "as_kernel", "near_limit", "dst_cow", "swp_kinds",
               "swp_kinds_high", "swp_migration_read", "swp_device_read", "markers", "src_prot", "src_write",
               "src_can_write", "src_uffd_wp", "src_mm_id", "single_device_exclusive")

# Where each counter lives in the stats array; the batch histogram follows, indexed by nr.
cdef enum:
    S_VMAS_COPIED, S_VMAS_SKIPPED, S_TABLES_ALLOCATED, S_PTES_NONE, S_PTES_PRESENT, S_PTES_SINGLE, S_PTES_BATCHED,
    S_BATCHES, S_FOLIO_REF_ADD, S_RMAP_DUP, S_PTEP_GET, S_WRPROTECT_PTES, S_PTES_WRPROTECTED, S_SET_PTES,
    S_EAGAIN_ROUNDS, S_COPIED_PAGES, S_ANON_EXCLUSIVE_CLEARED, S_SPECIAL_PTES, S_SWAP, S_MIGRATION,
    S_DEVICE_PRIVATE, S_DEVICE_EXCLUSIVE, S_HWPOISON, S_PTE_MARKERS, S_PMDS_COPIED,
    S_PMDS_SPLIT, S_TABLES_DEPOSITED, S_HUGETLB_ENTRIES, S_HUGETLB_COPIED, S_CONTPTE, S_CONTPTE_FOLDS,
    S_CONTPTE_UNFOLDS, N_STATS

STAT_FIELDS = ("vmas_copied", "vmas_skipped", "tables_allocated", "ptes_none", "ptes_present", "ptes_single",
               "ptes_batched", "batches", "folio_ref_add", "rmap_dup", "ptep_get", "wrprotect_ptes",
               "ptes_wrprotected", "set_ptes", "eagain_rounds", "copied_pages", "anon_exclusive_cleared",
               "special_ptes", "swap_entries", "migration_entries", "device_private_entries",
               "device_exclusive_entries", "hwpoison_entries", "pte_markers", "pmds_copied", "pmds_split",
               "tables_deposited", "hugetlb_entries", "hugetlb_copied", "contpte_reads", "contpte_folds",
               "contpte_unfolds")

ctypedef struct zap_rules:
    uint64_t batching            # zap_present_ptes may batch
    uint64_t fpb_clamp
    uint64_t large_mapcount
    uint64_t mm_id               # MM-ID slots are maintained
    uint64_t page_mapcount       # per-page mapcount of large folios is maintained
    uint64_t zap_mm_id           # of the mm that is unmapped from
    uint64_t even_cows           # pages of private anonymous memory go too
    uint64_t drop_markers        # PTE markers go too
    uint64_t vma_anonymous       # vma_is_anonymous(vma)
    uint64_t uffd_wp             # userfaultfd_wp(vma) and markers are to be left behind
    uint64_t uffd_wp_marker      # that marker
    uint64_t recency             # vma_has_recency(vma)
    uint64_t as_kernel           # a PFN without a page is vm_normal_page() == NULL, not an error
    uint64_t guard_markers
    uint64_t swp_kinds           # kind of swap types 0..15, four bits each
    uint64_t swp_kinds_high      # of types 16..31
    uint64_t single_device_exclusive

ZAP_RULE_FIELDS = ("batching", "fpb_clamp", "large_mapcount", "mm_id", "page_mapcount", "zap_mm_id", "even_cows",
                   "drop_markers", "vma_anonymous", "uffd_wp", "uffd_wp_marker", "recency", "as_kernel",
                   "guard_markers", "swp_kinds", "swp_kinds_high", "single_device_exclusive")

# Counters of a zap; the batch histogram follows as well.
cdef enum:
    Z_PTES_NONE, Z_PTES_PRESENT, Z_PTES_SINGLE, Z_PTES_BATCHED, Z_BATCHES, Z_PTES_SKIPPED, Z_SPECIAL_PTES, Z_PTEP_GET,
    Z_CLEAR_PTES, Z_RMAP_REMOVE, Z_FOLIO_PUT, Z_FOLIOS_FREED, Z_FOLIO_MARK_DIRTY, Z_FOLIO_MARK_ACCESSED,
    Z_UFFD_WP_MARKERS, Z_SWAP, Z_MIGRATION, Z_DEVICE_PRIVATE, Z_DEVICE_EXCLUSIVE, Z_HWPOISON, Z_PTE_MARKERS,
    Z_CONTPTE, Z_CONTPTE_FOLDS, Z_CONTPTE_UNFOLDS, N_ZAP_STATS

# Events of arm64 contpte, counted from S_CONTPTE and Z_CONTPTE on.
cdef enum:
    CONTPTE_READS, CONTPTE_FOLDS, CONTPTE_UNFOLDS, N_CONTPTE

ZAP_STAT_FIELDS = ("ptes_none", "ptes_present", "ptes_single", "ptes_batched", "batches", "ptes_skipped",
                   "special_ptes", "ptep_get", "clear_ptes", "rmap_remove", "folio_put", "folios_freed",
                   "folio_mark_dirty", "folio_mark_accessed", "uffd_wp_markers", "swap_entries", "migration_entries",
                   "device_private_entries", "device_exclusive_entries", "hwpoison_entries", "pte_markers",
                   "contpte_reads", "contpte_folds", "contpte_unfolds")

MEMMAP_CONSTANTS = {
    "MAPCOUNT_BITS": MAPCOUNT_BITS_, "COUNTER_SHIFT": COUNTER_SHIFT_, "COUNTER_BITS": COUNTER_BITS_,
    "ORDER_SHIFT": ORDER_SHIFT_, "ORDER_BITS": ORDER_BITS_, "DEVICE_BIT": DEVICE_BIT_, "AE_BIT": AE_BIT_,
    "ANON_BIT": ANON_BIT_, "SWAPBACKED_BIT": SWAPBACKED_BIT_, "KSM_BIT": KSM_BIT_, "HUGETLB_BIT": HUGETLB_BIT_,
    "PINNED_BIT": PINNED_BIT_, "HWPOISON_BIT": HWPOISON_BIT_, "VALID_BIT": VALID_BIT_,
    "AUX_COUNT_BITS": AUX_COUNT_BITS_, "AUX_ID_BITS": AUX_ID_BITS_, "AUX_DIRTY_BIT": AUX_DIRTY_BIT_,
    "AUX_LOCKED_BIT": AUX_LOCKED_BIT_, "AUX_SHARED_BIT": AUX_SHARED_BIT_,
    "INLINE_MIN_ORDER": INLINE_MIN_ORDER_, "INLINE_MAX_ORDER": INLINE_MAX_ORDER_,
    "INLINE_COUNT_BITS": INLINE_COUNT_BITS_,
    "SECTION_SHIFT": SECTION_SHIFT_, "TOP_SHIFT": TOP_SHIFT_,
}
SIMD_LEVELS = {"off": LANE_OFF, "scalar": LANE_SCALAR, "avx2": LANE_AVX2, "avx512": LANE_AVX512}
MAX_THREADS = LANE_THREADS
SIMD_SUPPORTED = tuple(name for name, level in SIMD_LEVELS.items() if lane_supported(level))
RESULTS = {"E_NO_PAGE": E_NO_PAGE, "E_OVERFLOW": E_OVERFLOW, "E_UNSUPPORTED": E_UNSUPPORTED,
           "E_PREALLOC": E_PREALLOC, "E_GEOMETRY": E_GEOMETRY, "E_SWAP_SLOT": E_SWAP_SLOT,
           "E_SWAP_FULL": E_SWAP_FULL, "E_NOT_DEVICE": E_NOT_DEVICE, "E_UNMAPPED": E_UNMAPPED}

ctypedef struct memmap:
    uint64_t *words
    uint64_t *aux
    Py_ssize_t nr_words
    const int32_t *top
    Py_ssize_t nr_top
    const int32_t *sub
    Py_ssize_t nr_sub

ctypedef struct swap_map:
    const uint64_t *slots  # keys, ascending
    int64_t *counts
    Py_ssize_t nr
    Py_ssize_t next        # where the slot after the last one looked up would be

ctypedef struct batch_scan:
    pte_step norm        # what the normaliser does
    uint64_t child_keep  # what the child's entry keeps and gets, once it is write-protected where it has to be
    uint64_t child_set
    Py_ssize_t folio_end  # entries from the first one to the end of its folio
    int clamp
    uint64_t any_write
    uint64_t any_young
    uint64_t any_dirty
    Py_ssize_t reads     # ptep_get() calls made by the scan
    Py_ssize_t nr        # of entries found by it, the first of which maps the page of this word
    Py_ssize_t page

ctypedef struct walk:
    uint64_t prealloc    # PFN in hand, NO_PFN if none
    uint64_t fail_pfn
    int64_t *stats
    int64_t *rss
    int64_t allocations  # that may still be made before one fails
    lane *fast           # its level is LANE_OFF where it has nothing to do
    Py_ssize_t end       # of what is copied, in slots of src from its first row on
    bint large           # the last page met is of a large folio whose MM-ID slots are kept
    uint64_t mapcounts   # OR of the mapcounts met in large folios

ctypedef struct zap_walk:
    uint64_t fail_pfn
    uint64_t lowest_freed  # PFN, NO_PFN if no folio was freed
    int32_t *sub           # memmap.sub, to be written
    int64_t *stats
    int64_t *rss
    bint large             # as in walk

cdef uint64_t NO_PFN = ~<uint64_t>0


# ---------------------------------------------------------------------------------------------------------------------
# Scalar helpers
# ---------------------------------------------------------------------------------------------------------------------

cdef inline bint pte_none(const pte_layout *L, uint64_t v) noexcept nogil:
    return (v & ~L.none_ignore) == L.none_value


cdef inline bint pte_present(const pte_layout *L, uint64_t v) noexcept nogil:
    return (v & L.present_mask) != 0 and not ~v & L.present_need


cdef inline bint pfn_inverted(const pte_layout *L, uint64_t v) noexcept nogil:
    # x86 stores the PFN of an entry the hardware must not follow inverted (L1TF).
    return v != 0 and not v & L.plain


cdef inline uint64_t pte_pfn(const pte_layout *L, uint64_t v) noexcept nogil:
    if pfn_inverted(L, v):
        v = ~v
    return (v & L.pfn_mask) >> L.pfn_shift


cdef inline uint64_t pfn_step(const pte_layout *L, uint64_t v) noexcept nogil:
    # What pte_advance_pfn() by one adds to the value, modulo 2^64.
    cdef uint64_t step = ONE << L.pfn_shift
    return 0 - step if pfn_inverted(L, v) else step


cdef inline uint64_t pte_advance_pfn(const pte_layout *L, uint64_t v, uint64_t n) noexcept nogil:
    return v + n * pfn_step(L, v)


cdef inline uint64_t changed(const pte_step *step, uint64_t v) noexcept nogil:
    cdef uint64_t out = (v & step.keep) | step.set
    return (out & step.then_keep) | step.then_set if (v & step.mask) == step.value else out


cdef inline uint64_t changed_in_row(const pte_step *step, uint64_t v) noexcept nogil:
    # The same for loops over entries: without a comparison of 64 bits, which plain SSE2 does not have.
    cdef uint64_t miss = (v & step.mask) ^ step.value
    miss = 0 - ((miss | (0 - miss)) >> 63)
    v = (v & step.keep) | step.set
    return (v & (step.then_keep | miss)) | (step.then_set & ~miss)


cdef inline uint64_t mk_pte(const pte_layout *L, uint64_t pfn, uint64_t prot) noexcept nogil:
    cdef uint64_t field = (pfn << L.pfn_shift) & L.pfn_mask
    if pfn_inverted(L, prot):
        field ^= L.pfn_mask
    return changed(&L.mk_pte, field | prot)


cdef inline bint pte_write(const pte_layout *L, uint64_t v) noexcept nogil:
    return (v & L.writable) != 0


cdef inline bint pte_young(const pte_layout *L, uint64_t v) noexcept nogil:
    return (v & L.young) != 0


cdef inline bint pte_dirty(const pte_layout *L, uint64_t v) noexcept nogil:
    return (v & (L.dirty | L.saved_dirty)) != 0 or (v & L.dirty_mask) == L.dirty_value


cdef inline uint64_t pte_wrprotect(const pte_layout *L, uint64_t v) noexcept nogil:
    return changed(&L.wrprotect, v)


cdef inline uint64_t pte_mkwrite(const pte_layout *L, uint64_t v, bint shadow_stack) noexcept nogil:
    return changed(&L.mkwrite_shstk, v) if shadow_stack else changed(&L.mkwrite, v)


cdef inline uint64_t pte_mkclean(const pte_layout *L, uint64_t v) noexcept nogil:
    return changed(&L.mkclean, v)


cdef inline uint64_t pte_mkdirty(const pte_layout *L, uint64_t v) noexcept nogil:
    return changed(&L.mkdirty, v)


cdef inline uint64_t pte_mkold(const pte_layout *L, uint64_t v) noexcept nogil:
    return changed(&L.mkold, v)


cdef inline uint64_t pte_mkuffd_wp(const pte_layout *L, uint64_t v) noexcept nogil:
    return changed(&L.mkuffd_wp, v)


cdef inline bint pte_valid_cont(const pte_layout *L, uint64_t v) noexcept nogil:
    return (v & L.cont) != 0 and (v & L.valid) != 0


cdef inline Py_ssize_t pte_batch_hint(const pte_layout *L, Py_ssize_t idx, uint64_t v) noexcept nogil:
    if not L.cont_hint or not pte_valid_cont(L, v):
        return 1
    return <Py_ssize_t>L.cont_ptes - (idx & <Py_ssize_t>(L.cont_ptes - 1))


cdef inline uint64_t as_set(const pte_layout *L, uint64_t v) noexcept nogil:
    # What set_ptes() stores for a value.
    return v & ~L.set_ptes_clear if L.set_ptes_clear and pte_present(L, v) else v


cdef inline uint64_t swp_type(const pte_layout *L, uint64_t v) noexcept nogil:
    return v >> L.swp_type_shift & ((ONE << L.swp_type_bits) - 1)


cdef inline uint64_t swp_offset(const pte_layout *L, uint64_t v) noexcept nogil:
    return ((v ^ (0 - L.swp_offset_inverted)) >> L.swp_offset_shift) & ((ONE << L.swp_offset_bits) - 1)


cdef inline uint64_t swp_pfn(const pte_layout *L, uint64_t v) noexcept nogil:
    v = swp_offset(L, v)
    return v & ((ONE << L.swp_pfn_bits) - 1) if L.swp_pfn_bits else v


cdef inline uint64_t swp_entry(const pte_layout *L, uint64_t type, uint64_t offset) noexcept nogil:
    offset ^= ((ONE << L.swp_offset_bits) - 1) & (0 - L.swp_offset_inverted)
    return L.swp_base | type << L.swp_type_shift | offset << L.swp_offset_shift


cdef inline int swp_kind(uint64_t kinds, uint64_t kinds_high, uint64_t type) noexcept nogil:
    # type < SWP_TYPES; four bits of kind for each.
    return (kinds_high if type >> 4 else kinds) >> ((type & 15) << 2) & 15


cdef void also(pte_step *step, const pte_step *more) noexcept nogil:
    """Let a step that has no condition yet be followed by another: one step that does both."""
    cdef uint64_t known = ~step.keep | step.set  # bits whose state the condition of `more` will meet
    step.mask = 0
    step.value = 1
    step.then_keep = ~<uint64_t>0
    step.then_set = 0
    if ~more.then_keep | more.then_set and not (more.value ^ step.set) & known & more.mask:
        step.mask = more.mask & ~known
        step.value = more.value & ~known
        step.then_keep = more.then_keep
        step.then_set = more.then_set
    step.keep &= more.keep
    step.set = (step.set & more.keep) | more.set


cdef void child_rules(const pte_layout *L, batch_scan *B, bint shared, bint uffd_wp) noexcept nogil:
    cdef pte_step child = L.mkold
    if shared:
        also(&child, &L.mkclean)
    B.child_keep = child.keep
    B.child_set = child.set
    if not uffd_wp:
        B.child_keep &= ~L.uffd_wp


cdef void scan_rules(const pte_layout *L, batch_scan *B, bint respect_dirty, bint respect_soft_dirty,
                     bint respect_write) noexcept nogil:
    # The comparison form of folio_pte_batch(): pte_mkold; pte_mkclean, pte_clear_soft_dirty and pte_wrprotect as asked.
    # Only the last of them has a condition, on bits that pte_mkold leaves alone.
    B.norm = L.mkold
    if not respect_dirty:
        also(&B.norm, &L.mkclean)
    if not respect_soft_dirty:
        B.norm.keep &= ~L.soft_dirty
    if not respect_write:
        also(&B.norm, &L.wrprotect)
    B.any_write = B.any_young = B.any_dirty = 0
    B.reads = 0


cdef inline uint64_t word_mapcount(uint64_t w) noexcept nogil:
    return w & ((ONE << MAPCOUNT_BITS_) - 1)


cdef inline uint64_t word_counter(uint64_t w) noexcept nogil:
    return (w >> COUNTER_SHIFT_) & ((ONE << COUNTER_BITS_) - 1)


cdef inline Py_ssize_t word_order(uint64_t w) noexcept nogil:
    return (w >> ORDER_SHIFT_) & ((ONE << ORDER_BITS_) - 1)


cdef inline int rss_counter(uint64_t w) noexcept nogil:
    # mm_counter(folio): MM_ANONPAGES, MM_SHMEMPAGES or MM_FILEPAGES
    if w >> ANON_BIT_ & 1:
        return 1
    return 3 if w >> SWAPBACKED_BIT_ & 1 else 0


# ---------------------------------------------------------------------------------------------------------------------
# Loops
# ---------------------------------------------------------------------------------------------------------------------

cdef inline Py_ssize_t sub_index(const memmap *M, uint64_t pfn) noexcept nogil:
    """Where `sub` has the section of a PFN, or -1. Every step is bounds-checked: the PFN comes out of a page table."""
    cdef uint64_t block = pfn >> TOP_SHIFT_
    cdef Py_ssize_t at
    cdef int32_t entry
    if block >= <uint64_t>M.nr_top:
        return -1
    entry = M.top[block]
    if entry < 0:
        return -1
    at = (<Py_ssize_t>entry << (TOP_SHIFT_ - SECTION_SHIFT_)) + <Py_ssize_t>(
        pfn >> SECTION_SHIFT_ & ((ONE << (TOP_SHIFT_ - SECTION_SHIFT_)) - 1))
    return at if at < M.nr_sub else -1


cdef inline int32_t section_entry(const memmap *M, uint64_t pfn) noexcept nogil:
    """`section << 1 | full` for a PFN, or -1."""
    cdef Py_ssize_t at = sub_index(M, pfn)
    return M.sub[at] if at >= 0 else -1


cdef inline Py_ssize_t page_index(const memmap *M, uint64_t pfn) noexcept nogil:
    """Where the word of a PFN lives, or -1."""
    cdef int32_t entry = section_entry(M, pfn)
    cdef Py_ssize_t at
    if entry < 0:
        return -1
    at = (<Py_ssize_t>(entry >> 1) << SECTION_SHIFT_) + <Py_ssize_t>(pfn & ((1 << SECTION_SHIFT_) - 1))
    return at if at < M.nr_words else -1


cdef inline Py_ssize_t prefetch_pages(const uint64_t[:, ::1] table, Py_ssize_t row, Py_ssize_t ahead, Py_ssize_t end,
                                      const pte_layout *L, const memmap *M, bint large) except -1 nogil:
    """Prefetch the words of the pages that entries ahead..end map, one cache line of words at a time, and among large
    folios the MM-ID slots at the start of each run; returns end."""
    cdef uint64_t line, last = ~<uint64_t>0
    cdef Py_ssize_t page
    while ahead < end:
        line = table[row, ahead] >> (L.pfn_shift + LINE_PAGES_SHIFT)
        if line != last:
            page = page_index(M, pte_pfn(L, table[row, ahead]))
            if page >= 0:
                prefetch(M.words + page)
                if large and line != last + 1:
                    prefetch(M.aux + page)
            last = line
        ahead += 1
    return end


cdef inline Py_ssize_t folio_head(const memmap *M, Py_ssize_t page, uint64_t pfn, uint64_t w) noexcept nogil:
    """Index of the head page's word, or E_GEOMETRY if the folio is not whole in the memmap."""
    cdef Py_ssize_t nr_pages = <Py_ssize_t>1 << word_order(w)
    cdef Py_ssize_t head = page - <Py_ssize_t>(pfn & <uint64_t>(nr_pages - 1))
    if head < 0 or head + nr_pages > M.nr_words:
        return E_GEOMETRY
    return head


# --- arm64 contpte: folded blocks; elsewhere L.cont is 0 and none of this happens -------------------------------------
# counts has the events CONTPTE_*. A block is aligned in its table, so that it never reaches out of it.

cdef Py_ssize_t contpte_gather(const uint64_t[:, ::1] table, Py_ssize_t row, Py_ssize_t idx, const pte_layout *L,
                               uint64_t *pte) except -1 nogil:
    """Give pte[0] the young and dirty state of all entries of the block."""
    cdef Py_ssize_t start = idx & -<Py_ssize_t>L.cont_ptes, k
    cdef bint dirty = False, young = False
    for k in range(start, start + <Py_ssize_t>L.cont_ptes):
        dirty = dirty or pte_dirty(L, table[row, k])
        young = young or pte_young(L, table[row, k])
    if dirty:
        pte[0] = pte_mkdirty(L, pte[0])
    if young:
        pte[0] = changed(&L.mkyoung, pte[0])
    return 0


cdef inline Py_ssize_t ptep_get(const uint64_t[:, ::1] table, Py_ssize_t row, Py_ssize_t idx, const pte_layout *L,
                                int64_t *counts, uint64_t *pte) except -1 nogil:
    """Read an entry; one of a folded block with the young and dirty bits of all of them."""
    cdef uint64_t got = table[row, idx]
    pte[0] = got
    if pte_valid_cont(L, got):
        contpte_gather(table, row, idx, L.apart, &got)
        pte[0] = got
        counts[CONTPTE_READS] += <int64_t>L.cont_ptes
    return 0


cdef Py_ssize_t contpte_convert(uint64_t[:, ::1] table, Py_ssize_t row, Py_ssize_t idx, uint64_t pte,
                                const pte_layout *L) except -1 nogil:
    """Write a whole block anew after pte, which is one of its entries, with or without L.cont."""
    cdef Py_ssize_t start = idx & -<Py_ssize_t>L.cont_ptes, k
    cdef uint64_t step = pfn_step(L, pte)
    pte -= (pte_pfn(L, pte) & (L.cont_ptes - 1)) * step
    contpte_gather(table, row, idx, L, &pte)
    for k in range(start, start + <Py_ssize_t>L.cont_ptes):
        table[row, k] = pte
        pte += step
    return 0


cdef Py_ssize_t contpte_unfold(uint64_t[:, ::1] table, Py_ssize_t row, Py_ssize_t idx, const pte_layout *L,
                               int64_t *counts) except -1 nogil:
    counts[CONTPTE_UNFOLDS] += 1
    return contpte_convert(table, row, idx, table[row, idx] & ~L.cont, L)


cdef Py_ssize_t contpte_try_unfold(uint64_t[:, ::1] table, Py_ssize_t row, Py_ssize_t idx, Py_ssize_t nr,
                                   const pte_layout *L, int64_t *counts) except -1 nogil:
    """Unfold what nr entries from idx do not cover whole: one entry's block, or those at both ends."""
    cdef Py_ssize_t size = <Py_ssize_t>L.cont_ptes, last = idx + nr - 1
    if (nr < size or idx & (size - 1)) and pte_valid_cont(L, table[row, idx]):
        contpte_unfold(table, row, idx, L, counts)
    if nr > 1 and (last + 1) & (size - 1) and pte_valid_cont(L, table[row, last]):
        contpte_unfold(table, row, last, L, counts)
    return 0


cdef Py_ssize_t contpte_try_fold(uint64_t[:, ::1] table, Py_ssize_t row, Py_ssize_t idx, uint64_t pte,
                                 const pte_layout *L, const memmap *M, int64_t *counts) except -1 nogil:
    """Fold the block whose last entry was just set, if all of it is alike but for young and dirty, and in one folio."""
    cdef uint64_t last = L.cont_ptes - 1, pfn = pte_pfn(L, pte), step = pfn_step(L, pte), expected, w
    cdef Py_ssize_t page, k
    if <uint64_t>idx & last != last or pfn & last != last or not pte & L.valid or pte & L.special:
        return 0
    page = page_index(M, pfn)
    w = M.words[page] if page >= 0 else 0
    if not w >> VALID_BIT_ or pfn & ((ONE << word_order(w)) - 1) < last:
        return 0
    expected = pte_mkold(L, pte_mkclean(L, pte)) - last * step
    for k in range(idx - <Py_ssize_t>last, idx + 1):
        if pte_mkold(L, pte_mkclean(L, table[row, k])) != expected:
            return 0
        expected += step
    counts[CONTPTE_FOLDS] += 1
    return contpte_convert(table, row, idx, pte | L.mkcont, L)


cdef Py_ssize_t contpte_set_ptes(uint64_t[:, ::1] table, Py_ssize_t row, Py_ssize_t idx, uint64_t pte, Py_ssize_t nr,
                                 const pte_layout *L, const memmap *M, int64_t *counts) except -1 nogil:
    """set_ptes(): a single entry may unfold its block and complete it again, blocks covered whole are folded."""
    cdef uint64_t step = pfn_step(L, pte), fold
    cdef Py_ssize_t size = <Py_ssize_t>L.cont_ptes, end = idx + nr, stop
    pte &= ~L.cont
    if nr == 1:
        contpte_try_unfold(table, row, idx, 1, L, counts)
        table[row, idx] = pte
        return contpte_try_fold(table, row, idx, pte, L, M, counts)
    while idx < end:
        stop = (idx | (size - 1)) + 1
        fold = 0 if stop > end or idx & (size - 1) or pte_pfn(L, pte) & (L.cont_ptes - 1) else L.mkcont
        while idx < stop and idx < end:
            table[row, idx] = pte | fold
            pte += step
            idx += 1
    return 0


cdef inline Py_ssize_t folio_pte_batch(const uint64_t[:, ::1] table, Py_ssize_t row, Py_ssize_t idx, uint64_t pte,
                                       Py_ssize_t max_nr, const pte_layout *L, batch_scan *B,
                                       int64_t *counts) except -1 nogil:
    """Entries from idx that are present, map consecutive pages of one folio and agree in every compared bit."""
    cdef uint64_t step = pfn_step(L, pte)
    cdef Py_ssize_t hint = pte_batch_hint(L, idx, pte)
    cdef uint64_t expected = changed(&B.norm, pte) + <uint64_t>(hint - 1) * step
    cdef pte_step norm = B.norm
    cdef uint64_t seen = 0, cur = 0, hw_dirty = 0
    cdef Py_ssize_t limit = max_nr if max_nr < B.folio_end else B.folio_end
    cdef Py_ssize_t nr = hint, reads = 0
    cdef bint fold = ~norm.then_keep | norm.then_set
    if not L.cont and not L.dirty_mask:
        while nr < limit:
            cur = table[row, idx + nr]
            expected += step
            if (changed(&norm, cur) if fold else (cur & norm.keep) | norm.set) != expected:
                break
            seen |= cur
            nr += 1
        reads = nr - 1 + (nr < limit)
    else:  # the same where entries come in blocks, or are dirty by more than one bit or another
        while nr < limit:
            ptep_get(table, row, idx + nr, L, counts, &cur)
            expected += step
            reads += 1
            if changed(&norm, cur) != expected:
                break
            seen |= cur
            hw_dirty |= (cur & L.dirty_mask) == L.dirty_value
            hint = pte_batch_hint(L, idx + nr, cur)
            expected += <uint64_t>(hint - 1) * step
            nr += hint
    if nr >= limit:
        # Before the clamp the scan learned of the folio's end only by reading the entry behind it.
        if not B.clamp and nr < max_nr:
            ptep_get(table, row, idx + nr, L, counts, &cur)
            reads += 1
        nr = limit  # a block may reach beyond what is asked for
    B.reads += reads
    if seen & L.writable:
        B.any_write = 1
    B.any_young = (seen & L.young) != 0
    B.any_dirty = (seen & (L.dirty | L.saved_dirty)) != 0 or hw_dirty != 0
    return nr


cdef inline Py_ssize_t wrprotect_ptes(uint64_t[:, ::1] table, Py_ssize_t row, Py_ssize_t idx, Py_ssize_t nr,
                                      const pte_layout *L, int64_t *counts) except -1 nogil:
    cdef pte_step step = L.ptep_set_wrprotect
    cdef Py_ssize_t k
    if L.cont:
        if nr > 1:
            contpte_try_unfold(table, row, idx, nr, L.apart, counts)
        elif table[row, idx] & L.cont:  # valid or not: only present entries come here
            contpte_unfold(table, row, idx, L.apart, counts)
    if nr == 1:
        table[row, idx] = changed(&step, table[row, idx])
        return 0
    for k in range(idx, idx + nr):
        table[row, k] = changed_in_row(&step, table[row, k])
    return 0


cdef inline Py_ssize_t set_ptes(uint64_t[:, ::1] table, Py_ssize_t row, Py_ssize_t idx, uint64_t pte, Py_ssize_t nr,
                                const pte_layout *L, const memmap *M, int64_t *counts) except -1 nogil:
    cdef uint64_t step = pfn_step(L, pte)
    cdef Py_ssize_t k
    pte = as_set(L, pte)
    if L.cont:
        return contpte_set_ptes(table, row, idx, pte, nr, L.apart, M, counts)
    for k in range(idx, idx + nr):
        table[row, k] = pte
        pte += step
    return 0


cdef inline bint folio_maybe_dma_pinned(const memmap *M, Py_ssize_t head, uint64_t w) noexcept nogil:
    # A small folio is judged by its references, and fork has taken its own before it asks.
    if word_order(w):
        return M.words[head] >> PINNED_BIT_ & 1
    return word_counter(w) + 1 >= GUP_PIN_COUNTING_BIAS


cdef inline void folio_add_mm_mapping(const memmap *M, Py_ssize_t head, bint inlined, uint64_t mm, uint64_t nr,
                                      uint64_t total) noexcept nogil:
    """MM-ID slots of a large folio when `mm` adds nr mappings; total is the large mapcount afterwards (v6.15)."""
    cdef uint64_t mine = mm << AUX_COUNT_BITS_
    cdef mm_slots s = load_mm_slots(M.words, M.aux, head, inlined)
    if s.slot[0] & SLOT_ID == mine:
        s.slot[0] += nr
    elif s.slot[1] & SLOT_ID == mine:
        s.slot[1] += nr
    elif not s.slot[0] & SLOT_ID:
        s.slot[0] |= mine | nr
        if total != nr:
            s.slot[0] |= SLOT_SHARED
    elif not s.slot[1] & SLOT_ID:
        s.slot[1] |= mine | nr
        s.slot[0] |= SLOT_SHARED
    store_mm_slots(M.words, M.aux, head, inlined, s)


cdef inline bint folio_is_full(const memmap *M, Py_ssize_t page, Py_ssize_t head, Py_ssize_t nr, uint64_t w, bint mm_id,
                               const copy_rules *R) noexcept nogil:
    """Whether nr more mappings of a folio, a page of which has the word w, would take a count out of its field."""
    cdef uint64_t room = ((ONE << COUNTER_BITS_) - 1) - <uint64_t>nr
    cdef uint64_t most = (ONE << MAPCOUNT_BITS_) - 1
    cdef mm_slots s
    cdef Py_ssize_t k
    if word_counter(M.words[head]) > room:
        return True
    if not word_order(w):
        return word_mapcount(M.words[page]) == most
    if R.large_mapcount and word_counter(M.words[head + 1]) > room:
        return True
    if mm_id:
        s = load_mm_slots(M.words, M.aux, head, slots_inline(w))
        if s.slot[0] & SLOT_COUNT > room or s.slot[1] & SLOT_COUNT > room:
            return True
    if R.near_limit and R.page_mapcount:
        for k in range(page, page + nr):
            if word_mapcount(M.words[k]) == most:
                return True
    return False


cdef inline Py_ssize_t folio_dup_ptes(const memmap *M, Py_ssize_t page, Py_ssize_t head, Py_ssize_t nr,
                                      const copy_rules *R, walk *W) noexcept nogil:
    """Reference and rmap work for nr pages of one folio: folio_ref_add() with folio_try_dup_anon_rmap_ptes() or
    folio_dup_file_rmap_ptes(). Returns 0, -EAGAIN (pinned and exclusive; nothing changed) or E_OVERFLOW."""
    cdef uint64_t *words = M.words
    cdef uint64_t w = words[page], exclusive = 0, mapcounts = 0
    cdef uint64_t clear = 0, add
    cdef bint large = word_order(w) != 0
    cdef bint mm_id = large and R.mm_id and not w >> HUGETLB_BIT_ & 1, inlined = slots_inline(w)
    cdef Py_ssize_t k
    W.large = mm_id and not inlined
    if folio_is_full(M, page, head, nr, w, mm_id, R):
        return E_OVERFLOW
    if w >> ANON_BIT_ & 1:
        clear = ONE << AE_BIT_
        if R.has_pinned and not w >> DEVICE_BIT_ & 1 and folio_maybe_dma_pinned(M, head, w):
            for k in range(page, page + nr):
                exclusive |= words[k]
            if exclusive & clear:
                return -EAGAIN
            exclusive = 0
    W.rss[rss_counter(w)] += nr
    if not large:
        words[page] = (w & ~clear) + (ONE << COUNTER_SHIFT_) + 1
        W.stats[S_ANON_EXCLUSIVE_CLEARED] += (w & clear) != 0
        return 0
    add = R.page_mapcount
    for k in range(page, page + nr):
        w = words[k]
        exclusive += (w & clear) >> AE_BIT_
        mapcounts |= w
        words[k] = (w & ~clear) + add
    W.mapcounts |= mapcounts
    W.stats[S_ANON_EXCLUSIVE_CLEARED] += <int64_t>exclusive
    words[head] += <uint64_t>nr << COUNTER_SHIFT_
    if R.large_mapcount:
        words[head + 1] += <uint64_t>nr << COUNTER_SHIFT_
        if mm_id:
            folio_add_mm_mapping(M, head, inlined, R.dst_mm_id, nr, word_counter(words[head + 1]))
    return 0


cdef inline Py_ssize_t copy_present_page(uint64_t[:, ::1] dst, Py_ssize_t drow, Py_ssize_t idx, uint64_t pte,
                                         uint64_t w, const pte_layout *L, const copy_rules *R, const memmap *M,
                                         walk *W) except -1 nogil:
    """Early copy of a pinned exclusive page into the preallocated one; the parent is left as it is."""
    cdef Py_ssize_t page
    if W.prealloc == NO_PFN:
        return -EAGAIN
    if R.copy_mc and w >> HWPOISON_BIT_ & 1:
        return -EHWPOISON
    page = page_index(M, W.prealloc)
    if page < 0:
        W.fail_pfn = W.prealloc
        return E_NO_PAGE
    M.words[page] = (ONE << VALID_BIT_ | ONE << ANON_BIT_ | ONE << SWAPBACKED_BIT_ | ONE << AE_BIT_
                     | ONE << COUNTER_SHIFT_ | 1)
    M.aux[page] = 0
    cdef uint64_t child = pte_mkdirty(L, mk_pte(L, W.prealloc, R.dst_prot))
    if R.dst_write:
        child = pte_mkwrite(L, child, R.dst_shadow_stack != 0)
    if R.dst_uffd_wp and pte & L.uffd_wp:
        child = pte_mkuffd_wp(L, child)
    set_ptes(dst, drow, idx, child, 1, L, M, W.stats + S_CONTPTE)
    W.prealloc = NO_PFN
    W.rss[1] += 1
    W.stats[S_COPIED_PAGES] += 1
    W.stats[N_STATS + 1] += 1
    return 1


cdef inline Py_ssize_t copy_present_ptes(uint64_t[:, ::1] dst, Py_ssize_t drow, uint64_t[:, ::1] src, Py_ssize_t srow,
                                         Py_ssize_t idx, uint64_t pte, Py_ssize_t max_nr, const pte_layout *L,
                                         const copy_rules *R, const memmap *M, batch_scan *B,
                                         walk *W) except -1 nogil:
    """Copy one present entry or one batch. Returns nr, -EAGAIN, -EHWPOISON or an E_ code."""
    cdef Py_ssize_t nr = 1, page = -1, head, ret
    cdef uint64_t pfn, w = 0, p = pte
    if pte & L.special:
        W.stats[S_SPECIAL_PTES] += 1
    else:
        pfn = pte_pfn(L, pte)
        page = page_index(M, pfn)
        if page >= 0:
            w = M.words[page]
        if not w >> VALID_BIT_:
            if not R.as_kernel:
                W.fail_pfn = pfn
                return E_NO_PAGE
            W.stats[S_SPECIAL_PTES] += 1
            page = -1
    if page >= 0:
        head = page
        if word_order(w):
            head = folio_head(M, page, pfn, w)
            if head < 0:
                W.fail_pfn = pfn
                return E_GEOMETRY
            if max_nr != 1 and W.prealloc == NO_PFN:
                B.folio_end = head + (<Py_ssize_t>1 << word_order(w)) - page
                B.any_write = 0
                B.reads = 0
                nr = folio_pte_batch(src, srow, idx, pte, max_nr, L, B, W.stats + S_CONTPTE)
                W.stats[S_PTEP_GET] += B.reads
                B.nr = nr
                B.page = page
                if B.any_write:
                    p = pte_mkwrite(L, p, R.src_shadow_stack != 0)
        ret = folio_dup_ptes(M, page, head, nr, R, W)
        if ret == -EAGAIN:
            # A batch is all or nothing, and without a page in hand there is nothing to copy into.
            return copy_present_page(dst, drow, idx, pte, w, L, R, M, W)
        if ret < 0:
            W.fail_pfn = pfn
            return ret
    if R.cow and pte_write(L, p):
        wrprotect_ptes(src, srow, idx, nr, L, W.stats + S_CONTPTE)
        p = pte_wrprotect(L, p)
        W.stats[S_WRPROTECT_PTES] += 1
        W.stats[S_PTES_WRPROTECTED] += nr
    p = (p & B.child_keep) | B.child_set
    set_ptes(dst, drow, idx, p, nr, L, M, W.stats + S_CONTPTE)
    W.stats[N_STATS + nr] += 1
    return nr


cdef Py_ssize_t swap_slot(swap_map *S, uint64_t key) noexcept nogil:
    """Index of a slot's count, or -1. Slots of neighbouring entries are mostly neighbours too, and slots lie close."""
    cdef Py_ssize_t low = 0, high = S.nr, middle
    cdef uint64_t guess
    if S.next >= S.nr or S.slots[S.next] != key:
        guess = key - S.slots[0] if S.nr else 0
        if guess < <uint64_t>S.nr and S.slots[guess] == key:
            low = high = <Py_ssize_t>guess
        while low < high:
            middle = low + ((high - low) >> 1)
            if S.slots[middle] < key:
                low = middle + 1
            else:
                high = middle
        if low >= S.nr or S.slots[low] != key:
            return -1
        S.next = low
    S.next += 1
    return S.next - 1


cdef bint swap_continued(const swap_map *S, Py_ssize_t at, uint64_t page_shift) noexcept nogil:
    """Whether some slot of the same page of the swap map already counts beyond what one byte of it holds."""
    cdef uint64_t page = S.slots[at] >> page_shift
    cdef Py_ssize_t k = at
    while k >= 0 and S.slots[k] >> page_shift == page:
        if S.counts[k] > SWAP_MAP_MAX_:
            return True
        k -= 1
    k = at + 1
    while k < S.nr and S.slots[k] >> page_shift == page:
        if S.counts[k] > SWAP_MAP_MAX_:
            return True
        k += 1
    return False


cdef Py_ssize_t swap_duplicate(swap_map *S, const pte_layout *L, uint64_t pte, walk *W) noexcept nogil:
    """One more reference to a swap slot: 0, -EIO (no memory for a continuation page) or an E_ code."""
    cdef Py_ssize_t at = swap_slot(S, swp_type(L, pte) << KEY_TYPE_SHIFT_ | swp_offset(L, pte))
    if at < 0:
        return E_SWAP_SLOT
    if S.counts[at] >= MAX_SWAP_COUNT_:
        return E_SWAP_FULL
    if S.counts[at] == SWAP_MAP_MAX_ and not swap_continued(S, at, L.page_shift):
        if W.allocations == 0:
            return -EIO
        W.allocations -= 1
    S.counts[at] += 1
    return 0


cdef Py_ssize_t restore_exclusive_pte(uint64_t[:, ::1] src, Py_ssize_t srow, Py_ssize_t idx, uint64_t pte, int kind,
                                      Py_ssize_t page, Py_ssize_t head, const pte_layout *L, const copy_rules *R,
                                      const memmap *M, walk *W) except -1 nogil:
    """The parent gets back a page that a device had for itself: 0 or E_OVERFLOW."""
    cdef uint64_t w = M.words[page], pte_new = pte_mkold(L, mk_pte(L, swp_pfn(L, pte), R.src_prot))
    cdef bint large = word_order(w) != 0
    cdef bint mm_id = large and R.mm_id and not w >> HUGETLB_BIT_ & 1
    if pte & L.swp_soft_dirty:
        pte_new |= L.soft_dirty
    if pte & L.swp_uffd_wp:
        pte_new = pte_mkuffd_wp(L, pte_new)
    if R.single_device_exclusive:
        # can_change_pte_writable(): nobody waits for a write fault, and the page is this mm's alone.
        if (R.src_can_write and w >> ANON_BIT_ & 1 and w >> AE_BIT_ & 1
                and not (R.src_uffd_wp and pte_new & L.uffd_wp)
                and not (R.respect_soft_dirty and not pte_new & L.soft_dirty)):
            if M.aux[head] >> AUX_DIRTY_BIT_ & 1:
                pte_new = pte_mkdirty(L, pte_new)
            pte_new = pte_mkwrite(L, pte_new, R.src_shadow_stack != 0)
    else:
        if kind == SWP_DEVICE_EXCLUSIVE_WRITE and not pte & L.swp_uffd_wp:
            pte_new = pte_mkdirty(L, pte_new)
            if R.src_write:
                pte_new = pte_mkwrite(L, pte_new, R.src_shadow_stack != 0)
        # Through v6.14 the mapping was not counted meanwhile.
        if folio_is_full(M, page, head, 1, w, mm_id, R):
            return E_OVERFLOW
        if not large or R.page_mapcount:
            M.words[page] += 1
        if large and R.large_mapcount:
            M.words[head + 1] += ONE << COUNTER_SHIFT_
            if mm_id:
                folio_add_mm_mapping(M, head, slots_inline(w), R.src_mm_id, 1, word_counter(M.words[head + 1]))
    set_ptes(src, srow, idx, pte_new, 1, L, M, W.stats + S_CONTPTE)
    return 0


cdef inline Py_ssize_t copy_swap_pte(uint64_t *dst, uint64_t *src, uint64_t pte, const pte_layout *L,
                                     const copy_rules *R, swap_map *S, walk *W) noexcept nogil:
    """Copy one entry, in the slot src, of a page that is swapped out: 0, -EIO or an E_ code."""
    cdef Py_ssize_t ret = swap_duplicate(S, L, pte, W)
    if ret:
        return ret
    if pte & L.swp_exclusive:
        pte &= ~L.swp_exclusive
        src[0] = pte
    W.rss[2] += 1
    W.stats[S_SWAP] += 1
    W.stats[S_PTEP_GET] += 1
    dst[0] = pte if R.dst_uffd_wp else pte & ~L.swp_uffd_wp
    return 0


cdef Py_ssize_t copy_nonpresent_pte(uint64_t[:, ::1] dst, Py_ssize_t drow, uint64_t[:, ::1] src, Py_ssize_t srow,
                                    Py_ssize_t idx, uint64_t pte, const pte_layout *L, const copy_rules *R,
                                    const memmap *M, swap_map *S, walk *W) except -1 nogil:
    """Copy one entry that is neither present nor none: 0, -ENOENT (present now), -EBUSY, -EIO or an E_ code."""
    cdef uint64_t type = swp_type(L, pte), child = pte, pfn, w
    cdef Py_ssize_t page, head, ret
    cdef int kind
    if type >= SWP_TYPES:
        return E_UNSUPPORTED
    kind = swp_kind(R.swp_kinds, R.swp_kinds_high, type)
    if kind == SWP_SWAP:
        return copy_swap_pte(&dst[drow, idx], &src[srow, idx], pte, L, R, S, W)
    if kind == SWP_MARKER:
        child = swp_offset(L, pte) & R.markers
        if child:
            dst[drow, idx] = swp_entry(L, SWP_PTE_MARKER, child)
        W.stats[S_PTE_MARKERS] += 1
        W.stats[S_PTEP_GET] += 1
        return 0
    elif kind == SWP_HWPOISON:
        W.stats[S_HWPOISON] += 1
    else:
        pfn = swp_pfn(L, pte)
        W.fail_pfn = pfn
        page = page_index(M, pfn)
        w = M.words[page] if page >= 0 else 0
        if not w >> VALID_BIT_:
            return E_NO_PAGE
        head = folio_head(M, page, pfn, w)
        if head < 0:
            return head
        if kind <= SWP_MIGRATION_WRITE:
            W.rss[rss_counter(w)] += 1
            W.stats[S_MIGRATION] += 1
            if kind != SWP_MIGRATION_READ and R.dst_cow:
                child = swp_entry(L, R.swp_migration_read, swp_offset(L, pte))
                child |= pte & (L.swp_soft_dirty | L.swp_uffd_wp)
                src[srow, idx] = child
        elif kind <= SWP_DEVICE_READ:
            if not w >> DEVICE_BIT_ & 1:
                return E_NOT_DEVICE
            ret = folio_dup_ptes(M, page, head, 1, R, W)
            if ret < 0:
                return ret
            W.stats[S_DEVICE_PRIVATE] += 1
            if kind == SWP_DEVICE_WRITE and R.dst_cow:
                child = swp_entry(L, R.swp_device_read, swp_offset(L, pte)) | (pte & L.swp_uffd_wp)
                src[srow, idx] = child
        else:
            if M.aux[head] >> AUX_LOCKED_BIT_ & 1:
                return -EBUSY
            ret = restore_exclusive_pte(src, srow, idx, pte, kind, page, head, L, R, M, W)
            if ret < 0:
                return ret
            W.stats[S_DEVICE_EXCLUSIVE] += 1
            W.stats[S_PTEP_GET] += 1
            return -ENOENT
    W.stats[S_PTEP_GET] += 1
    if not R.dst_uffd_wp:
        child &= ~L.swp_uffd_wp
    dst[drow, idx] = child
    return 0


cdef inline Py_ssize_t copy_pinned_pages(uint64_t[:, ::1] dst, Py_ssize_t drow, uint64_t[:, ::1] src, Py_ssize_t srow,
                                         Py_ssize_t *at, Py_ssize_t upto, const pte_layout *L, const copy_rules *R,
                                         const memmap *M, const batch_scan *B, const uint64_t[::1] pool,
                                         Py_ssize_t *used, walk *W) except -1 nogil:
    """Behind a pinned page at[0] that was copied, those of its batch that have to be copied too.

    For each of them what is left of the batch is found again, and that it cannot be shared: here that is counted only.
    Returns how many pages were copied, that one included; or -EHWPOISON or an E_ code, with at[0] at that page.
    """
    cdef Py_ssize_t first = at[0], nr = 1, ret
    cdef uint64_t w
    while nr < B.nr and first + nr < upto and used[0] < pool.shape[0] and W.allocations:
        w = M.words[B.page + nr]
        if not w >> AE_BIT_ & 1:
            break
        at[0] = first + nr
        W.allocations -= 1
        W.stats[S_EAGAIN_ROUNDS] += 1
        W.stats[S_PTEP_GET] += B.reads - nr
        W.prealloc = pool[used[0]]
        ret = copy_present_page(dst, drow, first + nr, src[srow, first + nr], w, L, R, M, W)
        if ret < 0:
            return ret
        used[0] += 1
        nr += 1
    at[0] = first
    return nr


cdef inline Py_ssize_t copy_pte_range(uint64_t[:, ::1] dst, Py_ssize_t drow, uint64_t[:, ::1] src, Py_ssize_t srow,
                                      Py_ssize_t *at, Py_ssize_t upto, Py_ssize_t end, const pte_layout *L,
                                      const copy_rules *R, const memmap *M, swap_map *S, batch_scan *B,
                                      const uint64_t[::1] pool, Py_ssize_t *used, walk *W) except -1 nogil:
    """Slots at[0]..upto of one table, whose batches may go on to end. at[0] follows the walk, so that a caller can
    resume it; where upto is end, it may come to lie in a later table, counted from the start of this one."""
    cdef Py_ssize_t idx = at[0], ret, max_nr, ahead = at[0], until, room, ran, retry = at[0], patience = 1
    cdef uint64_t pte, type
    while idx < upto:
        pte = src[srow, idx]
        if W.fast.level and upto == end and idx >= retry:
            room = W.end - srow * src.shape[1] - idx
            # Further tables only where none of them can lack memory.
            max_nr = room if W.allocations > room else end - idx
            ran = lane_run(W.fast, &src[srow, idx], &dst[drow, idx], max_nr, end - idx, room)
            idx += ran
            if idx >= end:
                break
            # Where the lane finds nothing to do time and again, it is asked less and less often.
            patience = 1 if ran else min(2 * patience, LANE_PATIENCE)
            retry = idx + patience
        pte = src[srow, idx]  # where the lane stopped
        if pte_none(L, pte):
            W.stats[S_PTES_NONE] += 1
            idx += 1
            continue
        at[0] = idx
        if not pte_present(L, pte):
            type = swp_type(L, pte)
            if type < SWP_TYPES and swp_kind(R.swp_kinds, R.swp_kinds_high, type) == SWP_SWAP:
                ret = copy_swap_pte(&dst[drow, idx], &src[srow, idx], pte, L, R, S, W)  # mostly, and at less cost
            else:
                ret = copy_nonpresent_pte(dst, drow, src, srow, idx, pte, L, R, M, S, W)
            # One read by this loop, and after -ENOENT the entry is read again. An entry to come back to is not counted.
            W.stats[S_PTEP_GET] += ret != E_SWAP_SLOT
            if ret == 0:
                idx += 1
                continue
            if ret != -ENOENT:
                # -EIO: the kernel asks for memory once more, now ready to wait for it; here that fails too.
                return -ENOMEM if ret == -EIO else ret
            pte = src[srow, idx]
        until = idx + PREFETCH_AHEAD if idx + PREFETCH_AHEAD < end else end
        if ahead < until:
            ahead = prefetch_pages(src, srow, ahead if ahead > idx else idx, until, L, M, W.large)
        if R.has_pinned and used[0] >= pool.shape[0]:
            return E_PREALLOC
        if L.cont:  # what was read says whether the entry is present, and no more than that
            ptep_get(src, srow, idx, L, W.stats + S_CONTPTE, &pte)
        max_nr = end - idx if R.batching else 1
        B.nr = 1
        ret = copy_present_ptes(dst, drow, src, srow, idx, pte, max_nr, L, R, M, B, W)
        if ret == -EAGAIN:
            if W.allocations == 0:
                W.stats[S_PTEP_GET] += 1
                return -ENOMEM
            W.allocations -= 1
            W.stats[S_EAGAIN_ROUNDS] += 1
            W.prealloc = pool[used[0]]
            ptep_get(src, srow, idx, L, W.stats + S_CONTPTE, &pte)
            ret = copy_present_ptes(dst, drow, src, srow, idx, pte, max_nr, L, R, M, B, W)
            if W.prealloc == NO_PFN:
                used[0] += 1
                if ret == 1 and not L.cont:
                    ret = copy_pinned_pages(dst, drow, src, srow, at, upto, L, R, M, B, pool, used, W)
                if B.nr > 1:
                    retry = at[0] + B.nr  # the lane would stop at every page of the folio
            W.prealloc = NO_PFN
        if ret < 0:
            W.stats[S_PTEP_GET] += ret == -EHWPOISON  # read, but no batch to count it by
            return ret
        idx += ret
    at[0] = idx
    return 0


cdef Py_ssize_t copy_by_threads(uint64_t[:, ::1] dst, Py_ssize_t drow, uint64_t[:, ::1] src, Py_ssize_t srow,
                                Py_ssize_t *at, Py_ssize_t end, const uint64_t[:, ::1] marks, const pte_layout *L,
                                const copy_rules *R, const memmap *M, swap_map *S, batch_scan *B,
                                const uint64_t[::1] pool, Py_ssize_t *used, walk *W) except -1 nogil:
    """Slots at[0].. of a table that ends at end, and of those behind it, as far as the marks say; a thread for each row
    of marks. at[0] follows as in copy_pte_range(); where threads cannot be used, it stays."""
    cdef Py_ssize_t ptrs = src.shape[1], begin = at[0], room = W.end - srow * ptrs - begin, last = W.end, ret = 0
    cdef Py_ssize_t row, idx, upto, ran
    cdef lane_rest *rests = NULL
    cdef size_t nr_rests = 0, k
    # No allocation may fail half-way, and for pages that may be pinned others are taken in the order of entries.
    if W.allocations <= room or R.has_pinned or not W.fast.level:
        return 0
    ran = lane_threads(W.fast, &src[srow, begin], &dst[drow, begin], room, end - begin, &marks[0, 0],
                       marks.shape[0], marks.shape[1], &rests, &nr_rests)
    try:
        for k in range(nr_rests):
            idx = begin + rests[k].from_slot
            upto = begin + rests[k].until
            W.end = srow * ptrs + upto
            while idx < upto and not ret:
                row = idx // ptrs
                at[0] = idx % ptrs
                ret = copy_pte_range(dst, drow + row, src, srow + row, at, min(upto - row * ptrs, ptrs),
                                     min(begin + room - row * ptrs, ptrs), L, R, M, S, B, pool, used, W)
                idx = row * ptrs + at[0]
            if ret:
                break
    finally:
        free(rests)
    W.end = last
    at[0] = idx if ret else begin + ran
    return ret


cdef inline void derive_stats(int64_t *stats, Py_ssize_t nr_hist) noexcept nogil:
    """Counters that the histogram and the few counted ones imply."""
    cdef Py_ssize_t nr
    cdef int64_t batched = 0, batches = 0
    for nr in range(2, nr_hist):
        batched += nr * stats[N_STATS + nr]
        batches += stats[N_STATS + nr]
    stats[S_PTES_SINGLE] = stats[N_STATS + 1]
    stats[S_PTES_BATCHED] = batched
    stats[S_PTES_PRESENT] = stats[S_PTES_SINGLE] + batched
    stats[S_BATCHES] = stats[S_PTES_SINGLE] + batches
    stats[S_SET_PTES] = stats[S_BATCHES]
    stats[S_FOLIO_REF_ADD] = stats[S_BATCHES] - stats[S_SPECIAL_PTES] - stats[S_COPIED_PAGES] + stats[S_DEVICE_PRIVATE]
    stats[S_RMAP_DUP] = stats[S_FOLIO_REF_ADD]


cdef inline int64_t main_loop_reads(const int64_t *stats, Py_ssize_t nr_hist) noexcept nogil:
    cdef Py_ssize_t nr
    cdef int64_t reads = stats[S_PTES_NONE] + stats[S_EAGAIN_ROUNDS]
    for nr in range(1, nr_hist):
        reads += stats[N_STATS + nr]
    return reads


cdef inline Py_ssize_t check_table(const uint64_t[:, ::1] table, Py_ssize_t row, Py_ssize_t *at, Py_ssize_t end,
                                   Py_ssize_t room, const pte_layout *L, const memmap *M, const lane *F,
                                   bint as_kernel, uint64_t kinds, uint64_t kinds_high,
                                   uint64_t *fail_pfn) except -1 nogil:
    """Read-only: every entry of one table that maps a page has it, and no swap type is unknown. As in copy_pte_range(),
    at[0] may come to lie in a later table, at most `room` slots from the start of this one."""
    cdef Py_ssize_t idx = at[0] - 1, page, ran, retry = at[0], patience = LANE_RETRY
    cdef uint64_t pte, pfn, type
    cdef int32_t entry
    cdef int kind
    while True:
        idx += 1
        if F.level and retry <= idx < end:
            ran = lane_check(F, &table[row, idx], room - idx)
            idx += ran
            patience = LANE_RETRY if ran else min(2 * patience, LANE_PATIENCE)
            retry = idx + patience
        if idx >= end:
            at[0] = idx
            return 0
        pte = table[row, idx]
        if pte_none(L, pte):
            continue
        if not pte_present(L, pte):
            type = swp_type(L, pte)
            if type >= SWP_TYPES:
                at[0] = idx
                return E_UNSUPPORTED
            kind = swp_kind(kinds, kinds_high, type)
            if kind < SWP_MIGRATION_READ or kind == SWP_MARKER:
                continue
            pfn = swp_pfn(L, pte)
        elif as_kernel or pte & L.special:
            continue
        else:
            pfn = pte_pfn(L, pte)
        entry = section_entry(M, pfn)
        if entry >= 0 and entry & 1:
            continue
        page = page_index(M, pfn)
        if page < 0 or not M.words[page] >> VALID_BIT_:
            at[0] = idx
            fail_pfn[0] = pfn
            return E_NO_PAGE


cdef inline void go_on(Py_ssize_t *row, Py_ssize_t *at, Py_ssize_t slots) noexcept nogil:
    """After slot at[0], counted from the start of this table: to the next table, or to where in a later one that is."""
    row[0] += at[0] // slots if at[0] > slots else 1
    at[0] = at[0] % slots if at[0] > slots else 0


cdef inline Py_ssize_t wrprotect_table(uint64_t[:, ::1] table, Py_ssize_t row, Py_ssize_t *at, Py_ssize_t end,
                                       Py_ssize_t room, bint batching, const pte_layout *L, const memmap *M,
                                       batch_scan *B, lane *F, int64_t *stats) except -1 nogil:
    """Write-protect present entries idx..end, one at a time or batch by batch. Non-present entries are passed over. As
    in copy_pte_range(), at[0] may come to lie in a later table, at most `room` slots from the start of this one."""
    cdef Py_ssize_t idx = at[0], nr, page, head, ran, retry = at[0], patience = 1
    cdef uint64_t pte, pfn, w
    cdef bint write
    while idx < end:
        pte = table[row, idx]
        if F.level and idx >= retry and (pte_present(L, pte) or pte_none(L, pte)):
            ran = lane_protect_run(F, &table[row, idx], room - idx, end - idx, room - idx)
            idx += ran
            if idx >= end:
                break
            patience = 1 if ran else min(2 * patience, LANE_PATIENCE)
            retry = idx + patience
        ptep_get(table, row, idx, L, stats + S_CONTPTE, &pte)
        stats[S_PTEP_GET] += 1
        if not pte_present(L, pte):
            stats[S_PTES_NONE] += pte_none(L, pte)
            idx += 1
            continue
        nr = 1
        write = pte_write(L, pte)
        if batching:
            pfn = pte_pfn(L, pte)
            page = -1 if pte & L.special else page_index(M, pfn)
            w = M.words[page] if page >= 0 else 0
            if not w >> VALID_BIT_:
                stats[S_SPECIAL_PTES] += 1
            elif word_order(w) and end - idx > 1:
                head = folio_head(M, page, pfn, w)
                if head < 0:
                    at[0] = idx
                    return E_GEOMETRY
                B.folio_end = head + (<Py_ssize_t>1 << word_order(w)) - page
                B.any_write = 0
                B.reads = 0
                nr = folio_pte_batch(table, row, idx, pte, end - idx, L, B, stats + S_CONTPTE)
                stats[S_PTEP_GET] += B.reads
                write = write or B.any_write != 0
        if write:
            wrprotect_ptes(table, row, idx, nr, L, stats + S_CONTPTE)
            stats[S_WRPROTECT_PTES] += 1
            stats[S_PTES_WRPROTECTED] += nr
        stats[N_STATS + nr] += 1
        idx += nr
    at[0] = idx
    return 0


# --- zap: clearing entries and giving back what they counted ---------------------------------------------------------

cdef inline Py_ssize_t clear_full_ptes(uint64_t[:, ::1] table, Py_ssize_t row, Py_ssize_t idx, Py_ssize_t nr,
                                       const pte_layout *L, int64_t *counts) except -1 nogil:
    cdef Py_ssize_t k
    if L.cont:
        contpte_try_unfold(table, row, idx, nr, L.apart, counts)
    for k in range(idx, idx + nr):
        table[row, k] = L.none_value
    return 0


cdef inline Py_ssize_t get_and_clear_full_ptes(uint64_t[:, ::1] table, Py_ssize_t row, Py_ssize_t idx, Py_ssize_t nr,
                                               const pte_layout *L, int64_t *counts,
                                               uint64_t *first) except -1 nogil:
    """As clear_full_ptes; first[0] is entry 0 with the dirty and young state of all of them."""
    cdef uint64_t pte, cur
    cdef bint dirty = False, young = False
    cdef Py_ssize_t k
    if L.cont:
        contpte_try_unfold(table, row, idx, nr, L.apart, counts)
    pte = table[row, idx]
    for k in range(idx + 1, idx + nr):
        cur = table[row, k]
        dirty = dirty or pte_dirty(L, cur)
        young = young or pte_young(L, cur)
    clear_full_ptes(table, row, idx, nr, L, counts)  # nothing is left to unfold
    if dirty:
        pte = pte_mkdirty(L, pte)
    if young:
        pte = changed(&L.mkyoung, pte)
    first[0] = pte
    return 0


cdef inline Py_ssize_t leave_uffd_wp_markers(uint64_t[:, ::1] table, Py_ssize_t row, Py_ssize_t idx, Py_ssize_t nr,
                                             const zap_rules *R, zap_walk *W) except -1 nogil:
    """Markers where the entries of a file mapping were uffd-wp (zap_install_uffd_wp_if_needed)."""
    cdef Py_ssize_t k
    for k in range(idx, idx + nr):
        table[row, k] = R.uffd_wp_marker
    W.stats[Z_UFFD_WP_MARKERS] += nr
    return 0


cdef inline void folio_sub_mm_mapping(const memmap *M, Py_ssize_t head, bint inlined, uint64_t mm, uint64_t nr,
                                      uint64_t total) noexcept nogil:
    """MM-ID slots of a large folio when `mm` takes nr mappings away; total is the large mapcount afterwards (v6.15)."""
    cdef uint64_t mine = mm << AUX_COUNT_BITS_
    cdef mm_slots s = load_mm_slots(M.words, M.aux, head, inlined)
    cdef Py_ssize_t k
    cdef bint left = False  # the mm has mappings left
    for k in range(2):
        if s.slot[k] & SLOT_ID == mine:
            left = s.slot[k] & SLOT_COUNT > nr
            s.slot[k] = s.slot[k] - nr if left else s.slot[k] & SLOT_SHARED
            break
    # One slot has every mapping that is left (an empty one: none is left).
    if not left and (s.slot[0] & SLOT_COUNT == total or s.slot[1] & SLOT_COUNT == total):
        s.slot[0] &= ~SLOT_SHARED
    store_mm_slots(M.words, M.aux, head, inlined, s)


cdef inline Py_ssize_t folio_remove_rmap_ptes(const memmap *M, Py_ssize_t page, Py_ssize_t head, Py_ssize_t nr,
                                              const zap_rules *R) noexcept nogil:
    """nr pages of one folio are mapped once less each: 0, or E_UNMAPPED and nothing changed."""
    cdef uint64_t *words = M.words
    cdef uint64_t w = words[page]
    cdef bint large = word_order(w) != 0
    cdef bint counted = not large or R.page_mapcount
    cdef Py_ssize_t k
    if large and R.large_mapcount and word_counter(words[head + 1]) < <uint64_t>nr:
        return E_UNMAPPED
    if counted:
        for k in range(page, page + nr):
            if not word_mapcount(words[k]):
                return E_UNMAPPED
        for k in range(page, page + nr):
            words[k] -= 1
    if large and R.large_mapcount:
        words[head + 1] -= <uint64_t>nr << COUNTER_SHIFT_
        if R.mm_id and not w >> HUGETLB_BIT_ & 1:
            folio_sub_mm_mapping(M, head, slots_inline(w), R.zap_mm_id, nr, word_counter(words[head + 1]))
    return 0


cdef inline void folio_put_refs(const memmap *M, Py_ssize_t head, uint64_t head_pfn, Py_ssize_t nr,
                                zap_walk *W) noexcept nogil:
    """Drop nr references, which the folio has; without any left it is freed."""
    cdef uint64_t w = M.words[head] - (<uint64_t>nr << COUNTER_SHIFT_)
    cdef Py_ssize_t nr_pages = <Py_ssize_t>1 << word_order(w), k = 0, at
    W.stats[Z_FOLIO_PUT] += 1
    M.words[head] = w
    # free_pages_prepare(): a poisoned page is never handed out again.
    if word_counter(w) or (nr_pages == 1 and w >> HWPOISON_BIT_ & 1):
        return
    memset(M.words + head, 0, nr_pages * sizeof(uint64_t))
    memset(M.aux + head, 0, nr_pages * sizeof(uint64_t))
    while k < nr_pages:
        at = sub_index(M, head_pfn + <uint64_t>k)
        if at >= 0:
            W.sub[at] &= ~1  # no longer full
        k += 1 << SECTION_SHIFT_
    W.stats[Z_FOLIOS_FREED] += 1
    if head_pfn < W.lowest_freed:
        W.lowest_freed = head_pfn


cdef inline Py_ssize_t unmap_pages(const memmap *M, Py_ssize_t page, Py_ssize_t head, uint64_t pfn, Py_ssize_t nr,
                                   bint rmap, const zap_rules *R, zap_walk *W) noexcept nogil:
    """Take away nr mappings (unless they were not counted) of a folio that has nr references to drop afterwards: 0, or
    E_UNMAPPED and nothing changed."""
    cdef Py_ssize_t ret
    W.fail_pfn = pfn
    if word_counter(M.words[head]) < <uint64_t>nr:
        return E_UNMAPPED
    if rmap:
        ret = folio_remove_rmap_ptes(M, page, head, nr, R)
        if ret:
            return ret
        W.stats[Z_RMAP_REMOVE] += 1
    return 0


cdef inline Py_ssize_t zap_present_ptes(uint64_t[:, ::1] table, Py_ssize_t row, Py_ssize_t idx, uint64_t pte,
                                        Py_ssize_t max_nr, const pte_layout *L, const zap_rules *R, const memmap *M,
                                        batch_scan *B, zap_walk *W) except -1 nogil:
    """Unmap one present entry or one batch. Returns nr or an E_ code; after one, nothing has changed."""
    cdef Py_ssize_t nr = 1, page = -1, head, ret
    cdef uint64_t pfn = pte_pfn(L, pte), w = 0, old = 0
    cdef bint normal = False
    if not pte & L.special:
        page = page_index(M, pfn)
        w = M.words[page] if page >= 0 else 0
        normal = w >> VALID_BIT_ & 1
        if not normal and not R.as_kernel:
            W.fail_pfn = pfn
            return E_NO_PAGE
    if not normal:
        clear_full_ptes(table, row, idx, 1, L, W.stats + Z_CONTPTE)
        W.stats[Z_SPECIAL_PTES] += 1
    else:
        if w >> ANON_BIT_ & 1 and not R.even_cows:
            W.stats[Z_PTES_SKIPPED] += 1
            return 1
        head = folio_head(M, page, pfn, w)
        if head < 0:
            W.fail_pfn = pfn
            return E_GEOMETRY
        if word_order(w) and max_nr != 1:
            B.folio_end = head + (<Py_ssize_t>1 << word_order(w)) - page
            B.reads = 0
            nr = folio_pte_batch(table, row, idx, pte, max_nr, L, B, W.stats + Z_CONTPTE)
            W.stats[Z_PTEP_GET] += B.reads
        W.large = word_order(w) != 0
        ret = unmap_pages(M, page, head, pfn, nr, True, R, W)
        if ret:
            return ret
        W.rss[rss_counter(w)] -= nr
        if w >> ANON_BIT_ & 1:
            clear_full_ptes(table, row, idx, nr, L, W.stats + Z_CONTPTE)
        else:
            get_and_clear_full_ptes(table, row, idx, nr, L, W.stats + Z_CONTPTE, &old)
            if pte_dirty(L, old):
                W.stats[Z_FOLIO_MARK_DIRTY] += 1
                M.aux[head] |= ONE << AUX_DIRTY_BIT_
            if pte_young(L, old) and R.recency:
                W.stats[Z_FOLIO_MARK_ACCESSED] += 1
        folio_put_refs(M, head, pfn - <uint64_t>(page - head), nr, W)
    W.stats[Z_CLEAR_PTES] += 1
    W.stats[N_ZAP_STATS + nr] += 1
    if R.uffd_wp and pte & L.uffd_wp:
        leave_uffd_wp_markers(table, row, idx, nr, R, W)
    return nr


cdef Py_ssize_t zap_nonpresent_pte(uint64_t[:, ::1] table, Py_ssize_t row, Py_ssize_t idx, uint64_t pte,
                                   const pte_layout *L, const zap_rules *R, const memmap *M, swap_map *S,
                                   zap_walk *W) except -1 nogil:
    """Take away one entry that is neither present nor none: 1, or an E_ code and nothing has changed."""
    cdef uint64_t type = swp_type(L, pte), marker = 0, pfn, w
    cdef Py_ssize_t page, head, at, ret
    cdef int kind
    cdef bint skip = False, rmap
    if type >= SWP_TYPES:
        return E_UNSUPPORTED
    kind = swp_kind(R.swp_kinds, R.swp_kinds_high, type)
    if kind == SWP_MARKER:
        marker = swp_offset(L, pte)
        if marker & PTE_MARKER_UFFD_WP:
            skip = not R.vma_anonymous and not R.drop_markers
        elif marker & PTE_MARKER_GUARD and R.guard_markers:
            skip = not R.drop_markers
        elif marker & PTE_MARKER_POISONED:
            skip = not R.even_cows
        W.stats[Z_PTE_MARKERS] += not skip
    elif kind == SWP_HWPOISON:
        skip = not R.even_cows
        W.stats[Z_HWPOISON] += not skip
    elif kind == SWP_SWAP:
        skip = not R.even_cows
        if not skip:
            at = swap_slot(S, type << KEY_TYPE_SHIFT_ | swp_offset(L, pte))
            if at < 0 or S.counts[at] < 1:
                return E_SWAP_SLOT
            S.counts[at] -= 1
            W.rss[2] -= 1
            W.stats[Z_SWAP] += 1
    else:
        pfn = swp_pfn(L, pte)
        W.fail_pfn = pfn
        page = page_index(M, pfn)
        w = M.words[page] if page >= 0 else 0
        if not w >> VALID_BIT_:
            return E_NO_PAGE
        head = folio_head(M, page, pfn, w)
        if head < 0:
            return head
        skip = w >> ANON_BIT_ & 1 and not R.even_cows
        if not skip and kind > SWP_MIGRATION_WRITE:
            rmap = kind <= SWP_DEVICE_READ or R.single_device_exclusive
            if kind <= SWP_DEVICE_READ and not w >> DEVICE_BIT_ & 1:
                return E_NOT_DEVICE
            ret = unmap_pages(M, page, head, pfn, 1, rmap, R, W)
            if ret:
                return ret
            folio_put_refs(M, head, pfn - <uint64_t>(page - head), 1, W)
        if not skip:
            W.rss[rss_counter(w)] -= 1
            W.stats[Z_MIGRATION if kind <= SWP_MIGRATION_WRITE else
                    Z_DEVICE_PRIVATE if kind <= SWP_DEVICE_READ else Z_DEVICE_EXCLUSIVE] += 1
    if skip:
        W.stats[Z_PTES_SKIPPED] += 1
        return 1
    clear_full_ptes(table, row, idx, 1, L, W.stats + Z_CONTPTE)
    if R.uffd_wp and (marker & PTE_MARKER_UFFD_WP if kind == SWP_MARKER else pte & L.swp_uffd_wp):
        leave_uffd_wp_markers(table, row, idx, 1, R, W)
    return 1


cdef inline Py_ssize_t zap_pte_range(uint64_t[:, ::1] table, Py_ssize_t row, Py_ssize_t *at, Py_ssize_t end,
                                     const pte_layout *L, const zap_rules *R, const memmap *M, swap_map *S,
                                     batch_scan *B, zap_walk *W) except -1 nogil:
    """Slots at[0]..end of one table; at[0] follows the walk."""
    cdef Py_ssize_t idx = at[0], ret, ahead = at[0], until
    cdef uint64_t pte
    while idx < end:
        until = idx + PREFETCH_AHEAD if idx + PREFETCH_AHEAD < end else end
        if ahead < until:
            ahead = prefetch_pages(table, row, ahead if ahead > idx else idx, until, L, M, W.large)
        ptep_get(table, row, idx, L, W.stats + Z_CONTPTE, &pte)
        W.stats[Z_PTEP_GET] += 1
        if pte_none(L, pte):
            W.stats[Z_PTES_NONE] += 1
            idx += 1
            continue
        at[0] = idx
        if pte_present(L, pte):
            ret = zap_present_ptes(table, row, idx, pte, end - idx if R.batching else 1, L, R, M, B, W)
        else:
            ret = zap_nonpresent_pte(table, row, idx, pte, L, R, M, S, W)
        if ret < 0:
            return ret
        idx += ret
    at[0] = idx
    return 0


cdef inline void derive_zap_stats(int64_t *stats, Py_ssize_t nr_hist) noexcept nogil:
    cdef Py_ssize_t nr
    stats[Z_PTES_SINGLE] = stats[Z_BATCHES] = stats[N_ZAP_STATS + 1]
    stats[Z_PTES_BATCHED] = 0
    for nr in range(2, nr_hist):
        stats[Z_PTES_BATCHED] += nr * stats[N_ZAP_STATS + nr]
        stats[Z_BATCHES] += stats[N_ZAP_STATS + nr]
    stats[Z_PTES_PRESENT] = stats[Z_PTES_SINGLE] + stats[Z_PTES_BATCHED]


# ---------------------------------------------------------------------------------------------------------------------
# Entries. ptebatch.batch is the only caller and has checked dtypes, shapes, ranges and overlap.
# ---------------------------------------------------------------------------------------------------------------------

# The structs come back by value: one whose address had left the caller would be reloaded after every store of the loop.
cdef pte_layout read_layout(const uint64_t[::1] values) except *:
    cdef pte_layout L
    cdef size_t size = sizeof(L) - sizeof(L.apart)
    if values.shape[0] * sizeof(uint64_t) != size:
        raise ValueError(f"{values.shape[0]} layout fields given, {size // 8} expected")
    memcpy(&L, &values[0], size)
    L.apart = <const pte_layout *>&values[0]  # without this field, which nothing asks for there
    return L


cdef copy_rules read_rules(const uint64_t[::1] values) except *:
    cdef copy_rules R
    if values.shape[0] * sizeof(uint64_t) != sizeof(R):
        raise ValueError(f"{values.shape[0]} rule fields given, {sizeof(R) // 8} expected")
    memcpy(&R, &values[0], sizeof(R))
    return R


cdef memmap view_memmap(uint64_t[::1] words, uint64_t[::1] aux, const int32_t[::1] top,
                        const int32_t[::1] sub) except *:
    cdef memmap M
    if aux.shape[0] < words.shape[0]:
        raise ValueError("aux is shorter than words")
    M.nr_words = words.shape[0]
    M.nr_top = top.shape[0]
    M.nr_sub = sub.shape[0]
    M.words = &words[0] if M.nr_words else NULL
    M.aux = &aux[0] if M.nr_words else NULL
    M.top = &top[0] if M.nr_top else NULL
    M.sub = &sub[0] if M.nr_sub else NULL
    return M


cdef swap_map view_swap(const uint64_t[::1] slots, int64_t[::1] counts) except *:
    cdef swap_map S
    if counts.shape[0] != slots.shape[0]:
        raise ValueError("one count for each slot")
    S.nr = slots.shape[0]
    S.slots = &slots[0] if S.nr else NULL
    S.counts = &counts[0] if S.nr else NULL
    S.next = 0
    return S


cdef int lane_memmap(lane *F, const memmap *M, const uint64_t[::1] fast) except -1:
    """The level and what the memmap is like; the extent comes from outside and is cut to the storage. Last are from how
    many words on they are far away, and from how many slots on the child's entries are written past the cache, which
    only copying asks."""
    if fast.shape[0] != 6 or fast[0] > LANE_AVX512 or not lane_supported(fast[0]):
        raise ValueError("no such SIMD level here")
    memset(F, 0, sizeof(F[0]))
    F.level = fast[0]
    F.words = M.words
    F.aux = M.aux
    F.nr_words = M.nr_words
    F.top = M.top
    F.sub = M.sub
    F.nr_top = M.nr_top
    F.nr_sub = M.nr_sub
    F.extent_pfn = fast[1]
    F.extent_at = fast[3]
    if fast[3] <= F.nr_words:
        F.extent_len = min(<size_t>fast[2], F.nr_words - <size_t>fast[3])
    F.prefetch = F.nr_words >= PREFETCH_WORDS
    F.far = F.nr_words >= fast[4]
    return 0


cdef lane_change as_change(const pte_step *step) noexcept nogil:
    cdef lane_change c
    c.keep = step.keep
    c.set = step.set
    c.mask = step.mask
    c.value = step.value
    c.then_keep = step.then_keep
    c.then_set = step.then_set
    return c


cdef void lane_entries(lane *F, const pte_layout *L) noexcept nogil:
    """How entries are written. The level becomes LANE_OFF where the lane does not know how."""
    cdef uint64_t pfns = L.pfn_mask >> LANE_PFN_SHIFT  # a field from there on, which carries nothing into what is above
    if (L.pfn_shift != LANE_PFN_SHIFT or pfns & (pfns + 1) or L.plain != L.valid and ~L.plain or L.present_need
            or not L.valid or L.valid & (L.valid - 1) or L.valid >> LANE_PFN_SHIFT or not L.valid & L.present_mask
            or L.set_ptes_clear or memcmp(&L.wrprotect, &L.ptep_set_wrprotect, sizeof(pte_step))):
        F.level = LANE_OFF
    F.none_value = L.none_value
    F.none_ignore = L.none_ignore
    F.present = L.present_mask
    F.valid = L.valid
    F.special = L.special
    F.pfn_mask = L.pfn_mask
    F.inverted = L.pfn_mask if L.plain == L.valid else 0
    F.write = L.write
    F.writable = L.writable
    F.wrprotect = as_change(&L.wrprotect)
    F.mkwrite = as_change(&L.mkwrite)


cdef void lane_swap_types(lane *F, const pte_layout *L, uint64_t kinds, uint64_t kinds_high) noexcept nogil:
    """How entries of pages that are swapped out are written: those of the types in front of all others."""
    while F.swp_types < SWP_TYPES and swp_kind(kinds, kinds_high, F.swp_types) == SWP_SWAP:
        F.swp_types += 1
    F.swp_type_shift = L.swp_type_shift
    F.swp_type_mask = (ONE << L.swp_type_bits) - 1
    F.swp_offset_shift = L.swp_offset_shift
    F.swp_offset_mask = (ONE << L.swp_offset_bits) - 1
    F.swp_inverted = 0 - <uint64_t>L.swp_offset_inverted
    F.swp_exclusive = L.swp_exclusive


cdef void lane_rules(lane *F, const pte_layout *L, const copy_rules *R, const batch_scan *B,
                     int64_t *stats) noexcept nogil:
    """How to copy; the level becomes LANE_OFF where the lane does not know how."""
    # A read-only dirty entry counts as writable on a CPU with shadow stacks: harmless to the lane where all of them end
    # up write-protected, but elsewhere it would have to tell entry 0 from the others.
    # Entries that come in blocks are folded and unfolded one block at a time.
    if R.src_shadow_stack or L.writable != L.write and not R.cow or not R.dst_mm_id or L.cont:
        F.level = LANE_OFF
    F.norm = as_change(&B.norm)
    F.child_keep = B.child_keep
    F.child_set = B.child_set
    F.cow = R.cow != 0
    F.clamp = B.clamp
    F.small_mask = (ONE << VALID_BIT_ | ((ONE << ORDER_BITS_) - 1) << ORDER_SHIFT_ | LANE_HALF_MAPCOUNT
                    | LANE_HALF_COUNTER)
    F.small_value = ONE << VALID_BIT_
    F.large_mask = LANE_HALF_COUNTER
    if R.has_pinned:
        # From half of GUP_PIN_COUNTING_BIAS references on, copy_present_ptes() looks closer.
        F.small_mask |= ((ONE << COUNTER_BITS_) - GUP_PIN_COUNTING_BIAS // 2) << COUNTER_SHIFT_
        F.large_mask |= ONE << PINNED_BIT_
    F.large_mapcount = R.large_mapcount != 0
    F.mm_id = R.large_mapcount and R.mm_id
    F.mm = R.dst_mm_id << AUX_COUNT_BITS_
    F.page_mapcount = R.page_mapcount
    F.large_ok = not (R.near_limit and R.page_mapcount)
    F.batching = R.batching != 0
    F.hist = stats + N_STATS


cdef void lane_done(const lane *F, walk *W) noexcept nogil:
    """Add what the lane counted."""
    cdef int k
    W.stats[S_PTES_NONE] += F.none
    W.stats[S_SWAP] += F.swapped
    W.stats[S_ANON_EXCLUSIVE_CLEARED] += F.exclusive
    W.stats[S_PTEP_GET] += F.reads
    W.stats[S_WRPROTECT_PTES] += F.wrprotects
    W.stats[S_PTES_WRPROTECTED] += F.wrprotected
    for k in range(4):
        W.rss[k] += F.rss[k]
    W.mapcounts |= F.mapcounts


cdef inline bint near_limit(const walk *W) noexcept:
    # The two top bits: one call would have to map one page 2^22 times to outrun this.
    return W.mapcounts >> (MAPCOUNT_BITS_ - 2) & 3 != 0


cdef bint fits(const lane *F, const uint64_t[:, ::1] marks) noexcept:
    """Whether there are marks of several threads, for as many pages as the extent has."""
    return (1 < marks.shape[0] <= LANE_THREADS and F.extent_len != 0
            and <size_t>marks.shape[1] == lane_mark_words(F.extent_len))


def mark_words(uint64_t nr_pages):
    """Words of a row of marks, of an extent of so many pages."""
    return lane_mark_words(nr_pages)


cdef int check_stats(int64_t[::1] stats, Py_ssize_t nr_slots) except -1:
    if stats.shape[0] < N_STATS + nr_slots + 1:
        raise ValueError("stats is too short for this table")
    return 0


def py_folio_pte_batch(const uint64_t[:, ::1] table not None, Py_ssize_t idx, uint64_t pte, Py_ssize_t max_nr,
                       Py_ssize_t folio_end, const uint64_t[::1] layout not None, bint respect_dirty,
                       bint respect_soft_dirty, bint respect_write, bint clamp):
    """(nr, any_writable, any_young, any_dirty, reads) of one table from idx."""
    cdef pte_layout L = read_layout(layout)
    cdef batch_scan B
    cdef int64_t counts[N_CONTPTE]
    cdef Py_ssize_t nr
    memset(counts, 0, sizeof(counts))
    if idx < 0 or max_nr < 1 or idx + max_nr > table.shape[1] or folio_end < 1:
        raise ValueError("index out of range")
    with nogil:
        scan_rules(&L, &B, respect_dirty, respect_soft_dirty, respect_write)
        B.folio_end = folio_end
        B.clamp = clamp
        nr = folio_pte_batch(table, 0, idx, pte, max_nr, &L, &B, counts)
    return nr, bool(B.any_write), bool(B.any_young), bool(B.any_dirty), B.reads


def py_wrprotect_ptes(uint64_t[:, ::1] table not None, Py_ssize_t idx, Py_ssize_t nr,
                      const uint64_t[::1] layout not None):
    cdef pte_layout L = read_layout(layout)
    cdef int64_t counts[N_CONTPTE]
    memset(counts, 0, sizeof(counts))
    if idx < 0 or nr < 1 or idx + nr > table.shape[1]:
        raise ValueError("index out of range")
    with nogil:
        wrprotect_ptes(table, 0, idx, nr, &L, counts)


def py_set_ptes(uint64_t[:, ::1] table not None, Py_ssize_t idx, uint64_t pte, Py_ssize_t nr,
                const uint64_t[::1] layout not None, uint64_t[::1] words not None, uint64_t[::1] aux not None,
                const int32_t[::1] top not None, const int32_t[::1] sub not None):
    cdef pte_layout L = read_layout(layout)
    cdef memmap M = view_memmap(words, aux, top, sub)
    cdef int64_t counts[N_CONTPTE]
    memset(counts, 0, sizeof(counts))
    if idx < 0 or nr < 1 or idx + nr > table.shape[1]:
        raise ValueError("index out of range")
    with nogil:
        set_ptes(table, 0, idx, pte, nr, &L, &M, counts)


def py_copy_present_ptes(uint64_t[:, ::1] dst not None, uint64_t[:, ::1] src not None, Py_ssize_t idx,
                         Py_ssize_t max_nr, const uint64_t[::1] layout not None, const uint64_t[::1] rules not None,
                         uint64_t[::1] words not None, uint64_t[::1] aux not None, const int32_t[::1] top not None,
                         const int32_t[::1] sub not None, int64_t[::1] rss not None, int64_t[::1] stats not None,
                         object prealloc):
    """(result, whether the preallocated page was used, failing PFN, whether a mapcount is near its limit)"""
    cdef pte_layout L = read_layout(layout)
    cdef copy_rules R = read_rules(rules)
    cdef batch_scan B
    cdef walk W
    cdef Py_ssize_t ret, nr_hist = src.shape[1] + 1
    cdef memmap M = view_memmap(words, aux, top, sub)
    cdef uint64_t pte
    cdef int64_t counts[N_CONTPTE]
    memset(counts, 0, sizeof(counts))
    check_stats(stats, src.shape[1])
    if idx < 0 or max_nr < 1 or idx + max_nr > src.shape[1] or dst.shape[1] != src.shape[1] or rss.shape[0] != 4:
        raise ValueError("index out of range")
    W.prealloc = NO_PFN if prealloc is None else prealloc
    W.fail_pfn = NO_PFN
    W.allocations = 0
    W.mapcounts = 0
    W.large = False
    W.stats = &stats[0]
    W.rss = &rss[0]
    with nogil:
        scan_rules(&L, &B, R.respect_dirty != 0, R.respect_soft_dirty != 0, False)
        child_rules(&L, &B, R.shared != 0, R.dst_uffd_wp != 0)
        B.clamp = R.fpb_clamp != 0
        ptep_get(src, 0, idx, &L, counts, &pte)  # for the caller to count
        if pte_none(&L, pte) or not pte_present(&L, pte):
            ret = E_UNSUPPORTED
        else:
            ret = copy_present_ptes(dst, 0, src, 0, idx, pte, max_nr if R.batching else 1, &L, &R, &M, &B, &W)
        derive_stats(W.stats, nr_hist)
    return ret, prealloc is not None and W.prealloc == NO_PFN, W.fail_pfn, near_limit(&W)


def py_copy_nonpresent_pte(uint64_t[:, ::1] dst not None, uint64_t[:, ::1] src not None, Py_ssize_t idx,
                           const uint64_t[::1] layout not None, const uint64_t[::1] rules not None,
                           uint64_t[::1] words not None, uint64_t[::1] aux not None, const int32_t[::1] top not None,
                           const int32_t[::1] sub not None, const uint64_t[::1] slots not None,
                           int64_t[::1] counts not None, int64_t[::1] rss not None, int64_t[::1] stats not None,
                           int64_t allocations):
    """(result, allocations that may still be made, PFN, whether a mapcount is near its limit)"""
    cdef pte_layout L = read_layout(layout)
    cdef copy_rules R = read_rules(rules)
    cdef walk W
    cdef Py_ssize_t ret
    cdef memmap M = view_memmap(words, aux, top, sub)
    cdef swap_map S = view_swap(slots, counts)
    check_stats(stats, src.shape[1])
    if idx < 0 or idx >= src.shape[1] or dst.shape[1] != src.shape[1] or rss.shape[0] != 4:
        raise ValueError("index out of range")
    W.prealloc = NO_PFN
    W.fail_pfn = NO_PFN
    W.allocations = allocations
    W.mapcounts = 0
    W.large = False
    W.stats = &stats[0]
    W.rss = &rss[0]
    with nogil:
        ret = copy_nonpresent_pte(dst, 0, src, 0, idx, src[0, idx], &L, &R, &M, &S, &W)
        derive_stats(W.stats, src.shape[1] + 1)
    return ret, W.allocations, W.fail_pfn, near_limit(&W)


def py_copy_page_range(uint64_t[:, ::1] dst not None, uint64_t[:, ::1] src not None, const int64_t[::1] vpns not None,
                       Py_ssize_t dst_row, Py_ssize_t src_row, Py_ssize_t nr_rows, int64_t start, int64_t end,
                       const uint64_t[::1] layout not None, const uint64_t[::1] rules not None,
                       uint64_t[::1] words not None, uint64_t[::1] aux not None, const int32_t[::1] top not None,
                       const int32_t[::1] sub not None, const uint64_t[::1] slots not None,
                       int64_t[::1] counts not None, const uint64_t[::1] pool not None, int64_t[::1] rss not None,
                       int64_t[::1] stats not None, int64_t[::1] state not None, const uint64_t[::1] fast not None,
                       const uint64_t[:, ::1] marks not None):
    """Copy virtual pages start..end (page numbers) of nr_rows tables.

    state is [row, idx, pages used of the pool, allocations left, rows that the child has]: where to go on after
    E_PREALLOC or E_SWAP_SLOT, and where the walk stopped. marks are those of py_check_range() for the same pages; where
    they are not of this memmap, there are no threads.
    Returns (0, -EHWPOISON, -EBUSY, -ENOMEM or an E_ code; failing PFN; whether a mapcount is near its limit; the
    nanoseconds it took).
    """
    cdef pte_layout L = read_layout(layout)
    cdef copy_rules R = read_rules(rules)
    cdef batch_scan B
    cdef walk W
    cdef lane F
    cdef lane_like likes[LANE_ORDERS][2]
    cdef Py_ssize_t ret = 0, row = state[0], at = state[1], used = state[2], stop, nr_hist = src.shape[1] + 1
    cdef Py_ssize_t ptrs = src.shape[1], has_rows = state[4], touched, first
    cdef bint threads
    cdef int64_t before, took = now_ns()
    cdef memmap M = view_memmap(words, aux, top, sub)
    cdef swap_map S = view_swap(slots, counts)
    check_stats(stats, ptrs)
    lane_memmap(&F, &M, fast)
    memset(likes, 0, sizeof(likes))
    F.likes = likes
    if (dst.shape[1] != ptrs or state.shape[0] != 5 or rss.shape[0] != 4 or nr_rows < 0 or src_row < 0
            or dst_row < 0 or row < 0 or at < 0 or used < 0 or src_row + nr_rows > src.shape[0]
            or dst_row + nr_rows > dst.shape[0]
            or vpns.shape[0] != src.shape[0] or nr_rows and end <= vpns[src_row + nr_rows - 1]):
        raise ValueError("rows out of range")
    threads = not state[0] and not state[1] and fits(&F, marks) and marks[0, 1] == F.extent_pfn
    W.prealloc = NO_PFN
    W.fail_pfn = NO_PFN
    W.allocations = state[3]
    W.mapcounts = 0
    W.large = False
    W.stats = &stats[0]
    W.rss = &rss[0]
    W.fast = &F
    F.ptrs = ptrs
    F.bypass = <uint64_t>(nr_rows * ptrs) >= fast[5]
    W.end = 0
    if nr_rows:
        W.end = (src_row + nr_rows - 1) * ptrs + min(ptrs, end - vpns[src_row + nr_rows - 1])
    with nogil:
        scan_rules(&L, &B, R.respect_dirty != 0, R.respect_soft_dirty != 0, False)
        child_rules(&L, &B, R.shared != 0, R.dst_uffd_wp != 0)
        B.clamp = R.fpb_clamp != 0
        lane_entries(&F, &L)
        lane_rules(&F, &L, &R, &B, W.stats)
        lane_swap_types(&F, &L, R.swp_kinds, R.swp_kinds_high)
        F.swp_keep = ~(<uint64_t>0 if R.dst_uffd_wp else L.swp_uffd_wp)
        F.slots = S.slots
        F.slot_counts = S.counts
        F.nr_slots = S.nr
        before = main_loop_reads(W.stats, nr_hist)
        while row < nr_rows:
            if row >= has_rows:
                if W.allocations == 0:
                    ret = -ENOMEM
                    break
                W.allocations -= 1
                has_rows = row + 1
            if vpns[src_row + row] + at < start:
                at = start - vpns[src_row + row]
            stop = end - vpns[src_row + row]
            if stop > ptrs:
                stop = ptrs
            first = at
            if threads and at < stop:
                ret = copy_by_threads(dst, dst_row + row, src, src_row + row, &at, stop, marks, &L, &R, &M, &S, &B,
                                      pool, &used, &W)
                threads = False
            if ret == 0 and at == first:
                ret = copy_pte_range(dst, dst_row + row, src, src_row + row, &at, stop, stop, &L, &R, &M, &S, &B, pool,
                                     &used, &W)
            if ret:
                if at >= ptrs:  # in a table behind those that the child got from threads
                    go_on(&row, &at, ptrs)
                    if row >= has_rows:
                        W.allocations -= row + 1 - has_rows
                        has_rows = row + 1
                break
            # Tables that the lane went on to are the child's from then on.
            touched = row + (at + ptrs - 1) // ptrs
            if touched > has_rows:
                W.allocations -= touched - has_rows
                has_rows = touched
            go_on(&row, &at, ptrs)
        lane_settle_all(&F)
        lane_done(&F, &W)
        W.stats[S_PTEP_GET] += main_loop_reads(W.stats, nr_hist) - before
        derive_stats(W.stats, nr_hist)
        state[0] = row
        state[1] = at
        state[2] = used
        state[3] = W.allocations
        state[4] = has_rows
        took = now_ns() - took
    return ret, W.fail_pfn, near_limit(&W), took


def py_check_range(const uint64_t[:, ::1] table not None, const int64_t[::1] vpns not None, Py_ssize_t first_row,
                   Py_ssize_t nr_rows, int64_t start, int64_t end, const uint64_t[::1] layout not None,
                   uint64_t[::1] words not None, uint64_t[::1] aux not None, const int32_t[::1] top not None,
                   const int32_t[::1] sub not None, bint as_kernel, uint64_t kinds, uint64_t kinds_high,
                   const uint64_t[::1] fast not None, uint64_t[:, ::1] marks not None):
    """(0 or E_ code, virtual page number, PFN) of the first entry that fork could not copy; the nanoseconds it took.

    A thread for each row of marks, of mark_words(), which becomes how far it may copy (slots), where the extent begins,
    and what of it the thread maps.
    """
    cdef pte_layout L = read_layout(layout)
    cdef Py_ssize_t ret = 0, row, last, at = 0, stop, room, slots = table.shape[1]
    cdef uint64_t fail_pfn = NO_PFN
    cdef memmap M = view_memmap(words, aux, top, sub)
    cdef int64_t where = 0, took = now_ns()
    cdef bint threads
    cdef lane F
    lane_memmap(&F, &M, fast)
    threads = fits(&F, marks)
    if marks.shape[1]:
        marks[:, 0] = 0  # none may copy anything, unless lane_marks() says so
    if (first_row < 0 or nr_rows < 0 or first_row + nr_rows > table.shape[0] or vpns.shape[0] != table.shape[0]
            or nr_rows and end <= vpns[first_row + nr_rows - 1]):
        raise ValueError("rows out of range")
    with nogil:
        lane_entries(&F, &L)
        lane_swap_types(&F, &L, kinds, kinds_high)
        F.ptrs = slots
        row = first_row
        last = first_row + nr_rows - 1
        while row <= last:
            if vpns[row] + at < start:
                at = start - vpns[row]
            stop = min(end - vpns[row], slots)
            room = (last - row) * slots + min(end - vpns[last], slots)
            if threads and row == first_row and at < stop and F.level:
                at += lane_marks(&F, &table[row, at], room - at, stop - at, &marks[0, 0], marks.shape[0],
                                 marks.shape[1])
                if at >= stop:
                    go_on(&row, &at, slots)
                    continue
            ret = check_table(table, row, &at, stop, room, &L, &M, &F, as_kernel, kinds, kinds_high, &fail_pfn)
            if ret:
                where = vpns[row] + at
                break
            go_on(&row, &at, slots)
        took = now_ns() - took
    return ret, where, fail_pfn, took


def py_wrprotect_range(uint64_t[:, ::1] table not None, const int64_t[::1] vpns not None, Py_ssize_t first_row,
                       Py_ssize_t nr_rows, int64_t start, int64_t end, bint batching, bint clamp,
                       const uint64_t[::1] layout not None, uint64_t[::1] words not None, uint64_t[::1] aux not None,
                       const int32_t[::1] top not None, const int32_t[::1] sub not None, int64_t[::1] stats not None,
                       const uint64_t[::1] fast not None):
    """Write-protect virtual pages start..end; (0 or E_ code, virtual page number, the nanoseconds it took)."""
    cdef pte_layout L = read_layout(layout)
    cdef batch_scan B
    cdef Py_ssize_t ret = 0, row, last, at = 0, stop, room, slots = table.shape[1]
    cdef memmap M = view_memmap(words, aux, top, sub)
    cdef int64_t where = 0, took = now_ns()
    cdef lane F
    check_stats(stats, slots)
    lane_memmap(&F, &M, fast)
    if (first_row < 0 or nr_rows < 0 or first_row + nr_rows > table.shape[0] or vpns.shape[0] != table.shape[0]
            or nr_rows and end <= vpns[first_row + nr_rows - 1]):
        raise ValueError("rows out of range")
    with nogil:
        scan_rules(&L, &B, False, False, False)
        B.clamp = clamp
        lane_entries(&F, &L)
        if L.cont:
            F.level = LANE_OFF
        F.norm = as_change(&B.norm)
        F.clamp = clamp
        F.batching = batching
        F.ptrs = slots
        F.hist = &stats[N_STATS]
        row = first_row
        last = first_row + nr_rows - 1
        while row <= last:
            if vpns[row] + at < start:
                at = start - vpns[row]
            stop = min(end - vpns[row], slots)
            room = (last - row) * slots + min(end - vpns[last], slots)
            ret = wrprotect_table(table, row, &at, stop, room, batching, &L, &M, &B, &F, &stats[0])
            if ret:
                where = vpns[row] + at
                break
            go_on(&row, &at, slots)
        stats[S_PTES_NONE] += F.none
        stats[S_PTEP_GET] += F.reads
        stats[S_WRPROTECT_PTES] += F.wrprotects
        stats[S_PTES_WRPROTECTED] += F.wrprotected
        derive_stats(&stats[0], slots + 1)
        stats[S_SET_PTES] = stats[S_FOLIO_REF_ADD] = stats[S_RMAP_DUP] = 0
        took = now_ns() - took
    return ret, where, took


cdef zap_rules read_zap_rules(const uint64_t[::1] values) except *:
    cdef zap_rules R
    if values.shape[0] * sizeof(uint64_t) != sizeof(R):
        raise ValueError(f"{values.shape[0]} rule fields given, {sizeof(R) // 8} expected")
    memcpy(&R, &values[0], sizeof(R))
    return R


def py_clear_full_ptes(uint64_t[:, ::1] table not None, Py_ssize_t idx, Py_ssize_t nr,
                       const uint64_t[::1] layout not None):
    """The value get_and_clear_full_ptes() returns."""
    cdef pte_layout L = read_layout(layout)
    cdef uint64_t old = 0
    cdef int64_t counts[N_CONTPTE]
    memset(counts, 0, sizeof(counts))
    if idx < 0 or nr < 1 or idx + nr > table.shape[1]:
        raise ValueError("index out of range")
    with nogil:
        get_and_clear_full_ptes(table, 0, idx, nr, &L, counts, &old)
    return old


def py_zap_range(uint64_t[:, ::1] table not None, const int64_t[::1] vpns not None, Py_ssize_t first_row,
                 Py_ssize_t nr_rows, int64_t start, int64_t end, bint once, const uint64_t[::1] layout not None,
                 const uint64_t[::1] rules not None, uint64_t[::1] words not None, uint64_t[::1] aux not None,
                 const int32_t[::1] top not None, int32_t[::1] sub not None, const uint64_t[::1] slots not None,
                 int64_t[::1] counts not None, int64_t[::1] rss not None, int64_t[::1] stats not None):
    """Unmap virtual pages start..end; `once`: only the present entry at start and what forms a batch with it.

    Returns (0, nr if `once`, or an E_ code; virtual page number; failing PFN; lowest freed PFN or None).
    """
    cdef pte_layout L = read_layout(layout)
    cdef zap_rules R = read_zap_rules(rules)
    cdef batch_scan B
    cdef zap_walk W
    cdef swap_map S
    cdef Py_ssize_t ret = 0, row, at = 0, stop, nr_slots = table.shape[1]
    cdef memmap M = view_memmap(words, aux, top, sub)
    cdef int64_t where = start
    cdef uint64_t pte
    cdef int64_t unread[N_CONTPTE]
    memset(unread, 0, sizeof(unread))
    if (first_row < 0 or nr_rows < 0 or first_row + nr_rows > table.shape[0] or vpns.shape[0] != table.shape[0]
            or rss.shape[0] != 4 or stats.shape[0] != N_ZAP_STATS + nr_slots + 1 or counts.shape[0] != slots.shape[0]):
        raise ValueError("rows out of range")
    S.nr = slots.shape[0]
    S.next = 0
    S.slots = &slots[0] if S.nr else NULL
    S.counts = &counts[0] if S.nr else NULL
    W.fail_pfn = W.lowest_freed = NO_PFN
    W.sub = &sub[0] if M.nr_sub else NULL
    W.stats = &stats[0]
    W.rss = &rss[0]
    W.large = False
    with nogil:
        scan_rules(&L, &B, False, False, False)
        B.clamp = R.fpb_clamp != 0
        for row in range(first_row, first_row + nr_rows):
            at = start - vpns[row] if start > vpns[row] else 0
            stop = end - vpns[row] if end - vpns[row] < nr_slots else nr_slots
            if once:
                ptep_get(table, row, at, &L, unread, &pte)  # for the caller to count
                ret = zap_present_ptes(table, row, at, pte, stop - at if R.batching else 1, &L, &R, &M, &B, &W)
                break
            ret = zap_pte_range(table, row, &at, stop, &L, &R, &M, &S, &B, &W)
            if ret:
                where = vpns[row] + at
                break
        derive_zap_stats(&stats[0], nr_slots + 1)
    return ret, where, W.fail_pfn, None if W.lowest_freed == NO_PFN else W.lowest_freed


HELPERS = ("pte_none", "pte_present", "pte_pfn", "pte_write", "pte_young", "pte_dirty", "pte_wrprotect", "pte_mkwrite",
           "pte_mkwrite_shstk", "pte_mkclean", "pte_mkdirty", "pte_mkold", "pte_mkuffd_wp", "pte_clear_uffd_wp",
           "pte_advance_pfn", "mk_pte", "ptep_set_wrprotect", "pte_mkyoung", "swp_type", "swp_offset", "swp_offset_pfn",
           "swp_entry")


def py_apply_helper(int helper, const uint64_t[::1] values not None, uint64_t arg, uint64_t[::1] out not None,
                    const uint64_t[::1] layout not None):
    """One scalar helper over an array; `helper` indexes HELPERS.

    mk_pte takes PFNs as values and the prot as arg, swp_entry offsets and the type.
    """
    cdef pte_layout L = read_layout(layout)
    cdef Py_ssize_t i
    cdef uint64_t v
    if out.shape[0] != values.shape[0] or not 0 <= helper < 22:
        raise ValueError("shapes differ or no such helper")
    with nogil:
        for i in range(values.shape[0]):
            v = values[i]
            if helper == 0:
                v = pte_none(&L, v)
            elif helper == 1:
                v = pte_present(&L, v)
            elif helper == 2:
                v = pte_pfn(&L, v)
            elif helper == 3:
                v = pte_write(&L, v)
            elif helper == 4:
                v = pte_young(&L, v)
            elif helper == 5:
                v = pte_dirty(&L, v)
            elif helper == 6:
                v = pte_wrprotect(&L, v)
            elif helper == 7:
                v = pte_mkwrite(&L, v, False)
            elif helper == 8:
                v = pte_mkwrite(&L, v, True)
            elif helper == 9:
                v = pte_mkclean(&L, v)
            elif helper == 10:
                v = pte_mkdirty(&L, v)
            elif helper == 11:
                v = pte_mkold(&L, v)
            elif helper == 12:
                v = pte_mkuffd_wp(&L, v)
            elif helper == 13:
                v = v & ~L.uffd_wp
            elif helper == 14:
                v = pte_advance_pfn(&L, v, arg)
            elif helper == 15:
                v = mk_pte(&L, v, arg)
            elif helper == 16:
                v = changed(&L.ptep_set_wrprotect, v)
            elif helper == 17:
                v = changed(&L.mkyoung, v)
            elif helper == 18:
                v = swp_type(&L, v)
            elif helper == 19:
                v = swp_offset(&L, v)
            elif helper == 20:
                v = swp_pfn(&L, v)
            else:
                v = swp_entry(&L, arg, v)
            out[i] = v
