/*
 * The lane's loops over entries, once for every SIMD level: _lane.h includes this file with LANE(name) giving a name its
 * level's suffix, LANE_TARGET the level's target attribute, LANES the entries in a vector, and the vector operations
 * load, store, stream (store past the cache), set (all lanes), ramp (first, first + step, ...), and, andnot (~a & b),
 * or, xor, add, sub, shr, nonzero (any lane), count (lanes that have a bit), choose (x == y ? a : b in each lane), fold
 * (OR of all lanes), apart (nonzero unless every four lanes are places of the pages of a quad; of one lane, which says
 * nothing, nonzero). Of several lanes also: same (lanes that are equal, as bits), store_some (the lanes of such bits),
 * some (those of one, the rest of the other), behind (the last lane of one, and all but the last of the other). Of four
 * lanes: twins (nonzero if two are equal).
 */
#define V LANE(vec)

/* One change of LANES entries, as lane_changed(). */
LANE_TARGET LANE_INLINE V LANE(lane_change)(const struct lane_change *c, V v)
{
    const V out = LANE(or)(LANE(and)(v, LANE(set)(c->keep)), LANE(set)(c->set));
    const V more = LANE(or)(LANE(and)(out, LANE(set)(c->then_keep)), LANE(set)(c->then_set));
    return LANE(choose)(LANE(and)(v, LANE(set)(c->mask)), LANE(set)(c->value), more, out);
}

/* Write-protect those of LANES entries of a private mapping that are writable, each by itself; returns all of them. */
LANE_TARGET LANE_INLINE V LANE(lane_protect)(struct lane *l, uint64_t *src, V v)
{
    const int writable = LANE(count)(v, l->write);
    if (writable) {
        const V write = LANE(set)(l->write), wp = LANE(lane_change)(&l->wrprotect, v);
        v = LANE_LIKELY(writable == LANES) ? wp : LANE(choose)(LANE(and)(v, write), write, wp, v);
        LANE(store)(src, v);
    }
    l->wrprotects += writable;
    l->wrprotected += writable;
    return v;
}

/* Whether entries of the child that begin here, and any that lie a multiple of LANES behind, are written past the cache. */
LANE_TARGET LANE_INLINE int LANE(may_bypass)(const struct lane *l, const uint64_t *dst)
{
    return l->bypass && !((uintptr_t)dst & (LANES * sizeof(uint64_t) - 1));
}

LANE_TARGET LANE_INLINE void LANE(put)(int bypass, uint64_t *dst, V v)
{
    if (bypass)
        LANE(stream)(dst, v);
    else
        LANE(store)(dst, v);
}

/* The child's, of entries that are write-protected where they have to be. */
LANE_TARGET LANE_INLINE V LANE(lane_to_child)(const struct lane *l, V v)
{
    return LANE(or)(LANE(and)(v, LANE(set)(l->child_keep)), LANE(set)(l->child_set));
}

/* Byte offsets, times 512, of the extent's words for LANES entries, that is (PFN - extent_pfn) << LANE_PFN_SHIFT; *bad is
 * nonzero if an entry is not present, is special, or maps a page elsewhere. Subtracting what such an entry has in common
 * with the first page of the extent leaves bits below the PFN, or a number out of range, in any other. */
LANE_TARGET LANE_INLINE V LANE(lane_extent)(const struct lane *l, V v, V *bad)
{
    const uint64_t first = l->extent_pfn << LANE_PFN_SHIFT | l->valid, last = (l->extent_len - 1) << LANE_PFN_SHIFT;
    V at = LANE(sub)(LANE(and)(v, LANE(set)(l->pfn_mask | l->valid | l->special)), LANE(set)(first));
    *bad = LANE(and)(LANE(or)(at, LANE(sub)(LANE(set)(last), at)), LANE(set)(LANE_BIT(63) | (LANE_BIT(LANE_PFN_SHIFT) - 1)));
    return at;
}

/* How lane_check tells entries that map pages of the extent: as lane_extent does, and PROT_NONE entries, whose PFN may be
 * inverted, as what they would be without that. Those of a swap area are fine too: with area 0, mostly none as well, which
 * looks like one of its entries. */
struct LANE(lane_kind) {
    V turn, mask, first, last, area, swapped;
    uint64_t of; /* the swap area: what its entries are where lane_area() has bits, or LANE_NO_AREA */
    int protnone;
};

LANE_TARGET LANE_INLINE struct LANE(lane_kind) LANE(lane_kind_of)(const struct lane *l, int protnone, uint64_t of)
{
    const uint64_t also = protnone ? l->present & ~l->valid : 0, first = l->extent_pfn << LANE_PFN_SHIFT | l->valid | also;
    struct LANE(lane_kind) kind;
    kind.turn = LANE(set)(protnone ? l->inverted | l->valid : 0);
    kind.mask = LANE(set)(l->pfn_mask | l->valid | l->special | also);
    kind.first = LANE(set)(first);
    kind.last = LANE(set)((l->extent_len - 1) << LANE_PFN_SHIFT);
    kind.area = LANE(set)(lane_area(l));
    kind.swapped = LANE(set)(of);
    kind.of = of;
    kind.protnone = protnone;
    return kind;
}

/* Nonzero where an entry is not of that kind. */
LANE_TARGET LANE_INLINE V LANE(lane_unkind)(const struct LANE(lane_kind) *kind, V v)
{
    const V at = LANE(sub)(LANE(and)(LANE(xor)(v, kind->turn), kind->mask), kind->first);
    return LANE(and)(LANE(or)(at, LANE(sub)(kind->last, at)), LANE(set)(LANE_BIT(63) | (LANE_BIT(LANE_PFN_SHIFT) - 1)));
}

/* From i on to `end`, 4 * LANES entries at a time of each stream (constant where inlined, as swaps), which lie `part` entries
 * behind each other: where the first are that are not all of that kind or (if swaps) of its swap area. */
LANE_TARGET LANE_INLINE size_t LANE(lane_kin)(const struct LANE(lane_kind) *shared, const uint64_t *entries, size_t i,
                                              size_t end, size_t part, const size_t streams, const int swaps)
{
    const struct LANE(lane_kind) local = *shared, *kind = &local; /* as in lane_run */
    size_t stream, k;
    for (; i + 4 * LANES <= end; i += 4 * LANES) {
        V bad = LANE(set)(0);
        for (stream = 0; stream < streams; stream++) {
            const uint64_t *const some = entries + i + stream * part;
            for (k = 0; k < 4 * LANES; k += LANES) {
                const V v = LANE(load)(some + k);
                V unkind = LANE(lane_unkind)(kind, v);
                if (swaps)
                    unkind = LANE(choose)(LANE(and)(v, kind->area), kind->swapped, LANE(set)(0), unkind);
                bad = LANE(or)(bad, unkind);
            }
            for (k = 0; k < 4 * LANES; k += LANE_LINE)
                LANE_PREFETCH_READ((const void *)((uintptr_t)(some + k) + LANE_AHEAD_STREAM * sizeof(uint64_t)));
        }
        if (LANE(nonzero)(bad))
            break;
    }
    return i;
}

/* Zero if LANES entries, whatever mixture, are none, or map a page of the extent, or are of pages that are swapped out. */
LANE_TARGET LANE_INLINE V LANE(lane_any_kind)(const struct lane *l, V v)
{
    const struct LANE(lane_kind) present = LANE(lane_kind_of)(l, 0, LANE_NO_AREA);
    const struct LANE(lane_kind) protnone = LANE(lane_kind_of)(l, 1, LANE_NO_AREA);
    const V none = LANE(xor)(LANE(and)(v, LANE(set)(~l->none_ignore)), LANE(set)(l->none_value)), zero = LANE(set)(0);
    const V type = LANE(and)(LANE(shr)(v, l->swp_type_shift), LANE(set)(l->swp_type_mask));
    V bad = LANE(choose)(LANE(and)(v, LANE(set)(l->valid)), zero, LANE(lane_unkind)(&protnone, v), LANE(lane_unkind)(&present, v));
    bad = LANE(choose)(LANE(and)(v, LANE(set)(l->present)), zero,
                       LANE(and)(LANE(sub)(LANE(set)(l->swp_types - 1), type), LANE(set)(LANE_BIT(63))), bad);
    return LANE(choose)(none, zero, zero, bad);
}

/* As lane_any_kind, of 4 * LANES entries. The kind becomes that of the first of them, with the swap area of the first that is
 * not present. */
LANE_TARGET LANE_INLINE V LANE(lane_mixed)(const struct lane *l, struct LANE(lane_kind) *kind, const uint64_t *entries)
{
    uint64_t of = kind->of;
    V bad = LANE(set)(0);
    size_t k = 0;
    int present = 1;
    for (; k < 4 * LANES; k += LANES) {
        const V v = LANE(load)(entries + k);
        bad = LANE(or)(bad, LANE(lane_any_kind)(l, v));
        present &= LANE(count)(v, l->present) == LANES;
    }
    for (k = 0; !present && k < 4 * LANES; k++) {
        const uint64_t v = entries[k];
        if (!(v & l->present) && (v >> l->swp_type_shift & l->swp_type_mask) < l->swp_types) {
            of = v & lane_area(l);
            break;
        }
    }
    *kind = LANE(lane_kind_of)(l, entries[0] & l->present ? !(entries[0] & l->valid) : kind->protnone, of);
    return bad;
}

/* As lane_kin, as far as copying may go on. */
LANE_TARGET LANE_INLINE size_t LANE(lane_may)(const struct lane *l, struct LANE(lane_kind) *kind, const uint64_t *entries,
                                              size_t i, size_t end, size_t part, const size_t streams)
{
    size_t stream;
    for (;; i += 4 * LANES) {
        V bad = LANE(set)(0);
        i = kind->of != LANE_NO_AREA ? LANE(lane_kin)(kind, entries, i, end, part, streams, 1)
            : LANE(lane_kin)(kind, entries, i, end, part, streams, 0);
        if (i + 4 * LANES > end)
            return i;
        for (stream = 0; stream < streams; stream++)
            bad = LANE(or)(bad, LANE(lane_mixed)(l, kind, entries + i + stream * part));
        if (LANE(nonzero)(bad))
            return i;
    }
}

