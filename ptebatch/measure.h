/*
 * C kernels for measuring; ptebatch/_measure.pyx is their only user.
 *
 * Three kinds:
 * - stream_*: the streaming limit. Rewrites a table and writes a second one from it, and does nothing else:
 *   src &= ~a; dst = src & ~b. One function per SIMD level, each in three variants (enum stream_variant), because which
 *   one is fastest depends on the size and the machine. The level is chosen at run time; a function is only called
 *   where the CPU has its instructions (simd_supported). stream_clear_*: the same for write-protection, which writes one
 *   table only: src &= ~a; of the variants, those that need no second table.
 * - plain_copy_*: fork's copy of private anonymous memory as straightforward C over a struct of arrays, one entry at a
 *   time and batched. No intrinsics, no prefetching: what one writes before tuning.
 * - kernel_copy_*: the same copy in the kernel's shape: a 64-byte record for each page, a folio found through its page,
 *   counters and flags changed by locked instructions, entries written one by one. It is there to show what batching
 *   saves the kernel, not to be fast.
 */
#ifndef PTEBATCH_MEASURE_H
#define PTEBATCH_MEASURE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define PTEBATCH_X86 1
#include <immintrin.h>
#else
#define PTEBATCH_X86 0
#endif

#if defined(__VERSION__) && defined(__clang__)
#define PTEBATCH_COMPILER __VERSION__
#elif defined(__VERSION__)
#define PTEBATCH_COMPILER "gcc " __VERSION__
#else
#define PTEBATCH_COMPILER "unknown"
#endif
#ifndef PTEBATCH_CFLAGS
#define PTEBATCH_CFLAGS "unknown"
#endif

enum simd_level { SIMD_SCALAR, SIMD_AVX2, SIMD_AVX512 };
enum stream_variant { STREAM_PLAIN, STREAM_PREFETCH, STREAM_NONTEMPORAL };

#define STREAM_AHEAD 64 /* entries: eight cache lines */

static inline int simd_supported(int level)
{
    if (level == SIMD_SCALAR)
        return 1;
#if PTEBATCH_X86
    __builtin_cpu_init();
    if (level == SIMD_AVX2)
        return __builtin_cpu_supports("avx2") != 0;
    if (level == SIMD_AVX512)
        return __builtin_cpu_supports("avx512f") != 0;
#endif
    return 0;
}

static inline void stream_scalar(uint64_t *src, uint64_t *dst, size_t n, uint64_t a, uint64_t b, int variant)
{
    size_t i = 0;
#if defined(__GNUC__) || defined(__clang__)
    if (variant == STREAM_PREFETCH) {
        for (; i + 8 <= n; i += 8) {
            __builtin_prefetch(src + i + STREAM_AHEAD, 1);
            __builtin_prefetch(dst + i + STREAM_AHEAD, 1);
            for (size_t k = i; k < i + 8; k++) {
                src[k] &= ~a;
                dst[k] = src[k] & ~b;
            }
        }
    }
#endif
#if PTEBATCH_X86
    if (variant == STREAM_NONTEMPORAL) {
        for (; i < n; i++) {
            src[i] &= ~a;
            _mm_stream_si64((long long *)(dst + i), (long long)(src[i] & ~b));
        }
        _mm_sfence();
    }
#endif
    for (; i < n; i++) {
        src[i] &= ~a;
        dst[i] = src[i] & ~b;
    }
}

static inline void stream_clear_scalar(uint64_t *src, size_t n, uint64_t a, int variant)
{
    for (size_t i = 0; i < n; i++) {
#if defined(__GNUC__) || defined(__clang__)
        if (variant == STREAM_PREFETCH && i % 8 == 0)
            __builtin_prefetch(src + i + STREAM_AHEAD, 1);
#endif
        src[i] &= ~a;
    }
    (void)variant;
}

#if PTEBATCH_X86
/*
 * The AVX2 and the AVX-512 function differ in their width alone; a non-temporal store needs its address aligned to it.
 */
