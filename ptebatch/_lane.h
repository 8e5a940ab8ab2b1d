/*
 * The fast lane of fork's copy and of write-protection: runs of entries that need nothing but the common case, at one of
 * three SIMD levels.
 *
 * The lane is an accelerator, not a second engine. copy_pte_range() in _core.pyx offers it a run of slots; it copies from
 * the front as many entries as it can prove to be common, leaves exactly what copy_present_ptes() would have left, and
 * returns where it stopped. Whatever it stops at is done by copy_present_ptes(), and the lane is offered the rest.
 * With the lane off (PTEBATCH_SIMD=off) the results are the same.
 *
 * Asked once per VMA (lane_entries and lane_rules in _core.pyx; the lane is off otherwise): entries whose PFN begins at bit
 * 12, whose validity is one bit and whose helpers are plain steps (x86-64, arm64-4k without contpte, loongarch64-4k); no
 * shadow-stack VMA.
 * Asked of every entry:
 *   none                         counted and passed over
 *   swapped out                  lane_swap, where its slot is known and has few references; lane_swaps where neighbours' slots
 *                                are neighbours (at the scalar level the same as lane_swap)
 *   present, not special         PROT_NONE included; other entries stop the lane
 * Asked of every page or folio: it is in the memmap (bounds are checked in every build), no count is near its limit, it is
 * not a hugetlb folio and cannot be pinned. Then there are these cases:
 *   small folios                 lane_group: LANES entries in a row that all map small folios of one kind (anonymous,
 *                                shmem, file; exclusive or not), or of any kinds and none among them (lane_sparse, not at
 *                                the scalar level), else one at a time (lane_small)
 *   folios of 2, 4, 8, 16 pages  lane_whole: each mapped whole by entries alike. One pass; a folio stays in registers, and
 *                                all there is to it but its entries is its words (of 2 pages: and the MM-ID slots in aux);
 *                                runs of one kind, or of two that cannot be predicted (lane_whole_run)
 *   folios of 32 to 512 pages    lane_alike, like lane_whole: in one pass too, which is undone where a folio turns out different
 *   small folios, and folios of  lane_quads, after several short runs: by four entries, of whatever order they are (not at the
 *   4 to 16 pages that take turns  scalar level)
 *   at most 16 entries of others lane_pieces: all batches of a folio at once, with what is none or swapped out between them;
 *                                by lane_gaps where the entries that map pages are alike, else lane_piece (not at the scalar
 *                                level)
 *   any other batch              lane_fused where entry 0 is writable, which settles that the parent's entries change:
 *                                one pass; else lane_scan, then lane_rewrite, over entries that are in the cache by then
 *   without batching             lane_whole and lane_alike for whole folios mapped by entries alike, else lane_each, whatever
 *                                they are like; a folio's counts are changed once for all its entries, though
 * What one more mapping makes of a folio that is mapped whole is worked out for one folio and kept, for two kinds of each
 * order (struct lane_like): those that are the same but for where they are, entries and words, are only compared and stored,
 * and counted in the end (lane_settle). Cases go on for as long as they hold, over table ends too: what makes them fast is
 * that no entry waits for what the one before it was found to be. Prefetched are the words of the pages of entries ahead, and
 * entries of both tables, the child's not where they are written past the cache.
 * Where the child's entries are too many for the cache (bypass), large folios' are written past it.
 *
 * Write-protection needs of a folio only its size: lane_protect_run.
 *
 * Several threads may run the lane over tables of their own: lane_marks and lane_threads, at the end.
 *
 * _lane_simd.h holds these functions once; it is included below for each level with that level's vector operations. Loops
 * that are not about many entries at once are plain C further down. A page's index is bounds-checked, and the entry is not read
 * again for it, so that a concurrent writer can spoil results but not reach outside the arrays.
 */
#ifndef PTEBATCH_LANE_H
#define PTEBATCH_LANE_H

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__) || defined(__clang__)
#define LANE_INLINE static inline __attribute__((always_inline))
#define LANE_APART static __attribute__((noinline)) /* registers are not for it and its callers together */
#define LANE_PREFETCH(p) __builtin_prefetch((p), 1)
#define LANE_PREFETCH_READ(p) __builtin_prefetch((p), 0)
#define LANE_PREFETCH_NEXT(p) __builtin_prefetch((p), 0, 2) /* not into the first cache */
#define LANE_LIKELY(x) __builtin_expect(!!(x), 1)
#else
#define LANE_INLINE static inline
#define LANE_APART static
#define LANE_PREFETCH(p) ((void)(p))
#define LANE_PREFETCH_READ(p) ((void)(p))
#define LANE_PREFETCH_NEXT(p) ((void)(p))
#define LANE_LIKELY(x) (x)
#endif

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define LANE_X86 1
#include <immintrin.h>
#else
#define LANE_X86 0
#endif

enum lane_level { LANE_OFF, LANE_SCALAR, LANE_AVX2, LANE_AVX512 };

/* The memmap word; ptebatch.folio holds the same numbers under public names and ptebatch.batch compares them on import. */
enum {
    MAPCOUNT_BITS_ = 24,
    COUNTER_SHIFT_ = 24,
    COUNTER_BITS_ = 26,
    ORDER_SHIFT_ = 50,
    ORDER_BITS_ = 5,
    DEVICE_BIT_ = 55,
    AE_BIT_ = 56,
    ANON_BIT_ = 57,
    SWAPBACKED_BIT_ = 58,
    KSM_BIT_ = 59,
    HUGETLB_BIT_ = 60,
    PINNED_BIT_ = 61,
    HWPOISON_BIT_ = 62,
    VALID_BIT_ = 63,
    AUX_COUNT_BITS_ = 26,
    AUX_ID_BITS_ = 20,
    AUX_DIRTY_BIT_ = 46,
    AUX_LOCKED_BIT_ = 47,
    AUX_SHARED_BIT_ = 63,
    INLINE_MIN_ORDER_ = 2,
    INLINE_MAX_ORDER_ = 4,
    INLINE_COUNT_BITS_ = 5,
    SECTION_SHIFT_ = 6,
    TOP_SHIFT_ = 18
};

enum { KEY_TYPE_SHIFT_ = 56, SWAP_MAP_MAX_ = 62 }; /* of swap slots; as ptebatch.swap */

enum { LANE_PFN_SHIFT = 12 }; /* of entries; lane_entries in _core.pyx keeps out layouts that have another */

#define LANE_BIT(n) ((uint64_t)1 << (n))
#define LANE_NO_AREA (~(uint64_t)0) /* of swap: no entry is like this */
#define LANE_ONE_MAPPING (LANE_BIT(COUNTER_SHIFT_) + 1) /* of a small folio: one reference, one mapping */
#define LANE_HALF_MAPCOUNT LANE_BIT(MAPCOUNT_BITS_ - 1) /* set in a count: too close to its limit for the lane */
#define LANE_HALF_COUNTER LANE_BIT(COUNTER_SHIFT_ + COUNTER_BITS_ - 1)
#define LANE_HALF_AUX LANE_BIT(AUX_COUNT_BITS_ - 1)
#define LANE_COUNTER ((LANE_BIT(COUNTER_BITS_) - 1) << COUNTER_SHIFT_)
/* Where the index may be out of range: an address, not an element. */
#define LANE_ADDRESS(array, index) ((const void *)((uintptr_t)(array) + (index) * sizeof(uint64_t)))
#define LANE_PREFETCH_AT(array, index) LANE_PREFETCH(LANE_ADDRESS(array, index))
#define LANE_PREFETCH_L2(array, index) LANE_PREFETCH_NEXT(LANE_ADDRESS(array, index))

