/*
 * The lane's loops over entries, once for every SIMD level: _lane.h includes this file with LANE(name) giving a name its
 * level's suffix, LANE_TARGET the level's target attribute, LANES the entries in a vector, and the vector operations
 * load, store, set (all lanes), ramp (first, first + step, ...), and, andnot (~a & b), or, xor, add, sub, shl, shr,
 * nonzero (any lane), count (lanes with a bit set), mask (all ones in those lanes), fold (OR of all lanes).
 */
#define V LANE(vec)

/* pte_wrprotect() */
LANE_TARGET LANE_INLINE V LANE(lane_wp)(const struct lane *l, V v)
{
    V dirty;
    v = LANE(andnot)(LANE(set)(l->write), v);
    dirty = LANE(and)(v, LANE(set)(l->fold_dirty));
    return LANE(or)(LANE(xor)(v, dirty), LANE(shl)(dirty, X86_SAVED_DIRTY_SHIFT));
}

/* Where the pages of LANES entries lie in the extent; *bad is nonzero if one is not present, is special or not in it. */
LANE_TARGET LANE_INLINE V LANE(lane_extent)(const struct lane *l, V v, V *bad)
{
    V at = LANE(sub)(LANE(shr)(LANE(and)(v, LANE(set)(l->pfn_mask)), X86_PFN_SHIFT), LANE(set)(l->extent_pfn));
    V beyond = LANE(or)(at, LANE(sub)(LANE(set)(l->extent_len - 1), at));
    V other = LANE(xor)(LANE(and)(v, LANE(set)(l->valid | l->special)), LANE(set)(l->valid));
    *bad = LANE(or)(LANE(and)(beyond, LANE(set)(LANE_BIT(63))), other);
    return at;
}

/* The read-only pass: entries from the front, LANES at a time, that are none or whose page is in the extent. */
LANE_TARGET static size_t LANE(lane_check)(const struct lane *l, const uint64_t *entries, size_t n)
{
    size_t i = 0;
    V bad, v;
    for (; i + LANES <= n; i += LANES) {
        v = LANE(load)(entries + i);
        LANE(lane_extent)(l, v, &bad);
        if (LANE(nonzero)(bad) && LANE(fold)(LANE(xor)(v, LANE(set)(l->none_value))))
            break;
    }
    return i;
}

LANE_TARGET LANE_INLINE void LANE(lane_prefetch)(const struct lane *l, const uint64_t *entries, int large)
{
    uint64_t at[LANES];
    V bad;
    int k;
    LANE(store)(at, LANE(lane_extent)(l, LANE(load)(entries), &bad));
    for (k = 0; k < LANES; k += large ? LANES : 1) {
        uintptr_t offset = (uintptr_t)(l->extent_at + at[k]) * sizeof(uint64_t);
        LANE_PREFETCH((const void *)((uintptr_t)l->words + offset));
        if (large)
            LANE_PREFETCH((const void *)((uintptr_t)l->aux + offset));
    }
}

