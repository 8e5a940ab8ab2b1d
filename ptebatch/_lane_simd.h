/*
 * The lane's loops over entries, once for every SIMD level: _lane.h includes this file with LANE(name) giving a name its
 * level's suffix, LANE_TARGET the level's target attribute, LANES the entries in a vector, and the vector operations
 * load, store, set (all lanes), ramp (first, first + step, ...), and, andnot (~a & b), or, xor, add, sub, shr,
 * nonzero (any lane), count (lanes that have a bit), choose (x == y ? a : b in each lane), fold (OR of all lanes).
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

/* Nonzero if one of LANES entries is not a PROT_NONE entry that maps a page of the extent. */
LANE_TARGET LANE_INLINE V LANE(lane_protnone)(const struct lane *l, V v)
{
    const V protnone = LANE(set)(l->present & ~l->valid);
    V bad;
    LANE(lane_extent)(l, LANE(xor)(v, LANE(set)(l->inverted | l->valid)), &bad);
    return LANE(or)(bad, LANE(andnot)(v, protnone));
}

/* Nonzero if one of 4 * LANES entries is not as lane_extent wants it. */
LANE_TARGET LANE_INLINE V LANE(lane_bad)(const struct lane *l, const uint64_t *entries)
{
    V bad = LANE(set)(0), more;
    size_t k = 0;
    for (; k < 4 * LANES; k += LANES) {
        LANE(lane_extent)(l, LANE(load)(entries + k), &more);
        bad = LANE(or)(bad, more);
    }
    lane_stream(entries, 4 * LANES);
    return bad;
}