/* How many entries ahead the words of pages are fetched: of small folios, of large ones, and of both where they take turns;
 * _FAR where it is all too much for the cache, and they come from memory. A CPU can wait for more lines on their way to its
 * second cache than to its first: so they are fetched in two steps then (NEAR: the second), unless a folio has many lines, one
 * behind the other, which it fetches by itself. */
enum { LANE_AHEAD_SMALL = 64, LANE_AHEAD_SMALL_FAR = 128, LANE_AHEAD_LARGE = 512, LANE_AHEAD_TURNS_FAR = 256 };
enum { LANE_NEAR_SMALL = 16, LANE_NEAR_LARGE = 32 };
/* Of the tables themselves; and what more of entries from memory, which are read so far ahead to fetch words. */
enum { LANE_AHEAD_STREAM = 64, LANE_AHEAD_ENTRIES = 256, LANE_LINE = 8 /* entries in a cache line */ };
enum { LANE_STREAMS = 4, LANE_LONG = 1024 };             /* of the read-only pass, and from how many entries in each */
enum { LANE_SHORT = 32, LANE_SHORT_RUNS = 4 }; /* entries that are a short run; after so many of them lane_quads is tried */
enum { LANE_FEW = 8, LANE_BOTH = 64 };         /* folios of one kind that are few; of both kinds to go through then */
enum { LANE_WHOLE = 16, LANE_ORDERS = 10 };    /* most pages of a folio that is held in registers; orders of a table's */

LANE_INLINE size_t lane_ahead(int far)
{
    return far ? LANE_AHEAD_SMALL_FAR : LANE_AHEAD_SMALL;
}

/* n entries (constant where inlined) are about to be worked on: fetch those that lie so far behind them. */
LANE_INLINE void lane_stream_at(const uint64_t *entries, size_t n, size_t distance)
{
    size_t k = 0;
    if (n < LANE_LINE && (uintptr_t)entries & (LANE_LINE * sizeof(uint64_t) - 1))
        return;
    for (; k < n; k += LANE_LINE)
        LANE_PREFETCH(LANE_ADDRESS(entries, k + distance));
}

LANE_INLINE void lane_stream(const uint64_t *entries, size_t n)
{
    lane_stream_at(entries, n, LANE_AHEAD_STREAM);
}

/* What was written past the cache is there for other CPUs after this. */
LANE_INLINE void lane_fence(void)
{
#if LANE_X86
    _mm_sfence();
#endif
}

/*
 * The two MM-ID slots of a large folio (v6.15): a count, an mm id, and in slot 0 the maybe-mapped-shared flag. Most folios
 * have them in aux, as struct mm_slots has them. Where slots_inline(), they are in the counter fields of pages 2 and 3, with
 * a shorter count and the flag as top bit, so that what changes of a small "large folio" is in its words alone. While a count
 * does not fit, the top bit of page 3's field says so, nothing else is in the two fields, and aux has the slots.
 */
struct mm_slots {
    uint64_t slot[2];
};

#define SLOT_COUNT (LANE_BIT(AUX_COUNT_BITS_) - 1)
#define SLOT_ID ((LANE_BIT(AUX_ID_BITS_) - 1) << AUX_COUNT_BITS_)
#define SLOT_SHARED LANE_BIT(AUX_SHARED_BIT_)
#define SLOT_BITS (SLOT_SHARED | SLOT_ID | SLOT_COUNT)
#define INLINE_COUNT (LANE_BIT(INLINE_COUNT_BITS_) - 1)
#define INLINE_FLAG LANE_HALF_COUNTER /* shared on page 2, spilled on page 3 */
enum {
    INLINE_ID_SHIFT = COUNTER_SHIFT_ + INLINE_COUNT_BITS_ - AUX_COUNT_BITS_,
    INLINE_FLAG_SHIFT = AUX_SHARED_BIT_ - (COUNTER_SHIFT_ + COUNTER_BITS_ - 1)
};

/* Whether the folio of a page with the word w has its slots in its words, unless they are spilled. */
LANE_INLINE int slots_inline(uint64_t w)
{
    const uint64_t order = w >> ORDER_SHIFT_ & (LANE_BIT(ORDER_BITS_) - 1);
    return order >= INLINE_MIN_ORDER_ && order <= INLINE_MAX_ORDER_ && !(w & LANE_BIT(HUGETLB_BIT_));
}

/* The slot in a word's counter field, and the field of a slot whose count fits. */
LANE_INLINE uint64_t slot_unpacked(uint64_t w)
{
    return (w >> COUNTER_SHIFT_ & INLINE_COUNT) | (w >> INLINE_ID_SHIFT & SLOT_ID) | (w & INLINE_FLAG) << INLINE_FLAG_SHIFT;
}

LANE_INLINE uint64_t slot_packed(uint64_t slot)
{
    return (slot & INLINE_COUNT) << COUNTER_SHIFT_ | (slot & SLOT_ID) << INLINE_ID_SHIFT | (slot >> INLINE_FLAG_SHIFT & INLINE_FLAG);
}

LANE_INLINE int slots_fit(const struct mm_slots *s)
{
    return !((s->slot[0] | s->slot[1]) & SLOT_COUNT & ~INLINE_COUNT);
}

/* The slots of the folio that begins at head; inlined is slots_inline() of it, and all its words are in the memmap. */
LANE_INLINE struct mm_slots load_mm_slots(const uint64_t *words, const uint64_t *aux, size_t head, int inlined)
{
    struct mm_slots s;
    if (inlined && !(words[head + 3] & INLINE_FLAG)) {
        s.slot[0] = slot_unpacked(words[head + 2]);
        s.slot[1] = slot_unpacked(words[head + 3]);
    } else {
        s.slot[0] = aux[head] & SLOT_BITS;
        s.slot[1] = aux[head + 1] & SLOT_BITS;
    }
    return s;
}

LANE_INLINE void store_mm_slots(uint64_t *words, uint64_t *aux, size_t head, int inlined, struct mm_slots s)
{
    const int fit = inlined && slots_fit(&s);
    if (inlined) {
        const uint64_t third = words[head + 2], fourth = words[head + 3];
        words[head + 2] = (third & ~LANE_COUNTER) | (fit ? slot_packed(s.slot[0]) : 0);
        words[head + 3] = (fourth & ~LANE_COUNTER) | (fit ? slot_packed(s.slot[1]) : INLINE_FLAG);
        if (fit && !(fourth & INLINE_FLAG))
            return; /* aux had none of it */
    }
    aux[head] = (aux[head] & ~SLOT_BITS) | (fit ? 0 : s.slot[0]);
    aux[head + 1] = fit ? 0 : s.slot[1];
}

/* One change of an entry; as pte_step in _core.pyx. */
struct lane_change {
    uint64_t keep, set, mask, value, then_keep, then_set;
};