/* Small folios of one kind from the front of n entries, LANES at a time; returns how many. */
LANE_TARGET LANE_INLINE size_t LANE(lane_group)(struct lane *l, uint64_t *src, uint64_t *dst, size_t n, size_t ahead,
                                                uint64_t kind)
{
    uint64_t *const words = l->words + l->extent_at;
    const uint64_t mask = l->small_mask | LANE_KIND, value = l->small_value | kind;
    const uint64_t clear = kind >> ANON_BIT_ & 1 ? LANE_BIT(AE_BIT_) : 0;
    const V write = LANE(set)(l->write), child_clear = LANE(set)(l->child_clear);
    const int cow = l->cow, prefetch = l->prefetch;
    uint64_t at[LANES], exclusive = 0, wrprotected = 0;
    size_t i = 0;
    int k;
    if (l->writable != l->write)
        return 0;
    for (; i + LANES <= n; i += LANES) {
        V v = LANE(load)(src + i), bad;
        uint64_t differ = 0;
        LANE(store)(at, LANE(lane_extent)(l, v, &bad));
        if (LANE(nonzero)(bad))
            break;
        if (prefetch && i + LANE_AHEAD_SMALL + LANES <= ahead)
            LANE(lane_prefetch)(l, src + i + LANE_AHEAD_SMALL, 0);
        for (k = 0; k < LANES; k++)
            differ |= words[at[k]] ^ value;
        if (differ & mask)
            break;
        /* Read again: two entries of the group may map the same page. */
        for (k = 0; k < LANES; k++) {
            uint64_t w = words[at[k]], x = w & clear;
            exclusive += x >> AE_BIT_;
            words[at[k]] = (w ^ x) + LANE_ONE_MAPPING;
        }
        if (cow) {
            int writable = LANE(count)(v, X86_WRITE_BIT);
            if (LANE_LIKELY(writable == LANES)) {
                v = LANE(lane_wp)(l, v);
                LANE(store)(src + i, v);
            } else if (writable) {
                V m = LANE(mask)(v, X86_WRITE_BIT);
                v = LANE(or)(LANE(and)(m, LANE(lane_wp)(l, v)), LANE(andnot)(m, v));
                LANE(store)(src + i, v);
            }
            wrprotected += (uint64_t)writable;
        }
        LANE(store)(dst + i, LANE(andnot)(child_clear, v));
    }
    (void)write;
    l->hist[1] += (int64_t)i;
    l->rss[lane_rss(kind)] += (int64_t)i;
    l->exclusive += (int64_t)exclusive;
    l->wrprotects += (int64_t)wrprotected;
    l->wrprotected += (int64_t)wrprotected;
    return i;
}

/* One more mapping of LANES pages of a large folio; clear is the exclusive bit where the folio is anonymous. */
LANE_TARGET LANE_INLINE void LANE(lane_pages)(struct lane *l, uint64_t *words, uint64_t clear)
{
    V w = LANE(load)(words);
    l->exclusive += LANE(count)(LANE(and)(w, LANE(set)(clear)), AE_BIT_);
    if (LANE(nonzero)(LANE(and)(w, LANE(set)((uint64_t)3 << (MAPCOUNT_BITS_ - 2)))))
        l->mapcounts |= LANE(fold)(w);
    LANE(store)(words, LANE(add)(LANE(andnot)(LANE(set)(clear), w), LANE(set)(l->page_mapcount)));
}

/* A folio mapped whole by the n entries from src, n constant where inlined: 1, or 0 with nothing done if it is not. */
LANE_TARGET LANE_INLINE int LANE(lane_whole)(struct lane *l, uint64_t *src, uint64_t *dst, uint64_t *words, size_t n,
                                             uint64_t v, uint64_t step, uint64_t clear, int *any)
{
    V wp[16 / LANES], seen = LANE(set)(0), differ = LANE(set)(0), next = LANE(set)(step * LANES);
    V expected = LANE(ramp)(lane_wrprotect(l, v) & ~l->clear, step);
    size_t k;
    for (k = 0; k < n / LANES; k++) {
        V cur = LANE(load)(src + k * LANES);
        seen = LANE(or)(seen, cur);
        wp[k] = LANE(lane_wp)(l, cur);
        differ = LANE(or)(differ, LANE(xor)(LANE(andnot)(LANE(set)(l->clear), wp[k]), expected));
        expected = LANE(add)(expected, next);
    }
    if (LANE(nonzero)(differ))
        return 0;
    *any = LANE(nonzero)(LANE(and)(seen, LANE(set)(l->writable)));
    if (*any && l->cow)
        for (k = 0; k < n / LANES; k++)
            LANE(store)(src + k * LANES, wp[k]);
    expected = LANE(ramp)(lane_child(l, v, *any), step);
    for (k = 0; k < n / LANES; k++) {
        LANE(store)(dst + k * LANES, expected);
        expected = LANE(add)(expected, next);
        LANE(lane_pages)(l, words + k * LANES, clear);
    }
    return 1;
}