/* The read-only pass: how many entries from the front copying may go on with, as far as their pages are concerned. */
LANE_TARGET static size_t LANE(lane_check)(const struct lane *l, const uint64_t *entries, size_t n)
{
    const size_t part = n / LANE_STREAMS & ~(size_t)(4 * LANES - 1);
    const int protnone = n && entries[0] & l->present && !(entries[0] & l->valid);
    struct LANE(lane_kind) kind = LANE(lane_kind_of)(l, protnone, LANE_NO_AREA);
    size_t i = 0;
    /* One stream of reads does not keep the memory busy: several at once do. */
    if (part >= LANE_LONG)
        i = LANE(lane_may)(l, &kind, entries, 0, part, part, LANE_STREAMS);
    i = LANE(lane_may)(l, &kind, entries, i < part ? i : LANE_STREAMS * part, n, 0, 1);
    for (; i + LANES <= n && !LANE(nonzero)(LANE(lane_any_kind)(l, LANE(load)(entries + i))); i += LANES)
        ;
    return i;
}

/* Small folios of one kind from the front of n entries, LANES at a time; w is the word of the first. Returns how many. */
LANE_TARGET LANE_INLINE size_t LANE(lane_group)(struct lane *l, uint64_t *src, uint64_t *dst, size_t n, size_t ahead,
                                                uint64_t w)
{
    uint64_t *const words = l->words + l->extent_at;
    const uint64_t ae = w >> ANON_BIT_ & 1 ? LANE_BIT(AE_BIT_) : 0, kind = w & (LANE_KIND | ae);
    const uint64_t mask = l->small_mask | LANE_KIND | ae, value = l->small_value | kind;
    const uint64_t delta = LANE_ONE_MAPPING - (kind & ae), pfn_mask = l->pfn_mask, extent_pfn = l->extent_pfn;
    const size_t distance = lane_ahead(l->far), near = l->far ? LANE_NEAR_SMALL : distance;
    const int cow = l->cow, prefetch = l->prefetch, far = l->far;
    uint64_t at[LANES];
    size_t i = 0;
    int k = 0;
    if (l->writable != l->write || !l->extent_len)
        return 0;
    for (; i + LANES <= n; i += LANES) {
        V v = LANE(load)(src + i), bad, place = LANE(lane_extent)(l, v, &bad);
        lane_stream(src + i, LANES);
        lane_stream(dst + i, LANES);
        if (LANE(nonzero)(bad))
            break;
        LANE(store)(at, LANE(shr)(place, LANE_PFN_SHIFT));
        if (prefetch && i + distance + LANES <= ahead) {
            if (far)
                for (k = 0; k < LANES; k++)
                    LANE_PREFETCH_L2(words, ((src[i + distance + (size_t)k] & pfn_mask) >> LANE_PFN_SHIFT) - extent_pfn);
            for (k = 0; k < LANES; k++)
                LANE_PREFETCH_AT(words, ((src[i + near + (size_t)k] & pfn_mask) >> LANE_PFN_SHIFT) - extent_pfn);
        }
        for (k = 0; k < LANES; k++) {
            w = words[at[k]];
            if ((w ^ value) & mask)
                break;
            words[at[k]] = w + delta;
        }
        if (k < LANES)
            break;
        if (cow)
            v = LANE(lane_protect)(l, src + i, v);
        LANE(store)(dst + i, LANE(lane_to_child)(l, v));
        k = 0;
    }
    /* The last group stopped at page k of another kind: the entries before it, whose pages are done. */
    for (; k > 0 && i < n; k--, i++) {
        uint64_t v = src[i];
        if (cow)
            v = lane_protect_scalar(l, src + i, v);
        dst[i] = lane_to_child_scalar(l, v);
    }
    l->hist[1] += (int64_t)i;
    l->rss[lane_rss(kind)] += (int64_t)i;
    l->exclusive += kind & ae ? (int64_t)i : 0;
    return i;
}

#if LANES > 1
/* LANES entries from the front that are none or map small folios, whatever their kinds; ahead entries may be read from src.
 * Returns how many of them: fewer than all in front of a page of another kind, 0 with nothing done if there are other
 * entries. */
LANE_TARGET LANE_INLINE size_t LANE(lane_sparse)(struct lane *l, uint64_t *src, uint64_t *dst, size_t ahead)
{
    enum { ALL = (1 << LANES) - 1 };
    uint64_t *const words = l->words + l->extent_at;
    const size_t distance = lane_ahead(l->far);
    const V v = LANE(load)(src), zero = LANE(set)(0), wp = LANE(lane_change)(&l->wrprotect, v);
    V bad;
    const V place = LANE(lane_extent)(l, v, &bad);
    const unsigned none = LANE(same)(LANE(and)(v, LANE(set)(~l->none_ignore)), LANE(set)(l->none_value));
    unsigned small = LANE(same)(bad, zero), todo, write;
    size_t done = LANES, k;
    uint64_t at[LANES];
    if ((small | none) != ALL)
        return 0;
    if (l->prefetch && distance + LANES <= ahead)
        for (k = 0; k < LANES; k++)
            LANE_PREFETCH_AT(words, ((src[distance + k] & l->pfn_mask) >> LANE_PFN_SHIFT) - l->extent_pfn);
    LANE(store)(at, LANE(shr)(place, LANE_PFN_SHIFT));
    for (todo = small; todo; todo &= todo - 1) {
        uint64_t w, exclusive;
        k = (size_t)__builtin_ctz(todo);
        w = words[at[k]];
        if ((w ^ l->small_value) & l->small_mask) {
            done = k;
            small &= (1u << k) - 1;
            break;
        }
        exclusive = w & w >> (ANON_BIT_ - AE_BIT_) & LANE_BIT(AE_BIT_);
        words[at[k]] = (w ^ exclusive) + LANE_ONE_MAPPING;
        l->exclusive += (int64_t)(exclusive >> AE_BIT_);
        l->rss[lane_rss(w)]++;
    }
    write = l->cow ? small & ~LANE(same)(LANE(and)(v, LANE(set)(l->writable)), zero) : 0;
    LANE(store_some)(src, write, wp);
    LANE(store_some)(dst, write, LANE(lane_to_child)(l, wp));
    LANE(store_some)(dst, small & ~write, LANE(lane_to_child)(l, v));
    l->none += __builtin_popcount(none & ((1u << done) - 1));
    l->hist[1] += __builtin_popcount(small);
    l->wrprotects += __builtin_popcount(write);
    l->wrprotected += __builtin_popcount(write);
    return done;
}
#endif

/* One more mapping of LANES pages of a large folio; clear is the exclusive bit where the folio is anonymous. */
LANE_TARGET LANE_INLINE void LANE(lane_pages)(struct lane *l, uint64_t *words, uint64_t clear)
{
    V w = LANE(load)(words);
    l->exclusive += LANE(count)(w, clear);
    if (LANE(nonzero)(LANE(and)(w, LANE(set)((uint64_t)3 << (MAPCOUNT_BITS_ - 2)))))
        l->mapcounts |= LANE(fold)(w);
    LANE(store)(words, LANE(add)(LANE(andnot)(LANE(set)(clear), w), LANE(set)(l->page_mapcount)));
}

#if LANES > 1
/* As lane_swap, LANES entries at a time where they are of one swap area and their slots neighbours. */
LANE_TARGET LANE_APART size_t LANE(lane_swaps)(struct lane *l, uint64_t *src, uint64_t *dst, size_t n)
{
    size_t i = 0;
    for (; i + LANES <= n && !(src[i + LANES - 1] & l->present); i += LANES) {
        const uint64_t first = src[i];
        const size_t at = lane_slot(l, first);
        const V v = LANE(load)(src + i), was = LANE(andnot)(LANE(set)(l->swp_exclusive), v);
        uint64_t *slots;
        V keys, counts, bad;
        if (at >= l->nr_slots || LANES > l->nr_slots - at)
            break;
        keys = LANE(and)(LANE(shr)(LANE(xor)(v, LANE(set)(l->swp_inverted)), l->swp_offset_shift), LANE(set)(l->swp_offset_mask));
        keys = LANE(or)(keys, LANE(set)((first >> l->swp_type_shift & l->swp_type_mask) << KEY_TYPE_SHIFT_));
        slots = (uint64_t *)l->slot_counts + at;
        counts = LANE(load)(slots);
        bad = LANE(and)(LANE(xor)(v, LANE(set)(first)), LANE(set)(lane_area(l)));
        bad = LANE(or)(bad, LANE(xor)(keys, LANE(load)(l->slots + at)));
        counts = LANE(or)(counts, LANE(sub)(LANE(set)(SWAP_MAP_MAX_ - 1), counts)); /* bit 63: too many */
        bad = LANE(or)(bad, LANE(and)(counts, LANE(set)(LANE_BIT(63))));
        bad = LANE(choose)(LANE(and)(v, LANE(set)(~l->none_ignore)), LANE(set)(l->none_value), LANE(set)(1), bad);
        if (LANE(nonzero)(bad))
            break;
        LANE(store)(slots, LANE(add)(LANE(load)(slots), LANE(set)(1)));
        LANE(store)(src + i, was);
        LANE(store)(dst + i, LANE(and)(was, LANE(set)(l->swp_keep)));
        l->next_slot = at + LANES;
    }
    lane_swapped(l, i);
    return i + lane_swap(l, src + i, dst + i, n - i);
}

/* One more mapping of some of LANES pages, whose words were `before`; all says that all are of the folio. */
LANE_TARGET LANE_INLINE void LANE(lane_some_pages)(const struct lane *l, uint64_t *words, V before, unsigned some,
                                                   uint64_t clear, int all)
{
    const V after = LANE(add)(LANE(andnot)(LANE(set)(clear), before), LANE(set)(l->page_mapcount));
    if (all)
        LANE(store)(words, LANE(some)(some, after, before));
    else
        LANE(store_some)(words, some, after);
}

/* As lane_piece, where all entries that map a page are like v, whatever is between them; 0 with nothing done if not (or if
 * lane_piece would return 0). */