/* What one more mapping makes of a large folio that is mapped whole by entries that are alike, worked out for one folio and
 * kept for those that are the same but for where they are. Words of pages behind LANE_WHOLE are like page 2's. */
struct lane_like {
    uint64_t key, flags; /* flags and head's word together; what of an entry is not its PFN */
    uint64_t before[16], after[16], aux[2], aux_after[2]; /* words; MM-ID slots */
    uint64_t protect, child; /* what is added to an entry to protect it, and to make it the child's */
    int64_t nr_exclusive, folios; /* pages that are, of a folio; folios met and not counted yet */
    int write, rss;          /* whether they are write-protected; the counter they go to */
    uint64_t mask, align;    /* for lane_quads: what of four entries must be as of consecutive pages; pages less one */
    int64_t unit, nr;        /* entries that go together, and folios they map */
};

struct lane {
    /* entries */
    uint64_t none_value, none_ignore, present, valid, special, pfn_mask, write, writable;
    uint64_t inverted; /* what of a PROT_NONE entry is stored inverted: its PFN, or nothing */
    struct lane_change wrprotect, mkwrite, norm; /* the last is the normaliser of folio_pte_batch() */
    uint64_t child_keep, child_set;              /* of the child's entry, once it is write-protected where it has to be */
    int level, cow, clamp, prefetch, batching;
    int far;    /* whether words come from memory, or a cache that is far away */
    int bypass; /* whether the child's entries are more than a cache holds: then they are written past it */
    size_t ptrs; /* entries of a table */
    /* the memmap */
    uint64_t *words, *aux;
    size_t nr_words;
    const int32_t *top, *sub;
    size_t nr_top, nr_sub;
    uint64_t extent_pfn; /* pages extent_pfn.. for extent_len have the words extent_at.. and all exist */
    uint64_t extent_len;
    size_t extent_at;
    /* rules */
    uint64_t small_mask, small_value; /* what the word of a small folio's page must be like; value without the kind */
    uint64_t large_mask;              /* bits that the head of a large folio must not have */
    int large_mapcount, mm_id, large_ok;
    uint64_t page_mapcount, mm;
    /* swap: entries of types below swp_types are of pages that are swapped out; slots are keys, ascending */
    uint64_t swp_types, swp_type_mask, swp_offset_mask, swp_inverted, swp_exclusive, swp_keep;
    int swp_type_shift, swp_offset_shift;
    const uint64_t *slots;
    int64_t *slot_counts;
    size_t nr_slots, next_slot;
    const uint64_t *const *others; /* threads: the marks of each of the others */
    int nr_others;
    struct lane_like (*likes)[2]; /* by order: two kinds of folios may take turns */
    unsigned turns;                /* by order a bit: which of the two is to go */
    /* counters */
    int64_t *hist; /* by nr */
    int64_t none, swapped, exclusive, reads, wrprotects, wrprotected, rss[4];
    uint64_t mapcounts; /* OR of those met in large folios */
};

/* The kind of the folios of a run: bits that decide which rss counter they go to and whether they are exclusive. */
#define LANE_KIND (LANE_BIT(ANON_BIT_) | LANE_BIT(SWAPBACKED_BIT_))

LANE_INLINE int lane_rss(uint64_t w)
{
    return w >> ANON_BIT_ & 1 ? 1 : w >> SWAPBACKED_BIT_ & 1 ? 3 : 0;
}

LANE_INLINE uint64_t lane_pfn(const struct lane *l, uint64_t v)
{
    return ((v & l->valid ? v : v ^ l->inverted) & l->pfn_mask) >> LANE_PFN_SHIFT;
}

/* What the next page's entry has more: modulo 2^64, because PROT_NONE entries may hold their PFN inverted. */
LANE_INLINE uint64_t lane_step(const struct lane *l, uint64_t v)
{
    return v & l->valid || !l->inverted ? LANE_BIT(LANE_PFN_SHIFT) : 0 - LANE_BIT(LANE_PFN_SHIFT);
}

/* Index of a PFN's word, nr_words if it has none. */
LANE_INLINE size_t lane_page(const struct lane *l, uint64_t pfn)
{
    uint64_t rel = pfn - l->extent_pfn, block = pfn >> TOP_SHIFT_;
    size_t at;
    int32_t entry;
    if (LANE_LIKELY(rel < l->extent_len))
        return l->extent_at + rel;
    if (block >= l->nr_top || (entry = l->top[block]) < 0)
        return l->nr_words;
    at = ((size_t)entry << (TOP_SHIFT_ - SECTION_SHIFT_)) + (pfn >> SECTION_SHIFT_ & (LANE_BIT(TOP_SHIFT_ - SECTION_SHIFT_) - 1));
    if (at >= l->nr_sub || (entry = l->sub[at]) < 0)
        return l->nr_words;
    at = ((size_t)(entry >> 1) << SECTION_SHIFT_) + (pfn & (LANE_BIT(SECTION_SHIFT_) - 1));
    return at < l->nr_words ? at : l->nr_words;
}

LANE_INLINE uint64_t lane_changed(const struct lane_change *c, uint64_t v)
{
    uint64_t out = (v & c->keep) | c->set;
    return (v & c->mask) == c->value ? (out & c->then_keep) | c->then_set : out;
}

LANE_INLINE uint64_t lane_wrprotect(const struct lane *l, uint64_t v)
{
    return lane_changed(&l->wrprotect, v);
}

/* Whether the child's entry 0 depends on no more than lane_child() asks for. What copy_present_ptes() makes writable, where
 * another entry of the batch is, may come out of write-protection as something else than it was (arm64 before v6.18). */
LANE_INLINE int lane_canonical(const struct lane *l, uint64_t v)
{
    uint64_t w = lane_changed(&l->mkwrite, v);
    return l->cow ? lane_wrprotect(l, w) == lane_wrprotect(l, v) : !(v & l->write) || w == v;
}

/* The child's entry 0: v is the parent's, any whether the batch has a writable entry. */
LANE_INLINE uint64_t lane_child(const struct lane *l, uint64_t v, int any)
{
    if (any)
        v = lane_changed(l->cow ? &l->wrprotect : &l->mkwrite, v);
    return (v & l->child_keep) | l->child_set;
}

/* Place of the slot that a swap entry is of, nr_slots where it is not known or the entry is something else. Slots of
 * neighbouring entries are mostly neighbours too, and slots lie close. */
LANE_INLINE size_t lane_slot(const struct lane *l, uint64_t v)
{
    const uint64_t type = v >> l->swp_type_shift & l->swp_type_mask;
    uint64_t key;
    size_t at = l->next_slot;
    if (v & l->present || (v & ~l->none_ignore) == l->none_value || type >= l->swp_types)
        return l->nr_slots;
    key = type << KEY_TYPE_SHIFT_ | ((v ^ l->swp_inverted) >> l->swp_offset_shift & l->swp_offset_mask);
    if (at < l->nr_slots && l->slots[at] == key)
        return at;
    at = l->nr_slots ? key - l->slots[0] : 0;
    return at < l->nr_slots && l->slots[at] == key ? at : l->nr_slots;
}

/* The bits in which all entries of one swap area are the same, and none that maps a page. */
LANE_INLINE uint64_t lane_area(const struct lane *l)
{
    return l->present | l->swp_type_mask << l->swp_type_shift;
}