/* folio_pte_batch() over n entries, the first included; any says whether one of them is writable. */
LANE_TARGET LANE_INLINE size_t LANE(lane_scan)(const struct lane *l, const uint64_t *src, size_t n, uint64_t v, uint64_t step,
                                          int *any)
{
    uint64_t normal = lane_wrprotect(l, v) & ~l->clear, seen = 0;
    V expected = LANE(ramp)(normal, step), next = LANE(set)(step * LANES), many = LANE(set)(0);
    size_t k = 0;
    for (; k + LANES <= n; k += LANES) {
        V cur = LANE(load)(src + k);
        if (LANE(nonzero)(LANE(xor)(LANE(andnot)(LANE(set)(l->clear), LANE(lane_wp)(l, cur)), expected)))
            break;
        many = LANE(or)(many, cur);
        expected = LANE(add)(expected, next);
    }
    seen = LANE(fold)(many);
    for (; k < n && (lane_wrprotect(l, src[k]) & ~l->clear) == normal + k * step; k++)
        seen |= src[k];
    *any = (seen & l->writable) != 0;
    return k;
}

/* The n entries of a batch and the words of their pages, after lane_scan. */
LANE_TARGET LANE_INLINE void LANE(lane_rewrite)(struct lane *l, uint64_t *src, uint64_t *dst, uint64_t *words, size_t n,
                                           uint64_t v, uint64_t step, uint64_t clear, int any)
{
    uint64_t first = lane_child(l, v, any);
    V child = LANE(ramp)(first, step), next = LANE(set)(step * LANES);
    size_t k = 0;
    for (; k + LANES <= n; k += LANES) {
        if (any && l->cow)
            LANE(store)(src + k, LANE(lane_wp)(l, LANE(load)(src + k)));
        LANE(store)(dst + k, child);
        child = LANE(add)(child, next);
        LANE(lane_pages)(l, words + k, clear);
    }
    for (; k < n; k++) {
        if (any && l->cow)
            src[k] = lane_wrprotect(l, src[k]);
        dst[k] = first + k * step;
        lane_pages_scalar(l, words + k, clear);
    }
}

/* Scan and rewrite in one, where entry 0 is writable in a private mapping: each entry that continues the batch is
 * write-protected, whatever follows. */
LANE_TARGET LANE_INLINE size_t LANE(lane_fused)(struct lane *l, uint64_t *src, uint64_t *dst, uint64_t *words, size_t n,
                                           size_t ahead, uint64_t v, uint64_t step, uint64_t clear)
{
    uint64_t normal = lane_wrprotect(l, v) & ~l->clear, first = lane_child(l, v, 1);
    V expected = LANE(ramp)(normal, step), child = LANE(ramp)(first, step), next = LANE(set)(step * LANES);
    const int prefetch = l->prefetch;
    size_t k = 0;
    for (; k + LANES <= n; k += LANES) {
        V wp = LANE(lane_wp)(l, LANE(load)(src + k));
        if (LANE(nonzero)(LANE(xor)(LANE(andnot)(LANE(set)(l->clear), wp), expected)))
            break;
        if (prefetch && !(k & 7) && k + LANE_AHEAD_LARGE + LANES <= ahead)
            LANE(lane_prefetch)(l, src + k + LANE_AHEAD_LARGE, 1);
        LANE(store)(src + k, wp);
        LANE(store)(dst + k, child);
        LANE(lane_pages)(l, words + k, clear);
        expected = LANE(add)(expected, next);
        child = LANE(add)(child, next);
    }
    for (; k < n; k++) {
        uint64_t wp = lane_wrprotect(l, src[k]);
        if ((wp & ~l->clear) != normal + k * step)
            break;
        src[k] = wp;
        dst[k] = first + k * step;
        lane_pages_scalar(l, words + k, clear);
    }
    return k;
}

/* A batch of a large folio at the front of max_nr entries; page is the index of the word w of its first entry, v.
 * Returns nr, or 0 with nothing done if copy_present_ptes() has to. */