LANE_TARGET LANE_INLINE size_t LANE(lane_gaps)(struct lane *l, uint64_t *src, uint64_t *dst, uint64_t *words, size_t n,
                                               size_t left, uint64_t v, uint64_t step, uint64_t clear, const size_t wide,
                                               size_t *mapped)
{
    enum { MOST = LANE_WHOLE / LANES, ALL = (1 << LANES) - 1 };
    const int any = (v & l->writable) != 0, write = any && l->cow, behind = !l->clamp && n < left;
    const V zero = LANE(set)(0), ramp = LANE(ramp)(v, step), present = LANE(set)(l->present);
    const V protect = LANE(set)(write ? lane_wrprotect(l, v) - v : 0), child = LANE(set)(lane_child(l, v, any) - v);
    V like[MOST], before[MOST], near = zero;
    unsigned alike = 0, absent = 0, exclusive = 0, rest, begins, some;
    size_t k, done = n, nr_none = 0;
    int nr_batches;
    for (k = 0; k < wide / LANES; k++) {
        const V entries = LANE(load)(src + k * LANES);
        like[k] = LANE(add)(ramp, LANE(set)(k * LANES * step));
        before[k] = LANE(load)(words + k * LANES);
        alike |= LANE(same)(entries, like[k]) << k * LANES;
        absent |= LANE(same)(LANE(and)(entries, present), zero) << k * LANES;
        exclusive |= (LANE(same)(LANE(and)(before[k], LANE(set)(clear)), zero) ^ ALL) << k * LANES;
        near = LANE(or)(near, before[k]);
    }
    if (~(alike | absent) & ((1u << n) - 1) || LANE(nonzero)(LANE(and)(near, LANE(set)((uint64_t)3 << (MAPCOUNT_BITS_ - 2)))))
        return 0;
    for (rest = absent & ((1u << n) - 1); rest; rest &= ~(((1u << k) - 1) << done), done = n) {
        done = (size_t)__builtin_ctz(rest);
        k = lane_swap(l, src + done, dst + done, n - done);
        if (!k && (src[done] & ~l->none_ignore) != l->none_value)
            break;
        nr_none += !k;
        k += !k;
    }
    alike &= (1u << done) - 1;
    begins = alike & ~(alike << 1);
    nr_batches = __builtin_popcount(begins);
    for (some = begins; some; some &= some - 1) {
        const int from = __builtin_ctz(some);
        l->hist[__builtin_ctz(~(alike >> from))]++;
    }
    for (k = 0; k < wide / LANES; k++) {
        const unsigned lanes = alike >> k * LANES & ALL;
        if (write)
            LANE(store_some)(src + k * LANES, lanes, LANE(add)(like[k], protect));
        LANE(store_some)(dst + k * LANES, lanes, LANE(add)(like[k], child));
        LANE(lane_some_pages)(l, words + k * LANES, before[k], lanes, clear, (k + 1) * LANES <= n);
    }
    *mapped = (size_t)__builtin_popcount(alike);
    /* As in lane_piece: each batch reads its entries but the first, and mostly the one behind them. */
    l->reads += (int64_t)*mapped - (behind ? 0 : alike >> (n - 1) & 1);
    l->wrprotects += write ? nr_batches : 0;
    l->wrprotected += write ? (int64_t)*mapped : 0;
    l->exclusive += __builtin_popcount(alike & exclusive);
    l->none += (int64_t)nr_none;
    return done;
}

/* All batches among the first n entries, at most `wide` (constant where inlined: to LANE_WHOLE), that are none, swapped out, or
 * map the pages of one folio, each the page of its place from words on; v is the first. As many as `wide` may be read from src
 * and words; the table ends after `left`. Returns how many slots were dealt with, of which *mapped map a page; 0 if a mapcount
 * is near its limit. What was stored here in part is not loaded again: that would wait for all stores before it. */
LANE_TARGET LANE_INLINE size_t LANE(lane_piece)(struct lane *l, uint64_t *src, uint64_t *dst, uint64_t *words, size_t n,
                                                size_t left, uint64_t v, uint64_t step, uint64_t clear, const size_t wide,
                                                size_t *mapped)
{
    enum { MOST = LANE_WHOLE / LANES, ALL = (1 << LANES) - 1 };
    const size_t many = wide / LANES;
    const uint64_t which = l->pfn_mask | l->present | l->valid | l->special;
    const V zero = LANE(set)(0), first = LANE(set)(v & which);
    const V ramp = LANE(ramp)(0, step);
    V entries[MOST], before[MOST], after[MOST], kind = LANE(set)(~lane_changed(&l->norm, v)), near = zero;
    unsigned same = 0, none = 0, readonly = 0, shared = 0, begins = 0, todo, protect = 0;
    uint64_t each[LANE_WHOLE];
    size_t k, done = n;
    for (k = 0; k < many; k++) {
        const V place = LANE(add)(LANE(set)(k * LANES * step), ramp), last = kind;
        entries[k] = LANE(load)(src + k * LANES);
        before[k] = LANE(load)(words + k * LANES);
        after[k] = zero;
        LANE(store)(each + k * LANES, entries[k]);
        /* Where an entry does not go on with the batch of the one before it. */
        kind = LANE(sub)(LANE(lane_change)(&l->norm, entries[k]), place);
        begins |= (LANE(same)(LANE(behind)(last, kind), kind) ^ ALL) << k * LANES;
        same |= LANE(same)(LANE(and)(entries[k], LANE(set)(which)), LANE(add)(first, place)) << k * LANES;
        none |= LANE(same)(LANE(and)(entries[k], LANE(set)(~l->none_ignore)), LANE(set)(l->none_value)) << k * LANES;
        readonly |= LANE(same)(LANE(and)(entries[k], LANE(set)(l->writable)), zero) << k * LANES;
        shared |= LANE(same)(LANE(and)(before[k], LANE(set)(clear)), zero) << k * LANES;
        near = LANE(or)(near, before[k]);
    }
    if (LANE(nonzero)(LANE(and)(near, LANE(set)((uint64_t)3 << (MAPCOUNT_BITS_ - 2)))))
        return 0;
    todo = ~none & ((1u << n) - 1);
    while (todo) { /* batch by batch */
        const size_t from = (size_t)__builtin_ctz(todo);
        const size_t nr = (size_t)__builtin_ctz(~(todo & same) >> from | (begins >> from & ~1u));
        const unsigned mine = ((1u << nr) - 1) << from;
        const int any = (mine & ~readonly) != 0;
        uint64_t child;
        if (!nr && (k = lane_swap(l, src + from, dst + from, n - from)) != 0) {
            todo &= ~(((1u << k) - 1) << from);
            continue;
        }
        if (!nr || (from && !lane_canonical(l, each[from]))) {
            done = from;
            break;
        }
        child = lane_child(l, each[from], any) - from * step;
        for (k = 0; k < many; k++)
            after[k] = LANE(some)(mine >> k * LANES & ALL, LANE(add)(LANE(set)(child + k * LANES * step), ramp), after[k]);
        protect |= any & l->cow ? mine : 0;
        l->hist[nr]++;
        /* Reads of the scan: entries 1..nr-1, the one that ended it, and without the clamp the one behind the folio. */
        l->reads += (int64_t)nr - 1 + ((from + nr < n) | (!l->clamp & (n < left)));
        l->wrprotects += any & l->cow;
        todo &= ~mine;
    }
    same &= (1u << done) - 1;
    for (k = 0; k < many; k++) {
        const unsigned lanes = same >> k * LANES & ALL;
        LANE(store_some)(dst + k * LANES, lanes, after[k]);
        if (protect)
            LANE(store_some)(src + k * LANES, protect >> k * LANES & ALL, LANE(lane_change)(&l->wrprotect, entries[k]));
        LANE(lane_some_pages)(l, words + k * LANES, before[k], lanes, clear, (k + 1) * LANES <= n);
    }
    *mapped = (size_t)__builtin_popcount(same);
    l->wrprotected += __builtin_popcount(protect);
    l->exclusive += __builtin_popcount(same & ~shared);
    l->none += __builtin_popcount(none & ((1u << done) - 1));
    return done;
}

/* The first n slots, at most LANE_WHOLE, which have the pages of a large folio from pfn and `page` on if they map anything;
 * w is a word of the folio, for which lane_large_ok() holds, and ahead entries may be read from src. Returns how many were
 * dealt with. */
LANE_TARGET LANE_APART size_t LANE(lane_pieces)(struct lane *l, uint64_t *src, uint64_t *dst, size_t n, size_t left,
                                                size_t ahead, uint64_t pfn, size_t page, uint64_t w)
{
    const uint64_t clear = w >> ANON_BIT_ & 1 ? LANE_BIT(AE_BIT_) : 0;
    size_t i = 0, done, nr, mapped = 0;
    for (; i < n; i += done) {
        const uint64_t v = src[i], step = lane_step(l, v);
        const size_t wide = n - i <= 4 ? 4 : LANE_WHOLE, rest = n - i, more = left - i;
        uint64_t *const from = src + i, *const to = dst + i, *const words = l->words + page + i;
        nr = 0;
        if (!(v & l->present) || v & l->special || lane_pfn(l, v) != pfn + i || !lane_canonical(l, v))
            break;
        if (ahead - i < wide || l->nr_words - page - i < wide)
            break;
        done = wide == 4 ? LANE4(lane_gaps)(l, from, to, words, rest, more, v, step, clear, 4, &nr)
            : LANE(lane_gaps)(l, from, to, words, rest, more, v, step, clear, LANE_WHOLE, &nr);
        if (!done)
            done = wide == 4 ? LANE4(lane_piece)(l, from, to, words, rest, more, v, step, clear, 4, &nr)
                : LANE(lane_piece)(l, from, to, words, rest, more, v, step, clear, LANE_WHOLE, &nr);
        if (!done)
            break;
        mapped += nr;
    }
    if (mapped)
        lane_account(l, page - (pfn & ((LANE_BIT(w >> ORDER_SHIFT_ & (LANE_BIT(ORDER_BITS_) - 1))) - 1)), w, mapped);
    return i;
}

/* For lane_whole: slot i has page `offset` of a folio that begins at that place of the extent and is not mapped whole by one
 * batch, or (unless offset is 0) looks like it; the slots before are done. Returns how many more were dealt with. */