#define STREAM_FUNCTION(NAME, TARGET, WIDTH, VECTOR, SET1, LOAD, STORE, STREAM, ANDNOT)                                \
    __attribute__((target(TARGET))) static void NAME(uint64_t *src, uint64_t *dst, size_t n, uint64_t a, uint64_t b,   \
                                                     int variant)                                                      \
    {                                                                                                                  \
        const VECTOR va = SET1((long long)a), vb = SET1((long long)b);                                                 \
        size_t i = 0;                                                                                                  \
        for (; variant == STREAM_NONTEMPORAL && i < n && (uintptr_t)(dst + i) % (WIDTH * 8); i++) {                    \
            src[i] &= ~a;                                                                                              \
            dst[i] = src[i] & ~b;                                                                                      \
        }                                                                                                              \
        for (; i + 8 <= n; i += 8) {                                                                                   \
            if (variant != STREAM_PLAIN)                                                                               \
                __builtin_prefetch(src + i + STREAM_AHEAD, 1);                                                         \
            if (variant == STREAM_PREFETCH)                                                                            \
                __builtin_prefetch(dst + i + STREAM_AHEAD, 1);                                                         \
            for (size_t k = i; k < i + 8; k += WIDTH) {                                                                \
                VECTOR v = ANDNOT(va, LOAD((void *)(src + k)));                                                        \
                STORE((void *)(src + k), v);                                                                           \
                v = ANDNOT(vb, v);                                                                                     \
                if (variant == STREAM_NONTEMPORAL)                                                                     \
                    STREAM((void *)(dst + k), v);                                                                      \
                else                                                                                                   \
                    STORE((void *)(dst + k), v);                                                                       \
            }                                                                                                          \
        }                                                                                                              \
        if (variant == STREAM_NONTEMPORAL)                                                                             \
            _mm_sfence();                                                                                              \
        for (; i < n; i++) {                                                                                           \
            src[i] &= ~a;                                                                                              \
            dst[i] = src[i] & ~b;                                                                                      \
        }                                                                                                              \
    }

#define STREAM_CLEAR_FUNCTION(NAME, TARGET, WIDTH, VECTOR, SET1, LOAD, STORE, ANDNOT)                                  \
    __attribute__((target(TARGET))) static void NAME(uint64_t *src, size_t n, uint64_t a, int variant)                 \
    {                                                                                                                  \
        const VECTOR va = SET1((long long)a);                                                                          \
        size_t i = 0;                                                                                                  \
        for (; i + 8 <= n; i += 8) {                                                                                   \
            if (variant == STREAM_PREFETCH)                                                                            \
                __builtin_prefetch(src + i + STREAM_AHEAD, 1);                                                         \
            for (size_t k = i; k < i + 8; k += WIDTH)                                                                  \
                STORE((void *)(src + k), ANDNOT(va, LOAD((void *)(src + k))));                                         \
        }                                                                                                              \
        for (; i < n; i++)                                                                                             \
            src[i] &= ~a;                                                                                              \
    }

STREAM_FUNCTION(stream_avx2, "avx2", 4, __m256i, _mm256_set1_epi64x, _mm256_loadu_si256, _mm256_storeu_si256,
                _mm256_stream_si256, _mm256_andnot_si256)
STREAM_FUNCTION(stream_avx512, "avx512f", 8, __m512i, _mm512_set1_epi64, _mm512_loadu_si512, _mm512_storeu_si512,
                _mm512_stream_si512, _mm512_andnot_si512)
STREAM_CLEAR_FUNCTION(stream_clear_avx2, "avx2", 4, __m256i, _mm256_set1_epi64x, _mm256_loadu_si256,
                      _mm256_storeu_si256, _mm256_andnot_si256)
STREAM_CLEAR_FUNCTION(stream_clear_avx512, "avx512f", 8, __m512i, _mm512_set1_epi64, _mm512_loadu_si512,
                      _mm512_storeu_si512, _mm512_andnot_si512)
#endif

/* For this and stream(), the caller has asked simd_supported(). */
static inline void stream_clear(uint64_t *src, size_t n, uint64_t a, int level, int variant)
{
#if PTEBATCH_X86
    if (level == SIMD_AVX512) {
        stream_clear_avx512(src, n, a, variant);
        return;
    }
    if (level == SIMD_AVX2) {
        stream_clear_avx2(src, n, a, variant);
        return;
    }
#endif
    (void)level;
    stream_clear_scalar(src, n, a, variant);
}

static inline void stream(uint64_t *src, uint64_t *dst, size_t n, uint64_t a, uint64_t b, int level, int variant)
{
#if PTEBATCH_X86
    if (level == SIMD_AVX512) {
        stream_avx512(src, dst, n, a, b, variant);
        return;
    }
    if (level == SIMD_AVX2) {
        stream_avx2(src, dst, n, a, b, variant);
        return;
    }
#endif
    (void)level;
    stream_scalar(src, dst, n, a, b, variant);
}

/* Struct of arrays: the entries of one area, and the pages and folios they map. Pages count from PFN `base`. */
struct plain_state {
    uint64_t *src;
    uint64_t *dst;
    size_t nr_ptes;
    const int32_t *folio_of; /* by page: its folio */
    int32_t *mapcount;       /* by page */
    uint8_t *exclusive;      /* by page */
    size_t nr_pages;
    const int64_t *folio_end; /* by folio: the page behind its last one */
    int32_t *refcount;        /* by folio */
    uint64_t base, present, write, young, dirty, saved_dirty_shift, pfn_shift, pfn_mask, ptrs_per_pte;
};