LANE_INLINE void lane_swapped(struct lane *l, size_t n)
{
    l->swapped += (int64_t)n;
    l->reads += 2 * (int64_t)n;
    l->rss[2] += (int64_t)n;
}

/* Entries from the front of n of pages that are swapped out, to slots that are known and have few references; returns how
 * many. */
LANE_INLINE size_t lane_swap(struct lane *l, uint64_t *src, uint64_t *dst, size_t n)
{
    size_t i = 0;
    for (; i < n; i++) {
        uint64_t v = src[i];
        const size_t at = lane_slot(l, v);
        if (at >= l->nr_slots || (uint64_t)l->slot_counts[at] >= SWAP_MAP_MAX_)
            break;
        l->slot_counts[at]++;
        l->next_slot = at + 1;
        if (v & l->swp_exclusive)
            src[i] = v &= ~l->swp_exclusive;
        dst[i] = v & l->swp_keep;
    }
    lane_swapped(l, i);
    return i;
}

/* One entry that maps a small folio; w is its page's word and of the right kind. */
LANE_INLINE void lane_small(struct lane *l, uint64_t *src, uint64_t *dst, uint64_t v, uint64_t *word, uint64_t w)
{
    uint64_t exclusive = w & w >> (ANON_BIT_ - AE_BIT_) & LANE_BIT(AE_BIT_);
    int write = (v & l->writable) != 0;
    *word = (w ^ exclusive) + LANE_ONE_MAPPING;
    l->exclusive += exclusive != 0;
    l->rss[lane_rss(w)]++;
    l->hist[1]++;
    if (l->cow && write) {
        v = lane_wrprotect(l, v);
        *src = v;
        l->wrprotects++;
        l->wrprotected++;
    }
    *dst = (v & l->child_keep) | l->child_set;
}

/* Whether the lane may account more mappings of the large folio with that head, which is whole in the memmap; a page of it
 * has the word w. */
LANE_INLINE int lane_large_ok(const struct lane *l, size_t head, uint64_t w)
{
    struct mm_slots s;
    if (!l->large_ok || w & LANE_BIT(HUGETLB_BIT_) || l->words[head] & l->large_mask || l->words[head + 1] & LANE_HALF_COUNTER)
        return 0;
    if (!l->mm_id)
        return 1;
    s = load_mm_slots(l->words, l->aux, head, slots_inline(w));
    return !((s.slot[0] | s.slot[1]) & LANE_HALF_AUX);
}

/*
 * What pages of the extent a thread maps: its marks, a row of LANE_MARKS words and then a bit for every quad (four pages
 * from a multiple of four on) that four entries map one after the other, and a bit for every page that is mapped otherwise.
 * Those of pages are four times as many: they are set up when the first is needed, which the row's third word says.
 */
enum { LANE_MARKS = 3, LANE_QUAD = 4, LANE_QUADS = 64 * LANE_QUAD /* pages of a word of quads */ };

LANE_INLINE size_t lane_quad_words(uint64_t extent_len)
{
    return extent_len / LANE_QUADS + (extent_len % LANE_QUADS != 0);
}

static inline size_t lane_mark_words(uint64_t extent_len)
{
    return LANE_MARKS + (1 + LANE_QUAD) * lane_quad_words(extent_len);
}

/* The bits of the pages of 16 quads. */
LANE_INLINE uint64_t lane_quad_pages(uint64_t quads)
{
    quads &= 0xffff;
    quads = (quads | quads << 24) & 0x000000ff000000ff;
    quads = (quads | quads << 12) & 0x000f000f000f000f;
    quads = (quads | quads << 6) & 0x0303030303030303;
    return ((quads | quads << 3) & 0x1111111111111111) * 15;
}

/* Set up the bits of pages. */
static inline void lane_mark_pages(const struct lane *l, uint64_t *row)
{
    const size_t quad_words = lane_quad_words(l->extent_len);
    memset(row + LANE_MARKS + quad_words, 0, LANE_QUAD * quad_words * sizeof(*row));
    row[2] = 1;
}

LANE_INLINE int lane_any_bit(const uint64_t *bits, uint64_t first, uint64_t last)
{
    uint64_t at;
    for (at = first / 64; at <= last / 64; at++) {
        uint64_t some = bits[at];
        some &= at == first / 64 ? ~(uint64_t)0 << first % 64 : ~(uint64_t)0;
        some &= at == last / 64 ? ~(uint64_t)0 >> (63 - last % 64) : ~(uint64_t)0;
        if (some)
            return 1;
    }
    return 0;
}

/* Whether no other thread maps a page of the folio, one page of which is in the extent. */
LANE_INLINE int lane_sole(const struct lane *l, uint64_t first_pfn, size_t nr_pages)
{
    const uint64_t first = first_pfn > l->extent_pfn ? first_pfn - l->extent_pfn : 0;
    const uint64_t end = first_pfn + nr_pages - 1 - l->extent_pfn, last = end < l->extent_len ? end : l->extent_len - 1;
    const size_t quad_words = lane_quad_words(l->extent_len);
    int k;
    for (k = 0; k < l->nr_others; k++) {
        const uint64_t *row = l->others[k], *quads = row + LANE_MARKS;
        if (lane_any_bit(quads, first / LANE_QUAD, last / LANE_QUAD) || (row[2] && lane_any_bit(quads + quad_words, first, last)))
            return 0;
    }
    return 1;
}

/* MM-ID slots of a large folio when this fork adds nr mappings; total is the large mapcount afterwards (v6.15). */
LANE_INLINE void lane_mm_mapping(const struct lane *l, struct mm_slots *s, uint64_t nr, uint64_t total)
{
    const uint64_t a = s->slot[0], b = s->slot[1];
    if (LANE_LIKELY((a & SLOT_ID) != l->mm && a & SLOT_ID && !(b & SLOT_ID))) {
        s->slot[1] = b | l->mm | nr;
        s->slot[0] = a | SLOT_SHARED;
    } else if ((a & SLOT_ID) == l->mm) {
        s->slot[0] = a + nr;
    } else if ((b & SLOT_ID) == l->mm) {
        s->slot[1] = b + nr;
    } else if (!(a & SLOT_ID)) {
        s->slot[0] = a | l->mm | nr | (total != nr ? SLOT_SHARED : 0);
    }
}

/* What nr more mappings of a large folio change besides entries and the words of their pages. */
LANE_INLINE void lane_account(struct lane *l, size_t head, uint64_t w, size_t nr)
{
    uint64_t *words = l->words;
    words[head] += (uint64_t)nr << COUNTER_SHIFT_;
    if (l->large_mapcount) {
        uint64_t second = words[head + 1] + ((uint64_t)nr << COUNTER_SHIFT_);
        words[head + 1] = second;
        if (l->mm_id) {
            struct mm_slots s = load_mm_slots(words, l->aux, head, slots_inline(w));
            lane_mm_mapping(l, &s, nr, (second & LANE_COUNTER) >> COUNTER_SHIFT_);
            store_mm_slots(words, l->aux, head, slots_inline(w), s);
        }
    }
    l->rss[lane_rss(w)] += (int64_t)nr;
}