LANE_TARGET LANE_APART size_t LANE(lane_broken)(struct lane *l, uint64_t *src, uint64_t *dst, size_t i, size_t n, size_t left,
                                                size_t ahead, uint64_t at, size_t offset, int order)
{
    const size_t page = l->extent_at + at, pages = (size_t)1 << order;
    const uint64_t w = l->words[page], pfn = l->extent_pfn + at + offset;
    size_t done;
    if (!l->batching || !(w >> VALID_BIT_) || (w >> ORDER_SHIFT_ & (LANE_BIT(ORDER_BITS_) - 1)) != (uint64_t)order
        || !lane_large_ok(l, page, w))
        return 0;
    if (offset && l->nr_others)
        return 0; /* the folio may be another thread's; but several threads pass all swap entries over: lane_threads */
    if (!l->clamp) { /* nobody asks otherwise, and it takes a division */
        left = lane_left(l, left, i, n);
        left = left ? left : l->ptrs < n - i ? l->ptrs : n - i;
    }
    done = LANE(lane_pieces)(l, src + i, dst + i, pages - offset, left, ahead - i, pfn, page + offset, w);
    if (done == pages) /* lane_behind will count it as if it were whole */
        l->reads -= !l->clamp && left > pages;
    return done;
}
#endif

/* A folio of `pages` pages (constant where inlined: 2 to 16), mapped whole by entries that form one batch, or without batching
 * are alike; the first is src[0], and `at` the place of its word in the extent. What becomes of entries that are alike is kept
 * for others. Returns 0 with nothing done if it is not so. */
LANE_TARGET LANE_INLINE int LANE(lane_whole_one)(struct lane *l, uint64_t *src, uint64_t *dst, uint64_t at,
                                                 const size_t pages, const int order)
{
    enum { MOST = 16 / LANES };
    const uint64_t counter = (uint64_t)pages << COUNTER_SHIFT_, head = src[0], step = lane_step(l, head);
    const V mask = LANE(set)(LANE_WHOLE_MASK | l->large_mask), flags = LANE(set)(lane_changed(&l->norm, head));
    const int inlined = pages >= 4;
    uint64_t *const words = l->words + l->extent_at + at, *const aux = l->aux + l->extent_at + at;
    const uint64_t w = words[0], exclusive = (w >> ANON_BIT_ & 1) << AE_BIT_;
    const V value = LANE(set)((w & LANE_KIND) | (uint64_t)order << ORDER_SHIFT_ | LANE_BIT(VALID_BIT_));
    V cur[MOST], ramp[MOST], before[MOST], wrong, differ = LANE(set)(0), other = LANE(set)(0), seen = LANE(set)(0);
    struct lane_like like, *t = &like;
    struct mm_slots slots = { { 0, 0 } };
    const uint64_t normal = lane_changed(&l->norm, head);
    int any;
    size_t k;
    if (lane_changed(&l->norm, src[1]) != normal + step
        || lane_changed(&l->norm, src[pages - 1]) != normal + (pages - 1) * step)
        return 0; /* where batches are short, this mostly tells */
    for (k = 0; k < pages / LANES; k++) {
        ramp[k] = LANE(ramp)(k * LANES * step, step);
        cur[k] = LANE(load)(src + k * LANES);
        before[k] = LANE(load)(words + k * LANES);
        differ = LANE(or)(differ, LANE(xor)(LANE(lane_change)(&l->norm, cur[k]), LANE(add)(flags, ramp[k])));
        /* Page 2's field may be shared, but page 3's not spilled. */
        wrong = LANE(and)(LANE(xor)(before[k], value), mask);
        if (inlined && k * LANES < 4)
            wrong = LANE(andnot)(LANE(and)(LANE(load)(lane_third + k * LANES), LANE(set)(INLINE_FLAG)), wrong);
        differ = LANE(or)(differ, wrong);
        other = LANE(or)(other, LANE(xor)(cur[k], LANE(add)(LANE(set)(head), ramp[k])));
        seen = LANE(or)(seen, cur[k]);
    }
    if (LANE(nonzero)(differ) || !lane_canonical(l, head) || (!l->batching && LANE(nonzero)(other)))
        return 0;
    if (l->mm_id) {
        slots = load_mm_slots(words, aux, 0, inlined);
        lane_mm_mapping(l, &slots, pages, ((words[1] & LANE_COUNTER) >> COUNTER_SHIFT_) + pages);
        if (inlined ? !slots_fit(&slots) : ((slots.slot[0] | slots.slot[1]) & LANE_HALF_AUX) != 0)
            return 0;
    }
    any = LANE(nonzero)(LANE(and)(seen, LANE(set)(l->writable)));
    if (!LANE(nonzero)(other))
        t = lane_other(l, order);
    lane_like_entries(l, t, head, w, any);
    t->folios = 1;
    memcpy(t->aux, aux, sizeof(t->aux));
    for (k = 0; k < pages / LANES; k++) {
        const V after = LANE(add)(LANE(andnot)(LANE(set)(exclusive), before[k]), LANE(set)(l->page_mapcount));
        t->nr_exclusive += LANE(count)(before[k], exclusive);
        LANE(store)(t->before + k * LANES, before[k]);
        LANE(store)(words + k * LANES, after);
        if (t->write)
            LANE(store)(src + k * LANES, LANE(lane_change)(&l->wrprotect, cur[k]));
        LANE(store)(dst + k * LANES, LANE(add)(LANE(set)(head + t->child), ramp[k]));
    }
    words[0] += counter;
    if (l->large_mapcount)
        words[1] += counter;
    if (l->mm_id)
        store_mm_slots(words, aux, 0, inlined, slots);
    memcpy(t->after, words, pages * sizeof(uint64_t));
    memcpy(t->aux_after, aux, sizeof(t->aux_after));
    if (t == &like)
        lane_settle(l, t, order);
    return 1;
}

/* Whether any of n entries (a multiple of LANES, constant where inlined) is not present. */
LANE_TARGET LANE_INLINE int LANE(lane_absent)(const uint64_t *entries, uint64_t present, const size_t n)
{
    const V mask = LANE(set)(present), zero = LANE(set)(0);
    V absent = zero;
    size_t k = 0;
    for (; k < n; k += LANES)
        absent = LANE(choose)(LANE(and)(LANE(load)(entries + k), mask), zero, mask, absent);
    return LANE(nonzero)(absent);
}

/* Load the words of a kind of folios, before and after. */
LANE_TARGET LANE_INLINE void LANE(lane_words)(const struct lane_like *t, V *before, V *after, const size_t pages)
{
    size_t k = 0;
    for (; k < pages / LANES; k++) {
        before[k] = LANE(load)(t->before + k * LANES);
        after[k] = LANE(load)(t->after + k * LANES);
    }
}

/* Folios from src[i] on and before src[n] that are mapped whole by entries and have words like one of the two kinds met last:
 * like that of number `second` only, or if `both` (constant where inlined, as pages) like any of the two. Counts those like
 * the second in *seconds too; returns where it stopped. flip is what of entries' PFNs is inverted: where that
 * depends on an entry's kind, those of the other kind are left alone. */
LANE_TARGET LANE_INLINE size_t LANE(lane_whole_run)(const struct lane *l, const struct lane_like *likes, uint64_t *src,
                                                    uint64_t *dst, size_t i, size_t n, size_t ahead, uint64_t flip, uint64_t step,
                                                    size_t second, const int both, const size_t pages, size_t *seconds)
{
    enum { MOST = 16 / LANES };
    const uint64_t pfn_mask = l->pfn_mask, extent_pfn = l->extent_pfn;
    const uint64_t room = l->extent_len < pages ? 0 : l->extent_len - pages + 1;
    const int slots = l->mm_id && pages < 4, prefetch = l->prefetch, bypass = LANE(may_bypass)(l, dst); /* slots in aux */
    const int far = l->far, write = both ? likes[0].write | likes[1].write : likes[second].write;
    const size_t near = far ? LANE_NEAR_LARGE : LANE_AHEAD_LARGE;
    const uint64_t valid = l->inverted ? l->valid : 0, kind = flip ? 0 : valid;
    uint64_t *const words = l->words + l->extent_at, *const aux = l->aux + l->extent_at;
    const struct lane_like *t = likes + second;
    const size_t from = i;
    uint64_t flags = t->flags, protect = t->protect, child = t->child;
    V ramp[MOST], before[MOST], after[MOST];
    size_t k;
    if (!both && (flags & valid) != kind)
        return i;
    LANE(lane_words)(t, before, after, pages);
    for (k = 0; k < pages / LANES; k++)
        ramp[k] = LANE(ramp)(k * LANES * step, step);
    for (; i + pages <= n; i += pages) {
        V entries[MOST], differ = LANE(set)(0);
        const uint64_t head = src[i], pfn = ((head ^ flip) & pfn_mask) >> LANE_PFN_SHIFT, at = pfn - extent_pfn;
        if (at >= room || pfn & (pages - 1))
            break;
        if (both) {
            second = (head & ~pfn_mask) + words[at] == likes[1].key;
            t = likes + second;
            flags = t->flags;
            protect = t->protect;
            child = t->child;
            LANE(lane_words)(t, before, after, pages);
        }
        if ((head & ~pfn_mask) != flags || (both && (head & valid) != kind))
            break;
        if (slots && ((aux[at] ^ t->aux[0]) | (aux[at + 1] ^ t->aux[1])))
            break;
        if (prefetch && i + LANE_AHEAD_LARGE + 16 <= ahead) {
            uint64_t next = (((src[i + near] ^ flip) & pfn_mask) >> LANE_PFN_SHIFT) - extent_pfn;
            LANE_PREFETCH_AT(words, next);
            if (pages == 16)
                LANE_PREFETCH_AT(words, next + LANE_LINE);
            if (slots)
                LANE_PREFETCH_AT(aux, next);
            if (far) {
                next = (((src[i + LANE_AHEAD_LARGE] ^ flip) & pfn_mask) >> LANE_PFN_SHIFT) - extent_pfn;
                LANE_PREFETCH_L2(words, next);
                if (pages == 16)
                    LANE_PREFETCH_L2(words, next + LANE_LINE);
                if (slots)
                    LANE_PREFETCH_L2(aux, next);
            }
        }
        if (far)
            lane_stream_at(src + i, pages, LANE_AHEAD_LARGE + LANE_AHEAD_ENTRIES);
        if (!bypass && pages > 2) { /* asked for every two entries, it costs more than it brings */
            lane_stream(src + i, pages);
            lane_stream(dst + i, pages);
        }
        for (k = 0; k < pages / LANES; k++) {
            entries[k] = LANE(add)(LANE(set)(head), ramp[k]);
            differ = LANE(or)(differ, LANE(xor)(LANE(load)(src + i + k * LANES), entries[k]));
            differ = LANE(or)(differ, LANE(xor)(LANE(load)(words + at + k * LANES), before[k]));
        }
        if (LANE(nonzero)(differ))
            break;
        for (k = 0; k < pages / LANES; k++) {
            if (write)
                LANE(store)(src + i + k * LANES, LANE(add)(entries[k], LANE(set)(protect)));
            LANE(put)(bypass, dst + i + k * LANES, LANE(add)(entries[k], LANE(set)(child)));
            LANE(store)(words + at + k * LANES, after[k]);
        }
        if (slots) {
            aux[at] = t->aux_after[0];
            aux[at + 1] = t->aux_after[1];
        }
        *seconds += both ? second : 0;
    }
    *seconds += both || !second ? 0 : (i - from) / pages;
    return i;
}

