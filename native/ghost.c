#include "ghost.h"
#include "eviction.h"
#include <stdlib.h>

static struct us_ghost_entry *bucket_of(const struct us_ghost *ghost, uint32_t page) {
    return &ghost->entry[(us_mix(page) & (ghost->buckets - 1)) * US_GHOST_BUCKET];
}

static bool counts(const struct us_ghost *ghost, const struct us_ghost_entry *entry) {
    return entry->number && ghost->number - entry->number < ghost->reach;
}

static void put(struct us_ghost *ghost, uint32_t page, uint32_t number) {
    struct us_ghost_entry *bucket = bucket_of(ghost, page), *chosen = bucket;
    for (unsigned i = 0; i < US_GHOST_BUCKET; i++) {
        if (bucket[i].number && bucket[i].page == page) {
            chosen = &bucket[i];
            break;
        }
        if (chosen->number && (!bucket[i].number || ghost->number - bucket[i].number > ghost->number - chosen->number))
            chosen = &bucket[i];
    }
    *chosen = (struct us_ghost_entry){page, number};
}

bool us_ghost_size(struct us_ghost *ghost, uint32_t reach) {
    uint32_t buckets = 1;
    while ((uint64_t)buckets * US_GHOST_BUCKET < 2ull * reach)
        buckets *= 2;
    if (buckets != ghost->buckets) {
        struct us_ghost old = *ghost;
        struct us_ghost_entry *entry = calloc((size_t)buckets * US_GHOST_BUCKET, sizeof *entry);
        if (!entry)
            return false;
        ghost->entry = entry;
        ghost->buckets = buckets;
        for (uint64_t i = 0; i < (uint64_t)old.buckets * US_GHOST_BUCKET; i++)
            if (counts(&old, &old.entry[i]))
                put(ghost, old.entry[i].page, old.entry[i].number);
        free(old.entry);
    }
    ghost->reach = reach;
    return true;
}

void us_ghost_add(struct us_ghost *ghost, uint32_t page) {
    if (!++ghost->number)
        ghost->number = 1;
    put(ghost, page, ghost->number);
}

bool us_ghost_take(struct us_ghost *ghost, uint32_t page) {
    struct us_ghost_entry *bucket = bucket_of(ghost, page);
    for (unsigned i = 0; i < US_GHOST_BUCKET; i++) {
        if (!bucket[i].number || bucket[i].page != page)
            continue;
        bool found = counts(ghost, &bucket[i]);
        bucket[i].number = 0;
        return found;
    }
    return false;
}

void us_ghost_free(struct us_ghost *ghost) { free(ghost->entry); }