LANE_TARGET LANE_INLINE size_t LANE(lane_large)(struct lane *l, uint64_t *src, uint64_t *dst, size_t max_nr, size_t ahead,
                                                uint64_t v, uint64_t pfn, size_t page, uint64_t w)
{
    const size_t nr_pages = (size_t)1 << (w >> ORDER_SHIFT_ & (LANE_BIT(ORDER_BITS_) - 1));
    const size_t offset = pfn & (nr_pages - 1), head = page - offset;
    const size_t limit = nr_pages - offset < max_nr ? nr_pages - offset : max_nr;
    const uint64_t step = v & l->valid ? LANE_BIT(X86_PFN_SHIFT) : 0 - LANE_BIT(X86_PFN_SHIFT);
    const uint64_t clear = w >> ANON_BIT_ & 1 ? LANE_BIT(AE_BIT_) : 0;
    uint64_t *words = l->words + page;
    size_t nr = 0;
    int any = 1;
    if (offset > page || nr_pages > l->nr_words - head || !lane_large_ok(l, head, w, limit))
        return 0;
    if (!l->cow && v & l->write && v & l->saved_dirty)
        return 0; /* not canonical: making it writable again would change it */
    if (limit == nr_pages && nr_pages <= 16) {
        int done;
        if (l->prefetch && LANE_AHEAD_LARGE + 16 <= ahead) {
            LANE(lane_prefetch)(l, src + LANE_AHEAD_LARGE, 1);
            if (nr_pages == 16)
                LANE(lane_prefetch)(l, src + LANE_AHEAD_LARGE + 8, 1);
        }
        if (nr_pages == 16)
            done = LANE(lane_whole)(l, src, dst, words, 16, v, step, clear, &any);
        else if (nr_pages == 8)
            done = LANE(lane_whole)(l, src, dst, words, 8, v, step, clear, &any);
        else if (nr_pages == 4)
#if LANES == 8
            done = lane_whole_avx2(l, src, dst, words, 4, v, step, clear, &any);
#else
            done = LANE(lane_whole)(l, src, dst, words, 4, v, step, clear, &any);
#endif
        else
            done = lane_whole_scalar(l, src, dst, words, 2, v, step, clear, &any);
        if (done)
            nr = nr_pages;
    }
    if (!nr && !l->sole && l->cow && v & l->writable) {
        nr = LANE(lane_fused)(l, src, dst, words, limit, ahead, v, step, clear);
    } else if (!nr) {
        nr = LANE(lane_scan)(l, src, limit, v, step, &any);
        if (l->sole && nr != limit)
            return 0;
        LANE(lane_rewrite)(l, src, dst, words, nr, v, step, clear, any);
    }
    if (nr)
        lane_account(l, head, w, nr, limit, max_nr, any);
    return nr;
}

/* Copy from the front of n slots of one table; returns how many. ahead entries may be read from src. */
LANE_TARGET static size_t LANE(lane_run)(struct lane *shared, uint64_t *src, uint64_t *dst, size_t n, size_t ahead)
{
    struct lane local = *shared, *l = &local; /* a copy that no store into an array can change: it stays in registers */
    size_t i = 0, page, done;
    while (i < n) {
        uint64_t v = src[i], pfn, w;
        if ((v & ~l->none_ignore) == l->none_value) {
            l->none++;
            i++;
            continue;
        }
        if (!(v & l->present) || v & l->special)
            break;
        pfn = lane_pfn(l, v);
        page = lane_page(l, pfn);
        if (page >= l->nr_words)
            break;
        w = l->words[page];
        if (!((w ^ l->small_value) & l->small_mask)) {
            done = LANE(lane_group)(l, src + i, dst + i, n - i, ahead - i, w & LANE_KIND);
            if (!done) {
                lane_small(l, src + i, dst + i, v, l->words + page, w);
                done = 1;
            }
        } else if (w >> VALID_BIT_ && w >> ORDER_SHIFT_ & (LANE_BIT(ORDER_BITS_) - 1)) {
            done = LANE(lane_large)(l, src + i, dst + i, n - i, ahead - i, v, pfn, page, w);
        } else {
            done = 0;
        }
        if (!done)
            break;
        i += done;
    }
    *shared = local;
    return i;
}

#undef V