/* Folios of `pages` pages (constant where inlined: 2 to 16) from the front of n entries, each mapped whole, and (with
 * the clamp, or without batching) what is swapped out between them; v is the first entry and w its page's word. Folios
 * like one of the two kinds met last are only compared and stored: runs of one kind, or of both where few of one kind
 * follow each other, which cannot be predicted. Returns how many slots were dealt with. The first table ends after
 * `left` entries, and every further one after l->ptrs more; no folio crosses an end. */
LANE_TARGET LANE_INLINE size_t LANE(lane_whole)(struct lane *l, uint64_t *src, uint64_t *dst, size_t n, size_t left,
                                                size_t ahead, uint64_t v, uint64_t w, const size_t pages, const int order)
{
    struct lane_like *const likes = l->likes[order];
    const uint64_t hard = l->present | l->valid | l->special, step = lane_step(l, v), flip = v & l->valid ? 0 : l->inverted;
    const uint64_t room = l->extent_len < pages ? 0 : l->extent_len - pages + 1;
    size_t i = 0, second = (v & ~l->pfn_mask) + w == likes[1].key;
    int both = 0;
    while (i + pages <= n) {
        const size_t from = i, until = both && n - i > LANE_BOTH * pages ? i + LANE_BOTH * pages : n;
        uint64_t head, pfn, at, key;
        size_t seconds = 0, done;
        if (pages > 2 && both)
            i = LANE(lane_whole_run)(l, likes, src, dst, i, until, ahead, flip, step, second, 1, pages, &seconds);
        else
            i = LANE(lane_whole_run)(l, likes, src, dst, i, n, ahead, flip, step, second, 0, pages, &seconds);
        done = (i - from) / pages;
        likes[0].folios += (int64_t)(done - seconds);
        likes[1].folios += (int64_t)seconds;
        if (i + pages > until) {
            both = seconds && seconds < done;
            second = seconds != 0;
            continue;
        }
        head = src[i];
        pfn = ((head ^ flip) & l->pfn_mask) >> LANE_PFN_SHIFT;
        at = pfn - l->extent_pfn;
        if (!(head & l->present) && (l->clamp || !l->batching)) { /* else lane_behind would take them for folios */
            size_t offset = LANE(lane_swaps)(l, src + i, dst + i, n - i);
            if (!offset)
                return i;
            i += offset;
            offset &= pages - 1;
#if LANES > 1
            if (offset && i + pages - offset <= n) { /* it may be that only the first pages of a folio were swapped out */
                head = src[i];
                at = (((head ^ flip) & l->pfn_mask) >> LANE_PFN_SHIFT) - l->extent_pfn - offset;
                if (at >= room || (at + l->extent_pfn) & (pages - 1))
                    return i;
                done = LANE(lane_broken)(l, src, dst, i, n, left, ahead, at, offset, order);
                i += done;
                offset = (offset + done) & (pages - 1);
            }
#endif
            if (offset)
                return i;
            continue;
        }
        if (at >= room || pfn & (pages - 1) || (head ^ v) & hard || l->words[l->extent_at + at] & l->large_mask)
            break;
        key = (head & ~l->pfn_mask) + l->words[l->extent_at + at];
        if (!both && key != likes[second].key && key == likes[!second].key) {
            second = !second;
            both = pages > 2 && done < LANE_FEW;
            continue;
        }
        /* The place that was checked: it reads the entry again, which may have been written to since. */
        if (!LANE(lane_absent)(src + i, l->present, pages) && LANE(lane_whole_one)(l, src + i, dst + i, at, pages, order)) {
            i += pages;
            second = key == likes[1].key;
            continue;
        }
#if LANES > 1
        done = LANE(lane_broken)(l, src, dst, i, n, left, ahead, at, 0, order);
        if (done == pages) {
            i += done;
            continue;
        }
        if (done) {
            lane_behind(l, i, n, left, pages);
            return i + done;
        }
#endif
        break;
    }
    lane_behind(l, i, n, left, pages);
    return i;
}

/* folio_pte_batch() over n entries, the first included; any says whether one of them is writable. */
LANE_TARGET LANE_INLINE size_t LANE(lane_scan)(const struct lane *l, const uint64_t *src, size_t n, uint64_t v, uint64_t step,
                                          int *any)
{
    uint64_t normal = lane_changed(&l->norm, v), seen = 0;
    V expected = LANE(ramp)(normal, step), next = LANE(set)(step * LANES), many = LANE(set)(0);
    size_t k = 0;
    for (; k + LANES <= n; k += LANES) {
        V cur = LANE(load)(src + k);
        if (LANE(nonzero)(LANE(xor)(LANE(lane_change)(&l->norm, cur), expected)))
            break;
        many = LANE(or)(many, cur);
        expected = LANE(add)(expected, next);
    }
    seen = LANE(fold)(many);
    for (; k < n && lane_changed(&l->norm, src[k]) == normal + k * step; k++)
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
            LANE(store)(src + k, LANE(lane_change)(&l->wrprotect, LANE(load)(src + k)));
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
    enum { MANY = 4 };
    /* Mostly all entries are like the first, and all words like the fifth page's: behind counters and MM-ID slots. */
    const uint64_t normal = lane_changed(&l->norm, v), first = lane_child(l, v, 1), like = words[n > 4 ? 4 : n - 1];
    const V next = LANE(set)(step * LANES), change = LANE(set)(lane_wrprotect(l, v) - v), to_child = LANE(set)(first - v);
    const V to_normal = LANE(set)(normal - v), one = LANE(set)(l->page_mapcount);
    const V ae = LANE(set)(clear), usual = LANE(set)(like), usually = LANE(set)((like & ~clear) + l->page_mapcount);
    const uint64_t extent = l->extent_at - l->extent_pfn;
    const int prefetch = l->prefetch;
    uint64_t counts[LANES];
    V same = LANE(ramp)(v, step), exclusive = LANE(set)(0), seen = LANE(set)(like);
    const size_t distance = LANE_AHEAD_LARGE;
    size_t k = 0, lane, nr_usual = 0, j;
    if (prefetch && n < ahead)
        LANE_PREFETCH_AT(l->aux, ((src[n] & l->pfn_mask) >> LANE_PFN_SHIFT) + extent);
    while (k + LANES <= n) {
        V cur, wp, w;
        for (; k + MANY * LANES <= n; k += MANY * LANES) {
            V differ = LANE(set)(0), many[MANY];
            lane_stream(src + k, MANY * LANES);
            lane_stream(dst + k, MANY * LANES);
            if (prefetch && k + distance < ahead) {
                uint64_t at = ((src[k + distance] & l->pfn_mask) >> LANE_PFN_SHIFT) + extent;
                for (j = 0; j < MANY * LANES; j += LANE_LINE)
                    LANE_PREFETCH_AT(l->words, at + j);
            }
            for (j = 0; j < MANY; j++) {
                many[j] = j ? LANE(add)(many[j - 1], next) : same;
                differ = LANE(or)(differ, LANE(xor)(LANE(load)(src + k + j * LANES), many[j]));
                differ = LANE(or)(differ, LANE(xor)(LANE(load)(words + k + j * LANES), usual));
            }
            if (LANE(nonzero)(differ))
                break;
            for (j = 0; j < MANY; j++) {
                LANE(store)(src + k + j * LANES, LANE(add)(many[j], change));
                LANE(store)(dst + k + j * LANES, LANE(add)(many[j], to_child));
                LANE(store)(words + k + j * LANES, usually);
            }
            same = LANE(add)(many[MANY - 1], next);
            nr_usual += MANY;
        }
        if (k + LANES > n)
            break;
        cur = LANE(load)(src + k);
        wp = LANE(lane_change)(&l->wrprotect, cur);
        if (LANE(nonzero)(LANE(xor)(LANE(lane_change)(&l->norm, cur), LANE(add)(same, to_normal))))
            break;
        LANE(store)(src + k, wp);
        LANE(store)(dst + k, LANE(add)(same, to_child));
        w = LANE(load)(words + k);
        seen = LANE(or)(seen, w);
        exclusive = LANE(add)(exclusive, LANE(shr)(LANE(and)(w, ae), AE_BIT_));
        LANE(store)(words + k, LANE(add)(LANE(andnot)(ae, w), one));
        same = LANE(add)(same, next);
        k += LANES;
    }
    LANE(store)(counts, exclusive);
    for (lane = 0; lane < LANES; lane++)
        l->exclusive += (int64_t)counts[lane];
    l->mapcounts |= LANE(fold)(seen);
    l->exclusive += like & clear ? (int64_t)(nr_usual * LANES) : 0;
    for (; k < n; k++) {
        uint64_t cur = src[k];
        if (lane_changed(&l->norm, cur) != normal + k * step)
            break;
        src[k] = lane_wrprotect(l, cur);
        dst[k] = first + k * step;
        lane_pages_scalar(l, words + k, clear);
    }
    return k;
}

/* Folios of more than LANE_WHOLE pages from the front of n entries, the first of which is v, as in lane_whole; any that are
 * not like one of the two kinds met last end it, and are left as they were. */