static inline uint64_t plain_wrprotect(const struct plain_state *s, uint64_t pte)
{
    return (pte & ~(s->write | s->dirty)) | (pte & s->dirty) << s->saved_dirty_shift;
}

/* Both return nr_ptes, or the first entry that maps no page of the state. */
static inline size_t plain_copy_single(const struct plain_state *state)
{
    const struct plain_state s = *state;
    for (size_t i = 0; i < s.nr_ptes; i++) {
        uint64_t pte = s.src[i];
        size_t page = ((pte & s.pfn_mask) >> s.pfn_shift) - s.base;
        if (!(pte & s.present) || page >= s.nr_pages)
            return i;
        s.refcount[s.folio_of[page]]++;
        s.mapcount[page]++;
        s.exclusive[page] = 0;
        if (pte & s.write)
            s.src[i] = pte = plain_wrprotect(&s, pte);
        s.dst[i] = pte & ~s.young;
    }
    return s.nr_ptes;
}

static inline size_t plain_copy_batched(const struct plain_state *state)
{
    const struct plain_state s = *state;
    const uint64_t step = (uint64_t)1 << s.pfn_shift;
    size_t i = 0;
    while (i < s.nr_ptes) {
        uint64_t pte = s.src[i], writable = pte;
        size_t page = ((pte & s.pfn_mask) >> s.pfn_shift) - s.base, nr, max_nr, left;
        if (!(pte & s.present) || page >= s.nr_pages)
            return i;
        int32_t folio = s.folio_of[page];
        if (page >= (size_t)s.folio_end[folio])
            return i;
        max_nr = (size_t)s.folio_end[folio] - page;
        left = s.ptrs_per_pte - i % s.ptrs_per_pte;
        if (left > s.nr_ptes - i)
            left = s.nr_ptes - i;
        if (max_nr > left)
            max_nr = left;
        uint64_t expected = plain_wrprotect(&s, pte) & ~s.young;
        for (nr = 1; nr < max_nr; nr++) {
            uint64_t next = s.src[i + nr];
            expected += step;
            if ((plain_wrprotect(&s, next) & ~s.young) != expected)
                break;
            writable |= next;
        }
        s.refcount[folio] += (int32_t)nr;
        for (size_t k = page; k < page + nr; k++)
            s.mapcount[k]++;
        for (size_t k = page; k < page + nr; k++)
            s.exclusive[k] = 0;
        if (writable & s.write) {
            for (size_t k = i; k < i + nr; k++)
                s.src[k] = plain_wrprotect(&s, s.src[k]);
            pte = plain_wrprotect(&s, pte);
        }
        pte &= ~s.young;
        for (size_t k = i; k < i + nr; k++, pte += step)
            s.dst[k] = pte;
        i += nr;
    }
    return s.nr_ptes;
}

/*
 * One page's record, as large as the kernel's struct page. What the kernel keeps in the second page of a large folio is
 * used there only. Counts are plain.
 */
struct kernel_page {
    uint64_t flags;
    uint64_t compound_head; /* of a tail page: its head's index << 1 | 1 */
    uint64_t mapping;       /* bit 0: anonymous */
    uint64_t mm_ids;        /* second page: two ids of 20 bits; bit 62: shared, bit 63: locked */
    int32_t mm_id_mapcount[2];
    int32_t large_mapcount;
    uint32_t order;
    int32_t mapcount;
    int32_t refcount;
    uint64_t memcg;
};

#define KPAGE_HEAD ((uint64_t)1 << 6)
#define KPAGE_ANON_EXCLUSIVE ((uint64_t)1 << 17)
#define KPAGE_ID_BITS 20
#define KPAGE_SHARED ((uint64_t)1 << 62)
#define KPAGE_LOCKED ((uint64_t)1 << 63)

#define atomic_read(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define atomic_set(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define atomic_add(p, n) ((void)__atomic_fetch_add((p), (n), __ATOMIC_SEQ_CST))

struct kernel_state {
    struct plain_state plain; /* src, dst, nr_ptes, nr_pages and the layout's bits; not its counters */
    struct kernel_page *pages;
    uint64_t dst_mm_id;
    int large_mapcount, mm_id, page_mapcount;
};

static inline struct kernel_page *kernel_folio(const struct kernel_state *s, struct kernel_page *page)
{
    uint64_t head = atomic_read(&page->compound_head);
    return head & 1 ? s->pages + (head >> 1) : page;
}