/* The read-only pass: entries from the front, LANES at a time, that all are none or map pages of the extent. */
LANE_TARGET static size_t LANE(lane_check)(const struct lane *l, const uint64_t *entries, size_t n)
{
    const V none = LANE(set)(l->none_value);
    const size_t part = n / LANE_STREAMS & ~(size_t)(4 * LANES - 1);
    size_t i = 0, k;
    V bad, v;
    /* Mostly nothing is bad. One stream of reads does not keep the memory busy: several at once do. */
    if (part >= LANE_LONG) {
        for (; i < part; i += 4 * LANES) {
            bad = LANE(lane_bad)(l, entries + i);
            for (k = 1; k < LANE_STREAMS; k++)
                bad = LANE(or)(bad, LANE(lane_bad)(l, entries + i + k * part));
            if (LANE(nonzero)(bad))
                break;
        }
        i = i < part ? i : LANE_STREAMS * part;
    }
    for (; i + LANES <= n; i += LANES) {
        while (i + 4 * LANES <= n && !LANE(nonzero)(LANE(lane_bad)(l, entries + i)))
            i += 4 * LANES;
        for (bad = LANE(set)(0); i + LANES <= n && !LANE(nonzero)(bad); i += LANES)
            LANE(lane_extent)(l, LANE(load)(entries + i), &bad);
        if (!LANE(nonzero)(bad))
            break;
        i -= LANES;
        v = LANE(load)(entries + i);
        if (LANE(nonzero)(LANE(xor)(v, none)) && LANE(nonzero)(LANE(lane_protnone)(l, v)))
            break;
    }
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
    const int cow = l->cow, prefetch = l->prefetch;
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
        if (prefetch && i + LANE_AHEAD_SMALL + LANES <= ahead)
            for (k = 0; k < LANES; k++) {
                uint64_t next = ((src[i + LANE_AHEAD_SMALL + (size_t)k] & pfn_mask) >> LANE_PFN_SHIFT) - extent_pfn;
                LANE_PREFETCH_AT(words, next);
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

/* One more mapping of LANES pages of a large folio; clear is the exclusive bit where the folio is anonymous. */
LANE_TARGET LANE_INLINE void LANE(lane_pages)(struct lane *l, uint64_t *words, uint64_t clear)
{
    V w = LANE(load)(words);
    l->exclusive += LANE(count)(w, clear);
    if (LANE(nonzero)(LANE(and)(w, LANE(set)((uint64_t)3 << (MAPCOUNT_BITS_ - 2)))))
        l->mapcounts |= LANE(fold)(w);
    LANE(store)(words, LANE(add)(LANE(andnot)(LANE(set)(clear), w), LANE(set)(l->page_mapcount)));
}

/* Folios of `pages` pages (constant where inlined: 2 to 16) from the front of n entries, the first of which is v, each
 * mapped whole by entries that form one batch, or without batching are alike. Everything of a folio stays in registers.
 * Returns the entries copied. The first table ends after `left` entries, and every further one after l->ptrs more; no
 * folio crosses an end.
 *
 * What a folio's words and entries become is worked out for one folio; those behind it that are the same but for where
 * they are (all entries like the first, all words and MM-ID slots as they were there) are only compared and stored. The
 * slots of folios of 4 pages and more are in their words; where they are spilled, or would be, this stops. */
LANE_TARGET LANE_INLINE size_t LANE(lane_whole)(struct lane *l, uint64_t *src, uint64_t *dst, size_t n, size_t left,
                                                size_t ahead, uint64_t v, const size_t pages, const uint64_t order)
{
    enum { MOST = 16 / LANES };
    const uint64_t counter = (uint64_t)pages << COUNTER_SHIFT_, pfn_mask = l->pfn_mask, extent_pfn = l->extent_pfn;
    const uint64_t room = l->extent_len < pages ? 0 : l->extent_len - pages + 1, hard = l->present | l->valid | l->special;
    const uint64_t flip = v & l->valid ? 0 : l->inverted, step = lane_step(l, v);
    const V all = LANE(set)(LANE_WHOLE_MASK | l->large_mask);
    const int inlined = pages >= 4, mm_id = l->mm_id, prefetch = l->prefetch, second = l->large_mapcount, cow = l->cow;
    uint64_t *const words = l->words + l->extent_at, *const aux = l->aux + l->extent_at, first[16] = {
        counter + l->page_mapcount, (second ? counter : 0) + l->page_mapcount,
        l->page_mapcount, l->page_mapcount, l->page_mapcount, l->page_mapcount, l->page_mapcount, l->page_mapcount,
        l->page_mapcount, l->page_mapcount, l->page_mapcount, l->page_mapcount, l->page_mapcount, l->page_mapcount,
        l->page_mapcount, l->page_mapcount};
    V ramp[MOST], mask[MOST];
    size_t i = 0, k, nr;
    for (k = 0; k < pages / LANES; k++) {
        ramp[k] = LANE(ramp)(k * LANES * step, step);
        /* Page 2's field may be shared, but page 3's not spilled. */
        mask[k] = inlined ? LANE(andnot)(LANE(and)(LANE(load)(lane_third + k * LANES), LANE(set)(INLINE_FLAG)), all) : all;
    }
    while (i + pages <= n) {
        V before[MOST], after[MOST], wp[MOST], differ = LANE(set)(0), seen = LANE(set)(0), other = LANE(set)(0), value, normal;
        uint64_t head = src[i], pfn = ((head ^ flip) & pfn_mask) >> LANE_PFN_SHIFT, at = pfn - extent_pfn, w, exclusive, child;
        uint64_t third = 0, fourth = 0, flags, to_wp, nr_exclusive = 0; /* what pages 2 and 3 get: new slots for old */
        struct mm_slots slots = { { 0, 0 } }, slots_after;
        size_t from = i;
        int any;
        if (at >= room || pfn & (pages - 1) || (head ^ v) & hard)
            break;
        flags = lane_changed(&l->norm, head);
        if (lane_changed(&l->norm, src[i + 1]) != flags + step
            || lane_changed(&l->norm, src[i + pages - 1]) != flags + (pages - 1) * step)
            break; /* where batches are short, this mostly tells */
        w = words[at];
        exclusive = (w >> ANON_BIT_ & 1) << AE_BIT_;
        value = LANE(set)((w & LANE_KIND) | order << ORDER_SHIFT_ | LANE_BIT(VALID_BIT_));
        normal = LANE(set)(flags);
        for (k = 0; k < pages / LANES; k++) {
            V cur = LANE(load)(src + i + k * LANES);
            wp[k] = LANE(lane_change)(&l->wrprotect, cur);
            differ = LANE(or)(differ, LANE(xor)(LANE(lane_change)(&l->norm, cur), LANE(add)(normal, ramp[k])));
            other = LANE(or)(other, LANE(xor)(cur, LANE(add)(LANE(set)(head), ramp[k])));
            seen = LANE(or)(seen, cur);
            before[k] = LANE(load)(words + at + k * LANES);
            differ = LANE(or)(differ, LANE(and)(LANE(xor)(before[k], value), mask[k]));
        }
        any = LANE(nonzero)(LANE(and)(seen, LANE(set)(l->writable)));
        if (LANE(nonzero)(differ) || !lane_canonical(l, head))
            break;
        if (!l->batching && LANE(nonzero)(other))
            break;
        if (mm_id && inlined) {
            slots.slot[0] = slot_unpacked(words[at + 2]);
            slots.slot[1] = slot_unpacked(words[at + 3]);
        } else if (mm_id) {
            slots.slot[0] = aux[at];
            slots.slot[1] = aux[at + 1];
            if ((slots.slot[0] | slots.slot[1]) & LANE_HALF_AUX)
                break;
        }
        slots_after = slots;
        if (mm_id)
            lane_mm_mapping(l, &slots_after, pages, ((words[at + 1] & LANE_COUNTER) >> COUNTER_SHIFT_) + pages);
        if (mm_id && inlined) {
            if (!slots_fit(&slots_after))
                break;
            third = slot_packed(slots_after.slot[0]) - slot_packed(slots.slot[0]);
            fourth = slot_packed(slots_after.slot[1]) - slot_packed(slots.slot[1]);
        }
        child = lane_child(l, head, any);
        for (k = 0; k < pages / LANES; k++) {
            if (any && cow)
                LANE(store)(src + i + k * LANES, wp[k]);
            LANE(store)(dst + i + k * LANES, LANE(add)(LANE(set)(child), ramp[k]));
            nr_exclusive += (uint64_t)LANE(count)(before[k], exclusive);
            after[k] = LANE(add)(LANE(andnot)(LANE(set)(exclusive), before[k]), LANE(load)(first + k * LANES));
            if (inlined && k * LANES < 4) {
                after[k] = LANE(add)(after[k], LANE(and)(LANE(load)(lane_third + k * LANES), LANE(set)(third)));
                after[k] = LANE(add)(after[k], LANE(and)(LANE(load)(lane_fourth + k * LANES), LANE(set)(fourth)));
            }
            LANE(store)(words + at + k * LANES, after[k]);
        }
        if (mm_id && !inlined) {
            aux[at] = slots_after.slot[0];
            aux[at + 1] = slots_after.slot[1];
        }
        i += pages;
        flags = head & ~pfn_mask;
        to_wp = any && cow ? lane_wrprotect(l, head) - head : 0;
        child -= head;
        for (; !LANE(nonzero)(other) && i + pages <= n; i += pages) {
            V entries[MOST];
            head = src[i];
            pfn = ((head ^ flip) & pfn_mask) >> LANE_PFN_SHIFT;
            at = pfn - extent_pfn;
            if (at >= room || pfn & (pages - 1) || (head & ~pfn_mask) != flags)
                break;
            if (mm_id && !inlined && ((aux[at] ^ slots.slot[0]) | (aux[at + 1] ^ slots.slot[1])))
                break;
            if (prefetch && i + LANE_AHEAD_LARGE + 16 <= ahead) {
                uint64_t next = (((src[i + LANE_AHEAD_LARGE] ^ flip) & pfn_mask) >> LANE_PFN_SHIFT) - extent_pfn;
                LANE_PREFETCH_AT(words, next);
                if (pages == 16)
                    LANE_PREFETCH_AT(words, next + LANE_LINE);
                if (mm_id && !inlined)
                    LANE_PREFETCH_AT(aux, next);
            }
            lane_stream(src + i, pages);
            lane_stream(dst + i, pages);
            differ = LANE(set)(0);
            for (k = 0; k < pages / LANES; k++) {
                entries[k] = LANE(add)(LANE(set)(head), ramp[k]);
                differ = LANE(or)(differ, LANE(xor)(LANE(load)(src + i + k * LANES), entries[k]));
                differ = LANE(or)(differ, LANE(xor)(LANE(load)(words + at + k * LANES), before[k]));
            }
            if (LANE(nonzero)(differ))
                break;
            for (k = 0; k < pages / LANES; k++) {
                if (any && cow)
                    LANE(store)(src + i + k * LANES, LANE(add)(entries[k], LANE(set)(to_wp)));
                LANE(store)(dst + i + k * LANES, LANE(add)(entries[k], LANE(set)(child)));
                LANE(store)(words + at + k * LANES, after[k]);
            }
            if (mm_id && !inlined) {
                aux[at] = slots_after.slot[0];
                aux[at + 1] = slots_after.slot[1];
            }
        }
        nr = (i - from) / pages;
        l->exclusive += (int64_t)(nr * nr_exclusive);
        l->rss[lane_rss(w)] += (int64_t)(i - from);
        l->wrprotects += any && cow ? (int64_t)(l->batching ? nr : i - from) : 0;
        l->wrprotected += any && cow ? (int64_t)(i - from) : 0;
    }
    if (!l->batching) {
        l->hist[1] += (int64_t)i;
        return i;
    }
    nr = i / pages;
    l->hist[pages] += (int64_t)nr;
    /* Reads of the scan: the other entries, and without the clamp the one behind the folio unless the table ends there. */
    l->reads += (int64_t)(i - nr);
    if (!l->clamp)
        l->reads += (int64_t)(nr - lane_ends(l, i, n, left));
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
    size_t k = 0, lane, nr_usual = 0, j;
    if (prefetch && n < ahead)
        LANE_PREFETCH_AT(l->aux, ((src[n] & l->pfn_mask) >> LANE_PFN_SHIFT) + extent);
    while (k + LANES <= n) {
        V cur, wp, w;
        for (; k + MANY * LANES <= n; k += MANY * LANES) {
            V differ = LANE(set)(0), many[MANY];
            lane_stream(src + k, MANY * LANES);
            lane_stream(dst + k, MANY * LANES);
            if (prefetch && k + LANE_AHEAD_LARGE < ahead) {
                uint64_t at = ((src[k + LANE_AHEAD_LARGE] & l->pfn_mask) >> LANE_PFN_SHIFT) + extent;
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

/* lane_whole for the order at hand. Short folios take the vectors they fill. */
LANE_TARGET LANE_INLINE size_t LANE(lane_wholes)(struct lane *l, uint64_t *src, uint64_t *dst, size_t n, size_t left,
                                                 size_t ahead, uint64_t v, size_t pages)
{
    if (pages == 16)
        return LANE(lane_whole)(l, src, dst, n, left, ahead, v, 16, 4);
    if (pages == 8)
        return LANE(lane_whole)(l, src, dst, n, left, ahead, v, 8, 3);
    if (pages == 4)
        return LANE4(lane_whole)(l, src, dst, n, left, ahead, v, 4, 2);
    return lane_whole_scalar(l, src, dst, n, left, ahead, v, 2, 1);
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
    size_t nr = 0;
    int any = 1;
    if (l->large_ok && limit == nr_pages && nr_pages <= 16 && (l->batching || l->writable == l->write)) {
        nr = LANE(lane_wholes)(l, src, dst, left & (nr_pages - 1) ? left : n, left, ahead, v, nr_pages);
        if (nr)
            return nr;
    }
    if (offset > page || nr_pages > l->nr_words - head || !lane_large_ok(l, head, w))
        return 0;
    if (l->nr_others && !lane_sole(l, pfn - offset, nr_pages))
        return 0;
    if (!l->batching) {
        if (l->writable != l->write)
            return 0;
        nr = LANE(lane_each)(l, src, dst, words, limit, v, step, clear);
        lane_account(l, head, w, nr);
        l->hist[1] += (int64_t)nr;
        return nr;
    }
    if (!lane_canonical(l, v))
        return 0;
    if (l->cow && v & l->writable) {
        nr = LANE(lane_fused)(l, src, dst, words, limit, ahead, v, step, clear);
    } else {
        nr = LANE(lane_scan)(l, src, limit, v, step, &any);
        LANE(lane_rewrite)(l, src, dst, words, nr, v, step, clear, any);
    }
    if (!nr)
        return 0;
    lane_account(l, head, w, nr);
    l->hist[nr]++;
    /* Reads of the scan: entries 1..nr-1, the one that ended it, and without the clamp the one behind the folio. */
    l->reads += (int64_t)nr - 1 + (nr < limit || (!l->clamp && limit < left));
    if (any && l->cow) {
        l->wrprotects++;
        l->wrprotected += (int64_t)nr;
    }
    return nr;
}

/* Copy from the front of n slots; returns how many. They lie in one table after the other, of l->ptrs slots; the first ends
 * after `left` slots. ahead entries may be read from src. */
LANE_TARGET static size_t LANE(lane_run)(struct lane *shared, uint64_t *src, uint64_t *dst, size_t n, size_t left, size_t ahead)
{
    struct lane local = *shared, *l = &local; /* a copy that no store into an array can change: it stays in registers */
    size_t i = 0, page, done;
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
        if (!(v & l->present) || v & l->special)
            break;
        pfn = lane_pfn(l, v);
        page = lane_page(l, pfn);
        if (page >= l->nr_words)
            break;
        w = l->words[page];
        if (!((w ^ l->small_value) & l->small_mask)) {
            done = LANE(lane_group)(l, src + i, dst + i, n - i, ahead - i, w);
            if (!done) {
                lane_small(l, src + i, dst + i, v, l->words + page, w);
                done = 1;
            }
        } else if (w >> VALID_BIT_ && w >> ORDER_SHIFT_ & (LANE_BIT(ORDER_BITS_) - 1)) {
            done = LANE(lane_large)(l, src + i, dst + i, n - i, left, ahead - i, v, pfn, page, w);
        } else {
            done = 0;
        }
        if (!done)
            break;
        left = lane_left(l, left, done, n - i);
    }
    *shared = local;
    return i;
}

/* Set the bits of the pages that 2 * LANES entries map; nonzero, and none or not all set, if one maps none of the extent. */
LANE_TARGET LANE_INLINE int LANE(lane_mark_pages)(const struct lane *l, const uint64_t *src, uint64_t *pages)
{
    const V first = LANE(load)(src), second = LANE(load)(src + LANES), ramp = LANE(ramp)(0, LANE_BIT(LANE_PFN_SHIFT));
    const V same = LANE(add)(LANE(set)(src[0]), ramp), next = LANE(set)((uint64_t)LANES << LANE_PFN_SHIFT);
    const V differ = LANE(or)(LANE(xor)(first, same), LANE(xor)(second, LANE(add)(same, next)));
    const uint64_t rel = ((src[0] & l->pfn_mask) >> LANE_PFN_SHIFT) - l->extent_pfn;
    uint64_t at[2 * LANES];
    V bad, place;
    size_t k;
    lane_stream(src, 2 * LANES);
    if (!LANE(nonzero)(differ) && src[0] & l->valid && !(src[0] & l->special) && rel < l->extent_len
        && 2 * LANES <= l->extent_len - rel && rel % 64 <= 64 - 2 * LANES) {
        pages[rel / 64] |= (LANE_BIT(2 * LANES) - 1) << rel % 64;
        return 0;
    }
    for (k = 0; k < 2; k++) {
        place = LANE(lane_extent)(l, k ? second : first, &bad);
        if (LANE(nonzero)(bad))
            return 1;
        LANE(store)(at + k * LANES, LANE(shr)(place, LANE_PFN_SHIFT));
    }
    k = 0;
#if LANES > 1
    for (; k < 2 * LANES && at[1] == at[0] + 1; k += 4) { /* folios of 4 pages */
        const uint64_t apart = (at[k + 1] - at[k] - 1) | (at[k + 2] - at[k] - 2) | (at[k + 3] - at[k] - 3);
        if (apart || at[k] % 64 > 60)
            break;
        pages[at[k] / 64] |= (uint64_t)15 << at[k] % 64;
    }
#endif
    if (k < 2 * LANES)
        for (k = 0; k < 2 * LANES; k++)
            pages[at[k] / 64] |= LANE_BIT(at[k] % 64);
    return 0;
}

/* Set the bits of the pages of the extent that n entries map; returns how many from the front are none or map such pages. */
LANE_TARGET static size_t LANE(lane_mark)(const struct lane *shared, const uint64_t *src, size_t n, uint64_t *pages)
{
    const struct lane local = *shared, *l = &local; /* as in lane_run */
    const size_t part = n / LANE_STREAMS & ~(size_t)(2 * LANES - 1);
    size_t i = 0, k;
    int bad = 0;
    if (part >= LANE_LONG) { /* several streams, as in lane_check */
        for (; i < part && !bad; i += 2 * LANES)
            for (k = 0; k < LANE_STREAMS; k++)
                bad |= LANE(lane_mark_pages)(l, src + i + k * part, pages);
        i = bad ? i - 2 * LANES : LANE_STREAMS * part;
    }
    while (i < n) {
        const size_t many = i + 2 * LANES <= n ? 2 * LANES : 1;
        if (many > 1 && !LANE(lane_mark_pages)(l, src + i, pages)) {
            i += many;
            continue;
        }
        for (k = 0; k < many; k++, i++) {
            const uint64_t v = src[i], rel = lane_pfn(l, v) - l->extent_pfn;
            if ((v & ~l->none_ignore) == l->none_value)
                continue;
            if (!(v & l->valid) || v & l->special || rel >= l->extent_len)
                return i;
            pages[rel / 64] |= LANE_BIT(rel % 64);
        }
    }
    return i;
}

/* Write-protection of the front of n slots, as lane_run goes through them; returns how many. */
LANE_TARGET static size_t LANE(lane_protect_run)(struct lane *l, uint64_t *src, size_t n, size_t left, size_t ahead)
{
    const uint64_t sized = LANE_BIT(VALID_BIT_) | (LANE_BIT(ORDER_BITS_) - 1) << ORDER_SHIFT_;
    uint64_t *const words = l->words + l->extent_at;
    size_t i = 0, done, k;
    for (; i < n; i += done) {
        uint64_t v = src[i], w, pfn, step, flags, change;
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
                    if (l->prefetch && l->batching && i + LANE_AHEAD_SMALL + LANES <= ahead)
                        for (k = 0; k < LANES; k++)
                            LANE_PREFETCH_AT(words, ((src[i + LANE_AHEAD_SMALL + k] & l->pfn_mask) >> LANE_PFN_SHIFT) - l->extent_pfn);
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
            flags = v & ~l->pfn_mask;
            change = lane_wrprotect(l, v) - v;
            if (done == nr_pages && !(left & (nr_pages - 1)) && v & l->write && v & l->valid) {
                const size_t room = l->extent_len < nr_pages ? 0 : l->extent_len - nr_pages + 1;
                const V lanes = LANE(ramp)(0, LANE_BIT(LANE_PFN_SHIFT)), next = LANE(set)(LANES << LANE_PFN_SHIFT);
                for (i += done; i + nr_pages <= n; i += nr_pages) {
                    const uint64_t head = src[i], at = ((head & l->pfn_mask) >> LANE_PFN_SHIFT) - l->extent_pfn;
                    V same = LANE(add)(LANE(set)(head), lanes), differ = LANE(set)(0);
                    uint64_t other = 0;
                    if (at >= room || head >> LANE_PFN_SHIFT & (nr_pages - 1) || (head & ~l->pfn_mask) != flags
                        || (words[at] ^ w) & sized)
                        break;
                    if (l->prefetch && i + LANE_AHEAD_LARGE < ahead)
                        LANE_PREFETCH_AT(words, ((src[i + LANE_AHEAD_LARGE] & l->pfn_mask) >> LANE_PFN_SHIFT) - l->extent_pfn);
                    for (k = 0; k + LANES <= nr_pages; k += LANES) {
                        lane_stream(src + i + k, LANES);
                        differ = LANE(or)(differ, LANE(xor)(LANE(load)(src + i + k), same));
                        same = LANE(add)(same, next);
                    }
                    for (; k < nr_pages; k++)
                        other |= src[i + k] ^ (head + k * step);
                    if (other || LANE(nonzero)(differ))
                        break;
                    same = LANE(add)(LANE(set)(head + change), lanes);
                    for (k = 0; k + LANES <= nr_pages; k += LANES) {
                        LANE(store)(src + i + k, same);
                        same = LANE(add)(same, next);
                    }
                    for (; k < nr_pages; k++)
                        src[i + k] = head + change + k * step;
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