/* Of the i slots that lie in front of n: behind how many a table, or what is copied of it, ends. */
LANE_INLINE size_t lane_ends(const struct lane *l, size_t i, size_t n, size_t left)
{
    if (!i || i < left)
        return 0;
    return 1 + (i - left) / l->ptrs + (i == n && (i - left) % l->ptrs);
}

/* What is left of the table after `done` of n slots, where `left` of them were; 0 at its end. */
LANE_INLINE size_t lane_left(const struct lane *l, size_t left, size_t done, size_t n)
{
    left = done < left ? left - done : (l->ptrs - (done - left) % l->ptrs) % l->ptrs;
    return left < n - done ? left : n - done;
}

/* Count the folios of that order that were like t. */
LANE_INLINE void lane_settle(struct lane *l, struct lane_like *t, int order)
{
    const int64_t nr = t->folios, pages = nr << order;
    if (!nr) /* the histogram of small tables ends before the larger orders */
        return;
    l->hist[l->batching ? (size_t)1 << order : 1] += l->batching ? nr : pages;
    l->reads += l->batching ? pages - nr : 0; /* of the scan: all entries but the first, and see lane_behind */
    l->exclusive += nr * t->nr_exclusive;
    l->rss[t->rss] += pages;
    l->wrprotects += t->write ? l->batching ? nr : pages : 0;
    l->wrprotected += t->write ? pages : 0;
    t->folios = 0;
}

/* Without the clamp the scan of a folio reads the entry behind it too, unless the table ends there; the first i of n entries
 * map folios of that size, and tables end as for lane_ends. */
LANE_INLINE void lane_behind(struct lane *l, size_t i, size_t n, size_t left, size_t pages)
{
    if (l->batching && !l->clamp)
        l->reads += (int64_t)(i / pages - lane_ends(l, i, n, left));
}

/* What t says of entries: v is a folio's first, w its head's word, any whether one of them is writable. */
LANE_INLINE void lane_like_entries(const struct lane *l, struct lane_like *t, uint64_t v, uint64_t w, int any)
{
    t->flags = v & ~l->pfn_mask;
    t->key = t->flags + w;
    t->write = any && l->cow;
    t->protect = t->write ? lane_wrprotect(l, v) - v : 0;
    t->child = lane_child(l, v, any) - v;
    t->rss = lane_rss(w);
    t->folios = t->nr_exclusive = 0;
    t->unit = (int64_t)1 << (w >> ORDER_SHIFT_ & (LANE_BIT(ORDER_BITS_) - 1));
    t->nr = 1;
    t->mask = ~(uint64_t)0;
    t->align = (uint64_t)t->unit - 1;
}

static inline void lane_settle_all(struct lane *l)
{
    int order;
    for (order = 0; order < LANE_ORDERS; order++) {
        lane_settle(l, &l->likes[order][0], order);
        lane_settle(l, &l->likes[order][1], order);
    }
}

/* A place for another kind of folios of that order, instead of the one that has been there for longer. */
LANE_INLINE struct lane_like *lane_other(struct lane *l, int order)
{
    struct lane_like *t = &l->likes[order][l->turns >> order & 1];
    l->turns ^= 1u << order;
    lane_settle(l, t, order);
    return t;
}

/* Small folios: v is an entry of one, w its page's word. */
LANE_INLINE void lane_like_small(struct lane *l, uint64_t v, uint64_t w)
{
    const uint64_t exclusive = w & w >> (ANON_BIT_ - AE_BIT_) & LANE_BIT(AE_BIT_), key = (v & ~l->pfn_mask) + w;
    struct lane_like *t;
    int k;
    if (l->likes[0][0].key == key || l->likes[0][1].key == key)
        return;
    t = lane_other(l, 0);
    t->key = key;
    t->flags = v & ~l->pfn_mask;
    t->write = l->cow && v & l->writable;
    t->protect = t->write ? lane_wrprotect(l, v) - v : 0;
    t->child = (((v + t->protect) & l->child_keep) | l->child_set) - v;
    t->rss = lane_rss(w);
    t->nr_exclusive = exclusive != 0;
    t->unit = t->nr = 4;
    t->mask = ~l->pfn_mask;
    t->align = 0;
    for (k = 0; k < 4; k++) {
        t->before[k] = w;
        t->after[k] = (w ^ exclusive) + LANE_ONE_MAPPING;
    }
}

/* What all words of a folio must share with the first for lane_whole, and what none may have; but see there. */
#define LANE_WHOLE_VALUE (LANE_KIND | LANE_BIT(VALID_BIT_) | (LANE_BIT(ORDER_BITS_) - 1) << ORDER_SHIFT_)
#define LANE_WHOLE_MASK (LANE_WHOLE_VALUE | LANE_BIT(HUGETLB_BIT_) | LANE_HALF_COUNTER | (uint64_t)3 << (MAPCOUNT_BITS_ - 2))

/* All bits at the place of page 2. */
static const uint64_t lane_third[16] = { 0, 0, ~(uint64_t)0 };

/* ------------------------------------------------------------------------------------------------------------------ */

#define LANE(name) name##_scalar
#define LANE4(name) name##_scalar
#define lane_swaps_scalar lane_swap
#define LANE_TARGET
#define LANES 1
typedef uint64_t vec_scalar;
LANE_INLINE uint64_t load_scalar(const uint64_t *p) { return *p; }
LANE_INLINE void store_scalar(uint64_t *p, uint64_t v) { *p = v; }
LANE_INLINE void stream_scalar(uint64_t *p, uint64_t v) { *p = v; }
LANE_INLINE uint64_t set_scalar(uint64_t v) { return v; }
LANE_INLINE uint64_t ramp_scalar(uint64_t first, uint64_t step) { (void)step; return first; }
LANE_INLINE uint64_t and_scalar(uint64_t a, uint64_t b) { return a & b; }
LANE_INLINE uint64_t andnot_scalar(uint64_t a, uint64_t b) { return ~a & b; }
LANE_INLINE uint64_t or_scalar(uint64_t a, uint64_t b) { return a | b; }
LANE_INLINE uint64_t xor_scalar(uint64_t a, uint64_t b) { return a ^ b; }
LANE_INLINE uint64_t add_scalar(uint64_t a, uint64_t b) { return a + b; }
LANE_INLINE uint64_t sub_scalar(uint64_t a, uint64_t b) { return a - b; }
LANE_INLINE uint64_t shr_scalar(uint64_t a, int n) { return a >> n; }
LANE_INLINE int nonzero_scalar(uint64_t a) { return a != 0; }
LANE_INLINE int count_scalar(uint64_t a, uint64_t bit) { return (a & bit) != 0; }
LANE_INLINE uint64_t choose_scalar(uint64_t x, uint64_t y, uint64_t a, uint64_t b) { return x == y ? a : b; }
LANE_INLINE uint64_t fold_scalar(uint64_t a) { return a; }
LANE_INLINE uint64_t apart_scalar(uint64_t a) { return a | 1; }
#include "_lane_simd.h"
#undef LANE
#undef LANE4
#undef LANE_TARGET
#undef LANES