/* v6.15: the large mapcount and the counts of two owners under one bit lock. */
static inline void kernel_add_mm_mapping(const struct kernel_state *s, struct kernel_page *folio, int32_t nr)
{
    struct kernel_page *second = folio + 1;
    const uint64_t id_mask = ((uint64_t)1 << KPAGE_ID_BITS) - 1, mm = s->dst_mm_id;
    while (__atomic_fetch_or(&second->mm_ids, KPAGE_LOCKED, __ATOMIC_ACQUIRE) & KPAGE_LOCKED)
        ;
    uint64_t ids = atomic_read(&second->mm_ids);
    uint64_t id0 = ids & id_mask, id1 = ids >> KPAGE_ID_BITS & id_mask;
    second->large_mapcount += nr;
    if (id0 == mm) {
        second->mm_id_mapcount[0] += nr;
    } else if (id1 == mm) {
        second->mm_id_mapcount[1] += nr;
    } else if (!id0) {
        ids |= mm | (second->large_mapcount != nr ? KPAGE_SHARED : 0);
        second->mm_id_mapcount[0] = nr;
    } else if (!id1) {
        ids |= mm << KPAGE_ID_BITS | KPAGE_SHARED;
        second->mm_id_mapcount[1] = nr;
    }
    __atomic_store_n(&second->mm_ids, ids & ~KPAGE_LOCKED, __ATOMIC_RELEASE);
}

static inline void kernel_dup(const struct kernel_state *s, struct kernel_page *folio, struct kernel_page *page,
                              int32_t nr)
{
    int large = (atomic_read(&folio->flags) & KPAGE_HEAD) != 0, anon = atomic_read(&folio->mapping) & 1;
    atomic_add(&folio->refcount, nr);
    for (int32_t k = 0; k < nr; k++) {
        if (anon && atomic_read(&page[k].flags) & KPAGE_ANON_EXCLUSIVE)
            (void)__atomic_fetch_and(&page[k].flags, ~KPAGE_ANON_EXCLUSIVE, __ATOMIC_SEQ_CST);
        if (!large || s->page_mapcount)
            atomic_add(&page[k].mapcount, 1);
    }
    if (large && s->mm_id)
        kernel_add_mm_mapping(s, folio, nr);
    else if (large && s->large_mapcount)
        atomic_add(&folio[1].large_mapcount, nr);
}

/* The hardware may set bits meanwhile: hence a compare-and-exchange (v6.6, SavedDirty). */
static inline void kernel_set_wrprotect(const struct plain_state *s, uint64_t *ptep)
{
    uint64_t old = atomic_read(ptep);
    while (!__atomic_compare_exchange_n(ptep, &old, plain_wrprotect(s, old), 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
        ;
}

/* Returns nr_ptes, or the first entry that maps no page of the state. */
static inline size_t kernel_copy(const struct kernel_state *state, int batched)
{
    const struct kernel_state k = *state;
    const struct plain_state *const s = &k.plain;
    const uint64_t step = (uint64_t)1 << s->pfn_shift;
    size_t i = 0;
    while (i < s->nr_ptes) {
        uint64_t pte = atomic_read(s->src + i), writable = pte;
        size_t page = ((pte & s->pfn_mask) >> s->pfn_shift) - s->base, nr = 1;
        if (!(pte & s->present) || page >= s->nr_pages)
            return i;
        struct kernel_page *folio = kernel_folio(&k, k.pages + page);
        if (batched && atomic_read(&folio->flags) & KPAGE_HEAD) {
            size_t max_nr = (size_t)(folio - k.pages) + ((size_t)1 << folio[1].order) - page;
            size_t left = s->ptrs_per_pte - i % s->ptrs_per_pte;
            if (left > s->nr_ptes - i)
                left = s->nr_ptes - i;
            if (max_nr > left)
                max_nr = left;
            uint64_t expected = plain_wrprotect(s, pte) & ~s->young;
            for (; nr < max_nr; nr++) {
                uint64_t next = atomic_read(s->src + i + nr);
                expected += step;
                if ((plain_wrprotect(s, next) & ~s->young) != expected)
                    break;
                writable |= next;
            }
        }
        kernel_dup(&k, folio, k.pages + page, (int32_t)nr);
        if (writable & s->write) {
            for (size_t j = i; j < i + nr; j++)
                kernel_set_wrprotect(s, s->src + j);
            pte = plain_wrprotect(s, pte);
        }
        pte &= ~s->young;
        for (size_t j = i; j < i + nr; j++, pte += step)
            atomic_set(s->dst + j, pte);
        i += nr;
    }
    return s->nr_ptes;
}

static inline size_t kernel_copy_single(const struct kernel_state *state)
{
    return kernel_copy(state, 0);
}

static inline size_t kernel_copy_batched(const struct kernel_state *state)
{
    return kernel_copy(state, 1);
}

#endif