LANE_TARGET LANE_INLINE size_t LANE(lane_alike)(struct lane *l, uint64_t *src, uint64_t *dst, size_t n, size_t left,
                                                size_t ahead, uint64_t v, const size_t pages, const int order)
{
    enum { MANY = LANES > 1 ? 2 : 4 }; /* more would not fit the registers */
    struct lane_like *const likes = l->likes[order];
    const uint64_t pfn_mask = l->pfn_mask, extent_pfn = l->extent_pfn, hard = l->present | l->valid | l->special;
    const uint64_t room = l->extent_len < pages ? 0 : l->extent_len - pages + 1;
    const uint64_t flip = v & l->valid ? 0 : l->inverted, step = lane_step(l, v);
    const int mm_id = l->mm_id, prefetch = l->prefetch, bypass = LANE(may_bypass)(l, dst);
    const V next = LANE(set)(step * LANES), ramp = LANE(ramp)(0, step);
    uint64_t *const all = l->words + l->extent_at, *const aux = l->aux + l->extent_at;
    const int write = likes[0].write | likes[1].write;
    size_t i = 0, k, j;
    for (; i + pages <= n; i += pages) {
        const uint64_t head = src[i], pfn = ((head ^ flip) & pfn_mask) >> LANE_PFN_SHIFT, at = pfn - extent_pfn;
        const uint64_t flags = head & ~pfn_mask;
        uint64_t *const words = all + at;
        struct lane_like *t;
        uint64_t next_at = at; /* of the folio whose words are fetched */
        V same = LANE(add)(LANE(set)(head), ramp), usual, usually, protect, child;
        if (at >= room || pfn & (pages - 1) || (head ^ v) & hard)
            break;
        t = likes + (flags + words[0] == likes[1].key);
        if (flags != t->flags || words[0] != t->before[0] || words[1] != t->before[1]
            || (mm_id && ((aux[at] ^ t->aux[0]) | (aux[at + 1] ^ t->aux[1]))))
            break;
        words[0] = words[1] = t->before[2]; /* so that all are compared alike */
        usual = LANE(set)(t->before[2]);
        usually = LANE(set)(t->after[2]);
        protect = LANE(set)(t->protect);
        child = LANE(set)(t->child);
        if (prefetch && i + LANE_AHEAD_LARGE < ahead) {
            next_at = (((src[i + LANE_AHEAD_LARGE] ^ flip) & pfn_mask) >> LANE_PFN_SHIFT) - extent_pfn;
            if (mm_id)
                LANE_PREFETCH_AT(aux, next_at);
            LANE_PREFETCH_READ(LANE_ADDRESS(src, i + 2 * LANE_AHEAD_LARGE));
        }
        for (k = 0; k < pages; k += MANY * LANES) {
            V differ = LANE(set)(0), many[MANY];
            lane_stream(src + i + k, MANY * LANES);
            if (!bypass)
                lane_stream(dst + i + k, MANY * LANES);
            for (j = 0; j < MANY * LANES; j += LANE_LINE)
                LANE_PREFETCH_AT(all, next_at + k + j);
            for (j = 0; j < MANY; j++) {
                many[j] = j ? LANE(add)(many[j - 1], next) : same;
                differ = LANE(or)(differ, LANE(xor)(LANE(load)(src + i + k + j * LANES), many[j]));
                differ = LANE(or)(differ, LANE(xor)(LANE(load)(words + k + j * LANES), usual));
            }
            if (LANE(nonzero)(differ))
                break;
            for (j = 0; j < MANY; j++) {
                if (write)
                    LANE(store)(src + i + k + j * LANES, LANE(add)(many[j], protect));
                LANE(put)(bypass, dst + i + k + j * LANES, LANE(add)(many[j], child));
                LANE(store)(words + k + j * LANES, usually);
            }
            same = LANE(add)(many[MANY - 1], next);
        }
        if (k < pages) { /* back: the child's entries are written again by who goes on here */
            for (j = 0; j < k; j++) {
                src[i + j] -= t->protect;
                words[j] = t->before[2];
            }
            words[0] = t->before[0];
            words[1] = t->before[1];
            break;
        }
        words[0] = t->after[0];
        words[1] = t->after[1];
        if (mm_id) {
            aux[at] = t->aux_after[0];
            aux[at + 1] = t->aux_after[1];
        }
        t->folios++;
    }
    lane_behind(l, i, n, left, pages);
    return i;
}

/* Entries from the front of n that map the pages of a large folio from the first on, each copied by itself; what the
 * entries are like does not matter. Returns how many. */
LANE_TARGET LANE_INLINE size_t LANE(lane_each)(struct lane *l, uint64_t *src, uint64_t *dst, uint64_t *words, size_t n,
                                               uint64_t v, uint64_t step, uint64_t clear)
{
    const uint64_t which = l->pfn_mask | l->valid | l->present | l->special;
    const V mask = LANE(set)(which), next = LANE(set)(step * LANES);
    V same = LANE(ramp)(v & which, step);
    size_t k = 0;
    for (; k + LANES <= n; k += LANES) {
        V cur = LANE(load)(src + k);
        if (LANE(nonzero)(LANE(xor)(LANE(and)(cur, mask), same)))
            break;
        lane_stream(src + k, LANES);
        lane_stream(dst + k, LANES);
        if (l->cow)
            cur = LANE(lane_protect)(l, src + k, cur);
        LANE(store)(dst + k, LANE(lane_to_child)(l, cur));
        LANE(lane_pages)(l, words + k, clear);
        same = LANE(add)(same, next);
    }
    for (; k < n && (src[k] & which) == (v & which) + k * step; k++) {
        uint64_t cur = src[k];
        if (l->cow)
            cur = lane_protect_scalar(l, src + k, cur);
        dst[k] = lane_to_child_scalar(l, cur);
        lane_pages_scalar(l, words + k, clear);
    }
    return k;
}

/* Folios of the order at hand, each mapped whole. Short ones take the vectors they fill. */
LANE_TARGET LANE_APART size_t LANE(lane_wholes)(struct lane *l, uint64_t *src, uint64_t *dst, size_t n, size_t left,
                                                size_t ahead, uint64_t v, uint64_t w, int order)
{
    switch (order) {
    case 1:
        return lane_whole_scalar(l, src, dst, n, left, ahead, v, w, 2, 1);
    case 2:
        return LANE4(lane_whole)(l, src, dst, n, left, ahead, v, w, 4, 2);
    case 3:
        return LANE(lane_whole)(l, src, dst, n, left, ahead, v, w, 8, 3);
    case 4:
        return LANE(lane_whole)(l, src, dst, n, left, ahead, v, w, 16, 4);
    default:
        return LANE(lane_alike)(l, src, dst, n, left, ahead, v, (size_t)1 << order, order);
    }
}

/* The front of n entries, the first of which, v, maps a page of a large folio; page is the index of that page's word w. The
 * table ends after `left` entries. Returns how many were copied, or 0 with nothing done if copy_present_ptes() has to. */
LANE_TARGET LANE_INLINE size_t LANE(lane_large)(struct lane *l, uint64_t *src, uint64_t *dst, size_t n, size_t left,
                                                size_t ahead, uint64_t v, uint64_t pfn, size_t page, uint64_t w)
{
    const size_t nr_pages = (size_t)1 << (w >> ORDER_SHIFT_ & (LANE_BIT(ORDER_BITS_) - 1));
    const size_t offset = pfn & (nr_pages - 1), head = page - offset;
    const size_t limit = nr_pages - offset < left ? nr_pages - offset : left;
    const uint64_t step = lane_step(l, v);
    const uint64_t clear = w >> ANON_BIT_ & 1 ? LANE_BIT(AE_BIT_) : 0;
    uint64_t *words = l->words + page;
    const int order = (int)(w >> ORDER_SHIFT_ & (LANE_BIT(ORDER_BITS_) - 1));
    struct lane_like like;
    size_t nr = 0;
    int any = 1;
    if (!offset && w & l->large_mask)
        return 0;
    if (l->large_ok && limit == nr_pages && order < LANE_ORDERS && (l->batching || l->writable == l->write)) {
        nr = LANE(lane_wholes)(l, src, dst, left & (nr_pages - 1) ? left : n, left, ahead, v, w, order);
        if (nr)
            return nr;
    }
    if (offset > page || nr_pages > l->nr_words - head || !lane_large_ok(l, head, w))
        return 0;
    if (l->nr_others && offset && !lane_sole(l, pfn - offset, nr_pages))
        return 0;
    if (l->batching ? !lane_canonical(l, v) : l->writable != l->write)
        return 0;
    if (nr_pages > LANE_WHOLE && !offset) { /* further on, the memmap may end with the second or third word */
        memcpy(like.before, words, 3 * sizeof(like.before[0]));
        memcpy(like.aux, l->aux + head, sizeof(like.aux));
    }
#if LANES > 1
    if (l->batching && limit <= LANE_WHOLE) {
        nr = LANE(lane_pieces)(l, src, dst, limit, left, ahead, pfn, page, w);
        if (nr)
            return nr;
    }
#endif
    if (!l->batching) {
        nr = LANE(lane_each)(l, src, dst, words, limit, v, step, clear);
    } else if (l->cow && v & l->writable) {
        nr = LANE(lane_fused)(l, src, dst, words, limit, ahead, v, step, clear);
    } else {
        nr = LANE(lane_scan)(l, src, limit, v, step, &any);
        LANE(lane_rewrite)(l, src, dst, words, nr, v, step, clear, any);
    }
    if (!nr)
        return 0;
    lane_account(l, head, w, nr);
    if (l->batching) {
        l->hist[nr]++;
        /* Reads of the scan: entries 1..nr-1, the one that ended it, and without the clamp the one behind the folio. */
        l->reads += (int64_t)nr - 1 + (nr < limit || (!l->clamp && limit < left));
        l->wrprotects += any && l->cow;
        l->wrprotected += any && l->cow ? (int64_t)nr : 0;
    } else {
        l->hist[1] += (int64_t)nr;
    }
    if (nr == nr_pages && nr_pages > LANE_WHOLE && order < LANE_ORDERS && lane_canonical(l, v)) {
        lane_like_entries(l, &like, v, w, (v & l->writable) != 0);
        like.nr_exclusive = (like.before[0] & clear ? 1 : 0) + (like.before[1] & clear ? 1 : 0);
        like.nr_exclusive += like.before[2] & clear ? (int64_t)nr - 2 : 0;
        memcpy(like.after, words, 2 * sizeof(like.after[0]));
        like.after[2] = (like.before[2] & ~clear) + l->page_mapcount;
        memcpy(like.aux_after, l->aux + head, sizeof(like.aux_after));
        *lane_other(l, order) = like;
    }
    return nr;
}

