/* Reading ahead: what a policy named, clipped to pages that are not resident and to the room there is. */
#define _GNU_SOURCE
#include "pager.h"
#include <errno.h>

/* Names one fill from an awaited store; fits a word's handle and is never 0. */
uint64_t us_next_ticket(struct us_client *client) {
    return atomic_fetch_add(&client->ticket, 1) % (US_HANDLE_SAME - 1) + 1;
}

/* Ask the asyncio loop for a run of stored pages that nobody waits for; false when there is no room for all of it. */
bool us_await_ahead(struct us_region *region, uint32_t first, uint32_t count, uint64_t now) {
    struct us_client *client = region->client;
    struct us_miss miss = {.region = region, .ticket = us_next_ticket(client), .time_ns = now, .first = first, .ahead = 1};
    bool room = true;
    if (count > US_RUN_MAX)
        count = US_RUN_MAX;
    while (miss.count < count && first + miss.count < region->pages) {
        us_word *word = us_word_peek(region, first + miss.count);
        uint64_t seen = word ? atomic_load(word) : US_ZERO;
        if (us_state_of(seen) != US_STORED || (seen & US_BUSY))
            break;
        room = us_reserve_ahead(region);
        if (!room)
            break;
        uint64_t filling = us_with_handle(us_with_state(seen, US_FILLING), miss.ticket) | US_BUSY | US_AHEAD;
        if (!us_word_swap(word, &seen, filling)) {
            us_release(region, US_PAGE);
            break;
        }
        miss.count++;
    }
    if (!miss.count)
        return room;
    us_count(&region->count.ahead, miss.count);
    if (us_put_miss(client, &miss))
        us_discard_end(region, miss.first, us_fill_failed(region, &miss, 0));
    return room;
}

/* One page that nobody waits for; false when there is no room. */
static bool read_one(struct us_region *region, uint32_t index, bool write, bool keep, uint64_t now) {
    us_word *word = us_word_peek(region, index);
    uint64_t seen = word ? atomic_load(word) : US_ZERO;
    if (us_state_of(seen) != US_STORED || (seen & US_BUSY))
        return true;
    if (!region->pool)
        return us_await_ahead(region, index, 1, now);
    if (!us_reserve_ahead(region))
        return false;
    us_fill_native(region, index, seen, 0, write, keep);
    return true;
}

void us_read_strided(struct us_region *region, uint32_t index, struct us_ahead ahead, bool write, uint64_t now) {
    for (uint32_t i = 1; i <= ahead.count; i++) {
        int64_t page = (int64_t)index + ahead.stride * (int64_t)i;
        if (page < 0 || page >= (int64_t)region->pages || !read_one(region, (uint32_t)page, write, true, now))
            return;
        if (region->pool)
            us_count(&region->count.ahead, 1);
    }
}

static bool is_stored(const struct us_region *region, uint32_t index) {
    us_word *word = us_word_peek(region, index);
    uint64_t seen = word ? atomic_load(word) : US_ZERO;
    return us_state_of(seen) == US_STORED && !(seen & US_BUSY);
}

/* Pages that a policy named, as many as one install or one read of the store may bring; false when there is no room. */
static bool read_some(struct us_region *region, uint32_t first, uint32_t count, bool write, uint64_t now) {
    if (!region->pool)
        return us_await_ahead(region, first, count, now);
    uint64_t seen = atomic_load(us_word_at(region, first));
    if (us_state_of(seen) != US_STORED || (seen & US_BUSY))
        return true;
    if (!us_reserve_ahead(region))
        return false;
    us_count(&region->count.ahead, 1);
    us_fill_native(region, first, seen, count - 1, write, true);
    return true;
}

/* Runs that a policy named, anywhere: what is not in the region, or not in the store, is left out. */
void us_read_runs(struct us_region *region, const struct us_ahead_run *run, uint32_t runs, bool write, uint64_t now) {
    for (uint32_t i = 0; i < runs; i++) {
        int64_t first = run[i].first > 0 ? run[i].first : 0, end = run[i].first + run[i].count;
        if (end > (int64_t)region->pages)
            end = (int64_t)region->pages;
        while (first < end) {
            uint32_t count = 0;
            while (count < US_RUN_MAX && first + count < end && is_stored(region, (uint32_t)first + count))
                count++;
            if (count && !read_some(region, (uint32_t)first, count, write, now))
                return;
            first += count ? count : 1;
        }
    }
}

/* Bring stored pages of a range in, as the program asks.  Returns how many pages of the range were dealt with: fewer than `count`
 * when there is no room at the moment. */
int64_t us_region_prefetch(struct us_region *region, uint64_t first, uint64_t count) {
    uint64_t now = us_now(), end = first + count < region->pages ? first + count : region->pages;
    if (atomic_load(&region->closing))
        return -ECANCELED;
    uint64_t i = us_extent_from(&region->extent, first);
    while (i < end && read_one(region, (uint32_t)i, false, false, now))
        i = us_extent_next(&region->extent, i);
    return (int64_t)((i < end ? i : end) - first);
}