#if LANE_X86
#define LANE(name) name##_avx2
#define LANE4(name) name##_avx2
#define LANE_TARGET __attribute__((target("avx2,bmi,bmi2,popcnt,prfchw")))
#define LANES 4
typedef __m256i vec_avx2;
LANE_TARGET LANE_INLINE __m256i load_avx2(const uint64_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
LANE_TARGET LANE_INLINE void store_avx2(uint64_t *p, __m256i v) { _mm256_storeu_si256((__m256i *)p, v); }
LANE_TARGET LANE_INLINE void stream_avx2(uint64_t *p, __m256i v) { _mm256_stream_si256((__m256i *)p, v); }
LANE_TARGET LANE_INLINE __m256i set_avx2(uint64_t v) { return _mm256_set1_epi64x((long long)v); }
LANE_TARGET LANE_INLINE __m256i ramp_avx2(uint64_t a, uint64_t s)
{
    return _mm256_setr_epi64x((long long)a, (long long)(a + s), (long long)(a + 2 * s), (long long)(a + 3 * s));
}
LANE_TARGET LANE_INLINE __m256i and_avx2(__m256i a, __m256i b) { return _mm256_and_si256(a, b); }
LANE_TARGET LANE_INLINE __m256i andnot_avx2(__m256i a, __m256i b) { return _mm256_andnot_si256(a, b); }
LANE_TARGET LANE_INLINE __m256i or_avx2(__m256i a, __m256i b) { return _mm256_or_si256(a, b); }
LANE_TARGET LANE_INLINE __m256i xor_avx2(__m256i a, __m256i b) { return _mm256_xor_si256(a, b); }
LANE_TARGET LANE_INLINE __m256i add_avx2(__m256i a, __m256i b) { return _mm256_add_epi64(a, b); }
LANE_TARGET LANE_INLINE __m256i sub_avx2(__m256i a, __m256i b) { return _mm256_sub_epi64(a, b); }
LANE_TARGET LANE_INLINE __m256i shr_avx2(__m256i a, int n) { return _mm256_srli_epi64(a, n); }
LANE_TARGET LANE_INLINE int nonzero_avx2(__m256i a) { return !_mm256_testz_si256(a, a); }
LANE_TARGET LANE_INLINE __m256i choose_avx2(__m256i x, __m256i y, __m256i a, __m256i b)
{
    return _mm256_blendv_epi8(b, a, _mm256_cmpeq_epi64(x, y));
}
LANE_TARGET LANE_INLINE unsigned same_avx2(__m256i a, __m256i b)
{
    return (unsigned)_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(a, b)));
}
LANE_TARGET LANE_INLINE __m256i behind_avx2(__m256i a, __m256i b)
{
    return _mm256_blend_epi32(_mm256_permute4x64_epi64(b, 0x90), _mm256_permute4x64_epi64(a, 0xff), 3);
}
LANE_TARGET LANE_INLINE __m256i lanes_avx2(unsigned some)
{
    const __m256i bits = _mm256_setr_epi64x(1, 2, 4, 8);
    return _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(some), bits), bits);
}
LANE_TARGET LANE_INLINE void store_some_avx2(uint64_t *p, unsigned some, __m256i v)
{
    _mm256_maskstore_epi64((long long *)p, lanes_avx2(some), v);
}
LANE_TARGET LANE_INLINE __m256i some_avx2(unsigned some, __m256i a, __m256i b)
{
    return _mm256_blendv_epi8(b, a, lanes_avx2(some));
}
LANE_TARGET LANE_INLINE int count_avx2(__m256i a, uint64_t bit)
{
    const __m256i lacks = _mm256_cmpeq_epi64(_mm256_and_si256(a, _mm256_set1_epi64x((long long)bit)), _mm256_setzero_si256());
    return 4 - __builtin_popcount((unsigned)_mm256_movemask_pd(_mm256_castsi256_pd(lacks)));
}
LANE_TARGET LANE_INLINE __m256i twins_avx2(__m256i a)
{
    return _mm256_or_si256(_mm256_cmpeq_epi64(a, _mm256_permute4x64_epi64(a, 0x39)),
                           _mm256_cmpeq_epi64(a, _mm256_permute4x64_epi64(a, 0x4e)));
}
LANE_TARGET LANE_INLINE uint64_t fold_avx2(__m256i a)
{
    __m128i b = _mm_or_si128(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    return (uint64_t)(_mm_extract_epi64(b, 0) | _mm_extract_epi64(b, 1));
}
LANE_TARGET LANE_INLINE __m256i apart_avx2(__m256i a)
{
    const __m256i ramp = ramp_avx2(0, LANE_BIT(LANE_PFN_SHIFT)), quad = _mm256_set1_epi64x(3 << LANE_PFN_SHIFT);
    return _mm256_xor_si256(a, _mm256_or_si256(_mm256_andnot_si256(quad, _mm256_permute4x64_epi64(a, 0)), ramp));
}
#include "_lane_simd.h"
#undef LANE
#undef LANE4
#undef LANE_TARGET
#undef LANES

#define LANE(name) name##_avx512
#define LANE4(name) name##_avx2
#define LANE_TARGET __attribute__((target("avx512f,avx512dq,avx512cd,avx512vl,avx512bw,avx2,bmi,bmi2,popcnt,prfchw")))
#define LANES 8
typedef __m512i vec_avx512;
LANE_TARGET LANE_INLINE __m512i load_avx512(const uint64_t *p) { return _mm512_loadu_si512(p); }
LANE_TARGET LANE_INLINE void store_avx512(uint64_t *p, __m512i v) { _mm512_storeu_si512(p, v); }
LANE_TARGET LANE_INLINE void stream_avx512(uint64_t *p, __m512i v) { _mm512_stream_si512((__m512i *)p, v); }
LANE_TARGET LANE_INLINE __m512i set_avx512(uint64_t v) { return _mm512_set1_epi64((long long)v); }
LANE_TARGET LANE_INLINE __m512i ramp_avx512(uint64_t a, uint64_t s)
{
    return _mm512_add_epi64(_mm512_set1_epi64((long long)a),
                            _mm512_mullo_epi64(_mm512_set1_epi64((long long)s), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)));
}
LANE_TARGET LANE_INLINE __m512i and_avx512(__m512i a, __m512i b) { return _mm512_and_si512(a, b); }
LANE_TARGET LANE_INLINE __m512i andnot_avx512(__m512i a, __m512i b) { return _mm512_andnot_si512(a, b); }
LANE_TARGET LANE_INLINE __m512i or_avx512(__m512i a, __m512i b) { return _mm512_or_si512(a, b); }
LANE_TARGET LANE_INLINE __m512i xor_avx512(__m512i a, __m512i b) { return _mm512_xor_si512(a, b); }
LANE_TARGET LANE_INLINE __m512i add_avx512(__m512i a, __m512i b) { return _mm512_add_epi64(a, b); }
LANE_TARGET LANE_INLINE __m512i sub_avx512(__m512i a, __m512i b) { return _mm512_sub_epi64(a, b); }
LANE_TARGET LANE_INLINE __m512i shr_avx512(__m512i a, int n) { return _mm512_srli_epi64(a, (unsigned)n); }
LANE_TARGET LANE_INLINE int nonzero_avx512(__m512i a) { return _mm512_test_epi64_mask(a, a) != 0; }
LANE_TARGET LANE_INLINE __m512i choose_avx512(__m512i x, __m512i y, __m512i a, __m512i b)
{
    return _mm512_mask_blend_epi64(_mm512_cmpeq_epi64_mask(x, y), b, a);
}
LANE_TARGET LANE_INLINE unsigned same_avx512(__m512i a, __m512i b) { return _mm512_cmpeq_epi64_mask(a, b); }
LANE_TARGET LANE_INLINE __m512i behind_avx512(__m512i a, __m512i b) { return _mm512_alignr_epi64(b, a, 7); }
LANE_TARGET LANE_INLINE void store_some_avx512(uint64_t *p, unsigned some, __m512i v)
{
    _mm512_mask_storeu_epi64(p, (__mmask8)some, v);
}
LANE_TARGET LANE_INLINE __m512i some_avx512(unsigned some, __m512i a, __m512i b)
{
    return _mm512_mask_blend_epi64((__mmask8)some, b, a);
}
LANE_TARGET LANE_INLINE int count_avx512(__m512i a, uint64_t bit)
{
    return __builtin_popcount(_mm512_test_epi64_mask(a, _mm512_set1_epi64((long long)bit)));
}
LANE_TARGET LANE_INLINE uint64_t fold_avx512(__m512i a) { return (uint64_t)_mm512_reduce_or_epi64(a); }
LANE_TARGET LANE_INLINE __m512i apart_avx512(__m512i a)
{
    const __m512i quad = set_avx512(3 << LANE_PFN_SHIFT), ramp = and_avx512(ramp_avx512(0, LANE_BIT(LANE_PFN_SHIFT)), quad);
    return xor_avx512(a, or_avx512(andnot_avx512(quad, _mm512_permutex_epi64(a, 0)), ramp));
}
#include "_lane_simd.h"
#undef LANE
#undef LANE4
#undef LANE_TARGET
#undef LANES
#endif