#if LANES == 4
/* Fetch the words of the pages that LANES entries map: near, or as far as the second cache. */
LANE_TARGET LANE_INLINE void LANE(lane_fetch)(const struct lane *l, const uint64_t *src, int near)
{
    const uint64_t first = (uintptr_t)(l->words + l->extent_at) - l->extent_pfn * sizeof(uint64_t);
    const V places = LANE(shr)(LANE(and)(LANE(load)(src), LANE(set)(l->pfn_mask)), LANE_PFN_SHIFT - 3);
    uint64_t at[LANES];
    size_t k;
    LANE(store)(at, LANE(add)(places, LANE(set)(first)));
    for (k = 0; k < LANES; k++)
        if (near)
            LANE_PREFETCH((const void *)at[k]);
        else
            LANE_PREFETCH_L2(at[k], 0);
}

/* Small folios and folios of 4, 8 or 16 pages that take turns, from the front of n entries. Four entries, and what is behind
 * them in a larger folio, must be like one of the two kinds of their order met last. Which order it is makes no difference
 * for four entries: it could not be predicted. Fetches the words of all pages ahead. */
LANE_TARGET static size_t LANE(lane_quads)(struct lane *shared, uint64_t *src, uint64_t *dst, size_t n, size_t left,
                                            size_t ahead, size_t fetched)
{
    const struct lane local = *shared, *l = &local; /* as in lane_run */
    const uint64_t pfn_mask = l->pfn_mask;
    struct lane_like (*const likes)[2] = l->likes;
    uint64_t *const words = l->words + l->extent_at;
    const V ramp = LANE(ramp)(0, LANE_BIT(LANE_PFN_SHIFT));
    const size_t distance = l->far ? LANE_AHEAD_TURNS_FAR : LANE_AHEAD_SMALL;
    const size_t fetch = l->prefetch && ahead > distance + 16 ? ahead - distance - 16 : 0;
    const int far = l->far, bypass = LANE(may_bypass)(l, dst);
    int64_t reads = 0;
    size_t i = 0, k, pages;
    if (far && distance < fetch)
        for (k = fetched & ~(size_t)(LANES - 1); k < distance; k += LANES)
            LANE(lane_fetch)(l, src + k, 0);
    for (; i + 16 <= n; i += LANES) { /* advanced by constants: the next entries do not wait for what these are */
        V bad, entries = LANE(load)(src + i), place = LANE(lane_extent)(l, entries, &bad), differ;
        const uint64_t head = src[i], flags = head & ~pfn_mask;
        uint64_t at[LANES], w, other;
        struct lane_like *t;
        unsigned order;
        size_t more = 0;
        LANE(store)(at, LANE(shr)(place, LANE_PFN_SHIFT));
        if (far)
            lane_stream_at(src + i, LANES, distance + LANE_AHEAD_ENTRIES);
        if (i < fetch) {
            LANE(lane_fetch)(l, src + i + distance, !far);
            if (far)
                LANE(lane_fetch)(l, src + i + LANE_NEAR_SMALL, 1);
        }
        if (LANE(nonzero)(bad))
            break;
        w = words[at[0]];
        order = w >> ORDER_SHIFT_ & (LANE_BIT(ORDER_BITS_) - 1);
        if (!(29u >> order & 1))
            break;
        t = likes[order] + (flags + w == likes[order][1].key);
        differ = LANE(and)(LANE(xor)(entries, LANE(add)(LANE(set)(head), ramp)), LANE(set)(t->mask));
        other = (flags ^ t->flags) | ((head >> LANE_PFN_SHIFT | (left - i)) & t->align);
        for (k = 0; k < LANES; k++)
            other |= words[at[k]] ^ t->before[k];
        if (other || LANE(nonzero)(LANE(or)(differ, LANE(twins)(entries))))
            break;
        if (t->unit > LANES) {
            pages = (size_t)t->unit;
            more = pages - LANES;
            if (at[0] + pages > l->extent_len)
                break;
            for (k = LANES; k < pages; k += LANES) {
                differ = LANE(or)(differ, LANE(xor)(LANE(load)(src + i + k), LANE(add)(LANE(set)(head + (k << LANE_PFN_SHIFT)), ramp)));
                differ = LANE(or)(differ, LANE(xor)(LANE(load)(words + at[0] + k), LANE(load)(t->before + k)));
            }
            if (LANE(nonzero)(differ))
                break;
            for (k = LANES; k < pages; k += LANES) {
                const V cur = LANE(load)(src + i + k);
                if (t->write)
                    LANE(store)(src + i + k, LANE(add)(cur, LANE(set)(t->protect)));
                LANE(put)(bypass, dst + i + k, LANE(add)(cur, LANE(set)(t->child)));
                LANE(store)(words + at[0] + k, LANE(load)(t->after + k));
                if (i < fetch) {
                    LANE(lane_fetch)(l, src + i + k + distance, !far);
                    if (far)
                        LANE(lane_fetch)(l, src + i + k + LANE_NEAR_SMALL, 1);
                }
            }
        }
        for (k = 0; k < LANES; k++)
            words[at[k]] = t->after[k];
        if (t->write)
            LANE(store)(src + i, LANE(add)(entries, LANE(set)(t->protect)));
        LANE(put)(bypass, dst + i, LANE(add)(entries, LANE(set)(t->child)));
        t->folios += t->nr;
        i += more;
        if (!l->clamp && l->batching)
            reads += order && i + LANES < n && ((left - i - LANES) & (l->ptrs - 1));
    }
    shared->reads += reads;
    return i;
}
#endif

/* Copy from the front of n slots; returns how many. They lie in one table after the other, of l->ptrs slots; the first ends
 * after `left` slots. ahead entries may be read from src. */
LANE_TARGET static size_t LANE(lane_run)(struct lane *shared, uint64_t *src, uint64_t *dst, size_t n, size_t left, size_t ahead)
{
    struct lane local = *shared, *l = &local; /* a copy that no store into an array can change: it stays in registers */
    uint64_t *const words = l->words + l->extent_at;
    const size_t distance = lane_ahead(l->far);
    size_t i = 0, page, done, fetched = 0;
    int short_runs = 0; /* in a row; below zero: how many more without a try of lane_quads */
    for (; i < n; i += done) {
        uint64_t v = src[i], pfn, w;
        if (!left)
            left = l->ptrs < n - i ? l->ptrs : n - i;
        done = 1;
        if ((v & ~l->none_ignore) == l->none_value) {
            l->none++;
            left--;
            continue;
        }
        if (!(v & l->present)) {
            done = LANE(lane_swaps)(l, src + i, dst + i, n - i);
            if (!done)
                break;
            left = lane_left(l, left, done, n - i);
            continue;
        }
        if (v & l->special)
            break;
        pfn = lane_pfn(l, v);
        page = lane_page(l, pfn);
        if (page >= l->nr_words)
            break;
        w = l->words[page];
#if LANES > 1
        if (short_runs >= LANE_SHORT_RUNS && (w >> ORDER_SHIFT_ & (LANE_BIT(ORDER_BITS_) - 1)) <= 4) {
            done = LANE4(lane_quads)(l, src + i, dst + i, n - i, left, ahead - i, fetched > i ? fetched - i : 0);
            if (done) {
                left = lane_left(l, left, done, n - i);
                short_runs = 2 * LANE_SHORT_RUNS;
                continue;
            }
            short_runs = -LANE_SHORT;
        }
#endif
        done = 1;
        if (!((w ^ l->small_value) & l->small_mask)) {
            done = LANE(lane_group)(l, src + i, dst + i, n - i, ahead - i, w);
#if LANES > 1
            if (!done && LANES <= n - i && l->extent_len)
                done = LANE(lane_sparse)(l, src + i, dst + i, ahead - i);
#endif
            if (!done) {
                lane_small(l, src + i, dst + i, v, l->words + page, w);
                done = 1;
            }
            if (done < LANE_SHORT && short_runs >= 0 && l->writable == l->write)
                lane_like_small(l, v, w);
        } else if (w >> VALID_BIT_ && w >> ORDER_SHIFT_ & (LANE_BIT(ORDER_BITS_) - 1)) {
            done = LANE(lane_large)(l, src + i, dst + i, n - i, left, ahead - i, v, pfn, page, w);
        } else {
            done = 0;
        }
        if (!done)
            break;
        short_runs += done < LANE_SHORT ? 1 : short_runs > 0 ? -1 : 0;
        if (l->far && short_runs && done < LANE_SHORT) {
            const size_t from = i + done, until = from + distance < ahead ? from + distance : ahead;
            for (fetched = fetched < from ? from : fetched; fetched < until; fetched++)
                LANE_PREFETCH_AT(words, ((src[fetched] & l->pfn_mask) >> LANE_PFN_SHIFT) - l->extent_pfn);
        }
        left = lane_left(l, left, done, n - i);
    }
    if (l->bypass)
        lane_fence();
    *shared = local;
    return i;
}

/* Mark what MARK entries map; nonzero, with no or not all marks made, if one maps no page of the extent. */
LANE_TARGET LANE_INLINE int LANE(lane_mark_some)(const struct lane *l, const uint64_t *src, uint64_t *row)
{
    enum { MARK = LANES > 1 ? 2 * LANES : LANE_QUAD };
    const uint64_t first = src[0], rel = ((first & l->pfn_mask) >> LANE_PFN_SHIFT) - l->extent_pfn;
    uint64_t *const quads = row + LANE_MARKS, *const pages = quads + lane_quad_words(l->extent_len);
    uint64_t at[MARK];
    V bad, differ = LANE(set)(0), apart = LANE(set)(0);
    size_t k;
    lane_stream(src, MARK);
    for (k = 0; k < MARK; k += LANES) {
        const V ramp = LANE(ramp)(k << LANE_PFN_SHIFT, LANE_BIT(LANE_PFN_SHIFT));
        differ = LANE(or)(differ, LANE(xor)(LANE(load)(src + k), LANE(add)(LANE(set)(first), ramp)));
    }
    if (!LANE(nonzero)(differ) && first & l->valid && !(first & l->special) && rel < l->extent_len
        && MARK <= l->extent_len - rel && !(rel % LANE_QUAD) && rel % LANE_QUADS <= LANE_QUADS - MARK) {
        quads[rel / LANE_QUADS] |= (LANE_BIT(MARK / LANE_QUAD) - 1) << rel / LANE_QUAD % 64;
        return 0;
    }
    for (k = 0; k < MARK; k += LANES) {
        const V place = LANE(lane_extent)(l, LANE(load)(src + k), &bad);
        if (LANE(nonzero)(bad))
            return 1;
        apart = LANE(or)(apart, LANE(apart)(place));
        LANE(store)(at + k, LANE(shr)(place, LANE_PFN_SHIFT));
    }
    if (LANES == 1)
        apart = LANE(set)((at[1] - at[0] - 1) | (at[2] - at[0] - 2) | (at[3] - at[0] - 3) | at[0] % LANE_QUAD);
    if (!LANE(nonzero)(apart)) {
        for (k = 0; k < MARK; k += LANE_QUAD)
            quads[at[k] / LANE_QUADS] |= LANE_BIT(at[k] / LANE_QUAD % 64);
        return 0;
    }
    if (!row[2])
        lane_mark_pages(l, row);
    for (k = 0; k < MARK; k++)
        pages[at[k] / 64] |= LANE_BIT(at[k] % 64);
    return 0;
}