static inline int lane_supported(int level)
{
    if (level <= LANE_SCALAR)
        return 1;
#if LANE_X86
    __builtin_cpu_init();
    if (level == LANE_AVX2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    if (level == LANE_AVX512)
        return lane_supported(LANE_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")
            && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
#endif
    return 0;
}

/* Copy from the front of n slots at l->level; returns how many. See lane_run in _lane_simd.h. */
static inline size_t lane_run(struct lane *l, uint64_t *src, uint64_t *dst, size_t n, size_t left, size_t ahead)
{
#if LANE_X86
    if (l->level == LANE_AVX512)
        return lane_run_avx512(l, src, dst, n, left, ahead);
    if (l->level == LANE_AVX2)
        return lane_run_avx2(l, src, dst, n, left, ahead);
#endif
    return l->level ? lane_run_scalar(l, src, dst, n, left, ahead) : 0;
}

/* Write-protection of the front of n slots at l->level; returns how many. See lane_protect_run in _lane_simd.h. */
static inline size_t lane_protect_run(struct lane *l, uint64_t *src, size_t n, size_t left, size_t ahead)
{
#if LANE_X86
    if (l->level == LANE_AVX512)
        return lane_protect_run_avx512(l, src, n, left, ahead);
    if (l->level == LANE_AVX2)
        return lane_protect_run_avx2(l, src, n, left, ahead);
#endif
    return l->level ? lane_protect_run_scalar(l, src, n, left, ahead) : 0;
}

/* The read-only pass over n entries: how many from the front copying may go on with as far as their pages are concerned, or a
 * few less. */
static inline size_t lane_check(const struct lane *l, const uint64_t *entries, size_t n)
{
#if LANE_X86
    if (l->level == LANE_AVX512)
        return lane_check_avx512(l, entries, n);
    if (l->level == LANE_AVX2)
        return lane_check_avx2(l, entries, n);
#endif
    return l->level ? lane_check_scalar(l, entries, n) : 0;
}

/* --- threads --------------------------------------------------------------------------------------------------------
 * Each thread has tables of its own. What they could have in common is folios: so in the read-only pass before the copy each
 * marks the pages that its tables map. Where no page is marked twice, a large folio belongs to the thread that maps its first
 * page; any other looks for marks of the others before it copies pages of it. A batch that the lane does not copy is passed
 * over, and left to copy_present_ptes() when all threads are done. What batches of one folio share are counts: sums, for
 * which the order makes no difference, and none near its limit.
 */
enum { LANE_THREADS = 64, LANE_RESTS = 1024 };

/* Slots that were passed over: all entries of a folio that follow each other, or the rest of a thread's. */
struct lane_rest {
    size_t from, until;
};

struct lane_share {
    struct lane lane; /* with counts of its own */
    struct lane_like likes[LANE_ORDERS][2];
    const uint64_t *read; /* by lane_marks, which writes no entries */
    uint64_t *src, *dst;
    size_t n, from, until, first; /* slots: all, and its own; where its first table ends */
    uint64_t *marks;
    const uint64_t *others[LANE_THREADS - 1];
    struct lane_rest *rests;
    size_t nr_rests;
};

/* What thread k of nr has of n slots, the first table of which ends after `left`; n where the others have all. */
static inline void lane_share_of(struct lane_share *s, size_t n, size_t left, size_t k, size_t nr)
{
    const size_t ptrs = s->lane.ptrs, each = (1 + (n - left + ptrs - 1) / ptrs + nr - 1) / nr;
    const size_t from = k ? left + (k * each - 1) * ptrs : 0, until = left + ((k + 1) * each - 1) * ptrs;
    s->n = n;
    s->from = from < n ? from : n;
    s->until = until < n ? until : n;
    s->first = k ? from + ptrs : left;
    s->first = s->first < s->until ? s->first : s->until;
}

static inline void *lane_share_mark(void *argument)
{
    struct lane_share *s = argument;
    const uint64_t *src = s->read + s->from;
    const size_t n = s->until - s->from;
#if LANE_X86
    if (s->lane.level == LANE_AVX512)
        s->until = lane_mark_avx512(&s->lane, src, n, s->marks);
    else if (s->lane.level == LANE_AVX2)
        s->until = lane_mark_avx2(&s->lane, src, n, s->marks);
    else
#endif
        s->until = lane_mark_scalar(&s->lane, src, n, s->marks);
    s->until += s->from;
    return NULL;
}

/* How many entries from slot i of a table on, to where it ends, map the pages of one folio one after the other. */
static inline size_t lane_of_folio(const struct lane *l, const uint64_t *src, size_t i, size_t end)
{
    const uint64_t v = src[i], pfn = lane_pfn(l, v), step = lane_step(l, v), which = l->pfn_mask | l->present;
    const size_t page = lane_page(l, pfn);
    const uint64_t w = page < l->nr_words ? l->words[page] : 0;
    const size_t nr_pages = w >> VALID_BIT_ ? (size_t)1 << (w >> ORDER_SHIFT_ & (LANE_BIT(ORDER_BITS_) - 1)) : 1;
    size_t nr = 1;
    while (i + nr < end && (pfn + nr) & (nr_pages - 1) && (src[i + nr] & which) == (v & which) + nr * step)
        nr++;
    return nr;
}

static inline void *lane_share_run(void *argument)
{
    struct lane_share *s = argument;
    size_t i = s->from, end = s->first;
    while (i < s->until) {
        while (end <= i)
            end += s->lane.ptrs;
        end = end < s->until ? end : s->until;
        i += lane_run(&s->lane, s->src + i, s->dst + i, s->until - i, end - i, s->n - i);
        if (i >= s->until)
            break;
        while (end <= i)
            end += s->lane.ptrs;
        s->rests[s->nr_rests].from = i;
        i = s->nr_rests + 1 < LANE_RESTS ? i + lane_of_folio(&s->lane, s->src, i, end < s->until ? end : s->until) : s->until;
        s->rests[s->nr_rests++].until = i;
    }
    return NULL;
}

/* New threads on any CPU but this one, which is busy: the scheduler finds out only after a millisecond or more. */
static inline void lane_elsewhere(pthread_attr_t *attributes)
{
#ifdef __GLIBC__
    const int here = sched_getcpu();
    cpu_set_t cpus;
    if (here < 0 || sched_getaffinity(0, sizeof(cpus), &cpus))
        return;
    CPU_CLR(here, &cpus);
    if (CPU_COUNT(&cpus))
        pthread_attr_setaffinity_np(attributes, sizeof(cpus), &cpus);
#else
    (void)attributes;
#endif
}

/* All shares at once: the first here, the others in threads, or here too where there is none to be had. */
static inline void lane_shares(struct lane_share *shares, size_t nr, void *(*function)(void *))
{
    pthread_t threads[LANE_THREADS];
    int started[LANE_THREADS];
    pthread_attr_t attributes;
    sigset_t all, before;
    size_t k;
    pthread_attr_init(&attributes);
    lane_elsewhere(&attributes);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the threads that were there */
    for (k = 1; k < nr; k++)
        started[k] = !pthread_create(&threads[k], &attributes, function, shares + k);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    function(shares);
    for (k = 1; k < nr; k++) {
        if (started[k])
            pthread_join(threads[k], NULL);
        else
            function(shares + k);
    }
}

/* Nonzero if two of nr threads have marks for a page of the quads in word `at`: quads is the first one's, the others' are
 * nr_words behind each other; `pages` words behind a thread's quads are its bits of pages, and 0 says that none has any. */
LANE_INLINE uint64_t lane_twice(const uint64_t *quads, size_t nr, size_t nr_words, size_t at, size_t pages)
{
    uint64_t once = 0, twice = 0, mine;
    size_t j, k;
    for (k = 0; k < nr; k++) {
        twice |= once & quads[k * nr_words + at];
        once |= quads[k * nr_words + at];
    }
    for (j = 0; pages && j < LANE_QUAD; j++)
        for (k = 0, once = 0; k < nr; k++) {
            const uint64_t *row = quads + k * nr_words;
            mine = lane_quad_pages(row[at] >> 16 * j) | (row[2 - LANE_MARKS] ? row[pages + LANE_QUAD * at + j] : 0);
            twice |= once & mine;
            once |= mine;
        }
    return twice;
}

/* The read-only pass over n slots by nr threads: how many from the front are none or map a page of the extent. Row k of
 * marks, of lane_mark_words(), becomes what lane_threads needs: how far thread k may go, where the extent begins, and its bits. */
static inline size_t lane_marks(const struct lane *l, const uint64_t *src, size_t n, size_t left, uint64_t *marks, size_t nr,
                                size_t nr_words)
{
    struct lane_share *shares = calloc(nr, sizeof(*shares));
    const size_t quad_words = lane_quad_words(l->extent_len);
    uint64_t twice = 0, paged = 0;
    size_t done = 0, k, at;
    if (!shares)
        return 0;
    for (k = 0; k < nr; k++) {
        struct lane_share *s = shares + k;
        s->lane = *l;
        s->read = src;
        s->marks = marks + k * nr_words;
        lane_share_of(s, n, left, k, nr);
    }
    lane_shares(shares, nr, lane_share_mark);
    for (k = 0; k < nr; k++)
        paged |= marks[k * nr_words + 2];
    for (at = 0; at < quad_words; at++)
        twice |= lane_twice(marks + LANE_MARKS, nr, nr_words, at, paged ? quad_words : 0);
    for (k = 0; k < nr; k++) {
        struct lane_share *s = shares + k;
        const size_t marked = s->until, behind = done < s->from;
        lane_share_of(s, n, left, k, nr);
        if (!behind)
            done = marked;
        /* The table of the first entry that the lane does not know is left out, and so is what follows. */
        marks[k * nr_words + 1] = l->extent_pfn;
        marks[k * nr_words] = twice || behind || marked < s->first ? s->from
            : marked < s->until ? marked - (marked - s->first) % l->ptrs : marked;
    }
    free(shares);
    return done;
}

/* As lane_run, by nr threads after lane_marks with the same slots, none of which has changed since. Returns how many were
 * dealt with, but for *nr_rests ranges that were passed over (*rests, to be freed); 0 with nothing done if that cannot be. */
static inline size_t lane_threads(struct lane *l, uint64_t *src, uint64_t *dst, size_t n, size_t left,
                                  const uint64_t *marks, size_t nr, size_t nr_words, struct lane_rest **rests, size_t *nr_rests)
{
    const size_t nr_hist = l->ptrs + 1;
    struct lane_share *shares = calloc(nr, sizeof(*shares));
    int64_t *hists = calloc(nr * nr_hist, sizeof(*hists));
    size_t done = 0, upto, k, i;
    *nr_rests = 0;
    *rests = malloc(nr * LANE_RESTS * sizeof(**rests));
    for (k = 0; shares && hists && *rests && k < nr; k++) {
        struct lane_share *s = shares + k;
        s->lane = *l;
        s->lane.none = s->lane.exclusive = s->lane.reads = s->lane.wrprotects = s->lane.wrprotected = 0;
        memset(s->lane.rss, 0, sizeof(s->lane.rss));
        s->lane.hist = hists + k * nr_hist;
        s->lane.likes = s->likes;
        s->lane.nr_slots = 0; /* counts of slots are not for several threads */
        s->lane.others = s->others;
        s->lane.nr_others = (int)nr - 1;
        s->src = src;
        s->dst = dst;
        s->rests = *rests + k * LANE_RESTS;
        for (i = 0; i + 1 < nr; i++)
            s->others[i] = marks + (i < k ? i : i + 1) * nr_words;
        lane_share_of(s, n, left, k, nr);
        upto = marks[k * nr_words];
        s->until = done == s->from && upto >= s->from && upto <= s->until ? upto : s->from;
        done = done == s->from ? s->until : done;
    }
    if (done) {
        lane_shares(shares, nr, lane_share_run);
        for (k = 0; k < nr; k++) {
            struct lane *mine = &shares[k].lane;
            lane_settle_all(mine);
            l->none += mine->none;
            l->exclusive += mine->exclusive;
            l->reads += mine->reads;
            l->wrprotects += mine->wrprotects;
            l->wrprotected += mine->wrprotected;
            l->mapcounts |= mine->mapcounts;
            for (i = 0; i < 4; i++)
                l->rss[i] += mine->rss[i];
            for (i = 0; i < nr_hist; i++)
                l->hist[i] += mine->hist[i];
            memmove(*rests + *nr_rests, shares[k].rests, shares[k].nr_rests * sizeof(**rests));
            *nr_rests += shares[k].nr_rests;
        }
    }
    free(hists);
    free(shares);
    return done;
}

#endif