/* Mark what n entries map, in the row of a thread; returns how many from the front are none or map pages of the extent. */
LANE_TARGET static size_t LANE(lane_mark)(const struct lane *shared, const uint64_t *src, size_t n, uint64_t *row)
{
    enum { MARK = LANES > 1 ? 2 * LANES : LANE_QUAD };
    const struct lane local = *shared, *l = &local; /* as in lane_run */
    const size_t part = n / LANE_STREAMS & ~(size_t)(MARK - 1);
    uint64_t *const pages = row + LANE_MARKS + lane_quad_words(l->extent_len);
    size_t i = 0, k;
    int bad = 0;
    row[2] = 0;
    memset(row + LANE_MARKS, 0, lane_quad_words(l->extent_len) * sizeof(*row));
    if (part >= LANE_LONG) { /* several streams, as in lane_check */
        for (; i < part && !bad; i += MARK)
            for (k = 0; k < LANE_STREAMS; k++)
                bad |= LANE(lane_mark_some)(l, src + i + k * part, row);
        i = bad ? i - MARK : LANE_STREAMS * part;
    }
    while (i < n) {
        const size_t many = i + MARK <= n ? MARK : 1;
        if (many > 1 && !LANE(lane_mark_some)(l, src + i, row)) {
            i += many;
            continue;
        }
        for (k = 0; k < many; k++, i++) {
            const uint64_t v = src[i], rel = lane_pfn(l, v) - l->extent_pfn;
            if ((v & ~l->none_ignore) == l->none_value)
                continue;
            if (!(v & l->valid) || v & l->special || rel >= l->extent_len)
                return i;
            if (!row[2])
                lane_mark_pages(l, row);
            pages[rel / 64] |= LANE_BIT(rel % 64);
        }
    }
    return i;
}

/* Folios of `pages` pages from the front of n entries that are mapped whole, by entries like v, which is writable and maps the
 * first page of such a folio; w is its word. Returns the entries protected. */
LANE_TARGET LANE_INLINE size_t LANE(lane_protect_alike)(struct lane *l, uint64_t *src, size_t n, size_t ahead, uint64_t v,
                                                        uint64_t w, const size_t pages)
{
    const uint64_t sized = LANE_BIT(VALID_BIT_) | (LANE_BIT(ORDER_BITS_) - 1) << ORDER_SHIFT_, pfn_mask = l->pfn_mask;
    const uint64_t flags = v & ~pfn_mask, change = lane_wrprotect(l, v) - v, extent_pfn = l->extent_pfn;
    const uint64_t room = l->extent_len < pages ? 0 : l->extent_len - pages + 1;
    const V lanes = LANE(ramp)(0, LANE_BIT(LANE_PFN_SHIFT)), next = LANE(set)(LANES << LANE_PFN_SHIFT);
    const uint64_t *const words = l->words + l->extent_at;
    const size_t distance = l->far ? LANE_AHEAD_LARGE : 2 * LANE_AHEAD_LARGE;
    const size_t fetch = l->prefetch && ahead > distance ? ahead - distance : 0;
    size_t i = 0, k;
    for (; i + pages <= n; i += pages) {
        const uint64_t place = src[i] & pfn_mask, at = (place >> LANE_PFN_SHIFT) - extent_pfn, head = place | flags;
        V same = LANE(add)(LANE(set)(head), lanes), differ = LANE(set)(0);
        uint64_t other = 0;
        if (at >= room || (place >> LANE_PFN_SHIFT & (pages - 1)) | ((words[at] ^ w) & sized))
            break;
        if (i < fetch) {
            const uint64_t next = ((src[i + distance] & pfn_mask) >> LANE_PFN_SHIFT) - extent_pfn;
            LANE_PREFETCH_READ(LANE_ADDRESS(words, next));
        }
        for (k = 0; k + LANES <= pages; k += LANES) {
            differ = LANE(or)(differ, LANE(xor)(LANE(load)(src + i + k), same));
            same = LANE(add)(same, next);
        }
        for (; k < pages; k++)
            other |= src[i + k] ^ (head + (k << LANE_PFN_SHIFT));
        if (other || LANE(nonzero)(differ))
            break;
        for (k = 0; k + LANES <= pages; k += LANES)
            LANE(store)(src + i + k, LANE(add)(LANE(load)(src + i + k), LANE(set)(change)));
        for (; k < pages; k++)
            src[i + k] = head + change + (k << LANE_PFN_SHIFT);
    }
    return i;
}

/* Write-protection of the front of n slots, as lane_run goes through them; returns how many. */
LANE_TARGET static size_t LANE(lane_protect_run)(struct lane *l, uint64_t *src, size_t n, size_t left, size_t ahead)
{
    const uint64_t sized = LANE_BIT(VALID_BIT_) | (LANE_BIT(ORDER_BITS_) - 1) << ORDER_SHIFT_;
    uint64_t *const words = l->words + l->extent_at;
    const size_t distance = lane_ahead(l->far);
    size_t i = 0, done, k;
    for (; i < n; i += done) {
        uint64_t v = src[i], w, pfn, step;
        size_t page, nr_pages, limit, nr, from = i;
        int any = 0;
        if (!left)
            left = l->ptrs < n - i ? l->ptrs : n - i;
        done = 1;
        if ((v & ~l->none_ignore) == l->none_value) {
            l->none++;
            l->reads++;
            left--;
            continue;
        }
        if (!(v & l->present) || v & l->special)
            break;
        pfn = lane_pfn(l, v);
        page = lane_page(l, pfn);
        if (page >= l->nr_words || !(l->words[page] >> VALID_BIT_))
            break;
        w = l->words[page];
        nr_pages = (size_t)1 << (w >> ORDER_SHIFT_ & (LANE_BIT(ORDER_BITS_) - 1));
        nr = nr_pages - (pfn & (nr_pages - 1));
        limit = !l->batching ? 1 : nr < left ? nr : left;
        if (page + nr < nr_pages || page + nr > l->nr_words)
            break; /* not whole in the memmap */
        step = lane_step(l, v);
        if (nr_pages == 1 || !l->batching) {
            /* LANES pages, each by itself; of what they are only the size matters, and without batching not even that. */
            V bad = LANE(set)(0);
            uint64_t at[LANES];
            int small = 1;
            if (n - i >= LANES && v & l->valid && l->writable == l->write && l->extent_len) {
                LANE(store)(at, LANE(shr)(LANE(lane_extent)(l, LANE(load)(src + i), &bad), LANE_PFN_SHIFT));
                if (!LANE(nonzero)(bad)) {
                    for (k = 0; l->batching && k < LANES; k++)
                        small &= (words[at[k]] & sized) == LANE_BIT(VALID_BIT_);
                    if (l->prefetch && l->batching && i + distance + LANES <= ahead)
                        for (k = 0; k < LANES; k++)
                            LANE_PREFETCH_AT(words, ((src[i + distance + k] & l->pfn_mask) >> LANE_PFN_SHIFT) - l->extent_pfn);
                    done = small ? LANES : 1;
                }
            }
            if (done > 1) {
                LANE(lane_protect)(l, src + i, LANE(load)(src + i));
            } else if (v & l->writable) {
                src[i] = lane_wrprotect(l, v);
                l->wrprotects++;
                l->wrprotected++;
            }
            l->hist[1] += (int64_t)done;
            l->reads += (int64_t)done;
        } else {
            done = LANE(lane_scan)(l, src + i, limit, v, step, &any);
            if (!done)
                break; /* written to meanwhile */
            for (k = 0; any && k < done; k++)
                src[i + k] = lane_wrprotect(l, src[i + k]);
            l->hist[done]++;
            l->reads += (int64_t)done + (done < limit || (!l->clamp && limit < left));
            l->wrprotects += any;
            l->wrprotected += any ? (int64_t)done : 0;
            /* Whole folios of that size behind it whose entries are all alike and like its first. */
            if (done == nr_pages && !(left & (nr_pages - 1)) && v & l->write && v & l->valid) {
                i += done;
                switch (nr_pages) {
                case 4:
                    i += LANE4(lane_protect_alike)(l, src + i, n - i, ahead - i, v, w, 4);
                    break;
                case 8:
                    i += LANE(lane_protect_alike)(l, src + i, n - i, ahead - i, v, w, 8);
                    break;
                case 16:
                    i += LANE(lane_protect_alike)(l, src + i, n - i, ahead - i, v, w, 16);
                    break;
                default:
                    i += LANE(lane_protect_alike)(l, src + i, n - i, ahead - i, v, w, nr_pages);
                }
                nr = (i - from) / nr_pages - 1;
                l->hist[nr_pages] += (int64_t)nr;
                l->reads += (int64_t)(nr * nr_pages);
                if (!l->clamp)
                    l->reads += (int64_t)(nr - (lane_ends(l, i - from, n - from, left) - (done == left)));
                l->wrprotects += (int64_t)nr;
                l->wrprotected += (int64_t)(nr * nr_pages);
                done = i - from;
                i = from;
            }
        }
        left = lane_left(l, left, done, n - i);
    }
    return i;
}

#undef V
