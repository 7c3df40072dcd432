/* Release: a region goes back to its program as ordinary memory, every page of it resident.
 *
 * The pager brings the pages in (us_region_restore, again and again, first beside eviction and then, once the region is quiesced,
 * without it), and only when none is left outside does it unregister the memory.
 */
#define _GNU_SOURCE
#include "pager.h"
#include "uffd.h"
#include <errno.h>
#include <unistd.h>

/* One pass over a range, which starts at most `most` fills: how many of its pages were not in memory.  The caller has raised the
 * limit: a page that finds no room is counted, and left. */
int64_t us_region_restore(struct us_region *region, uint64_t first, uint64_t count, uint64_t most) {
    uint64_t now = us_now(), started = 0, end = first + count;
    int64_t left = 0;
    if (end > region->pages)
        return -EINVAL;
    const struct us_extent *extent = &region->extent;
    for (uint64_t i = us_extent_from(extent, first); i < end; i = us_extent_next(extent, i)) {
        uint64_t seen = atomic_load(us_word_at(region, i));
        enum us_state state = us_state_of(seen);
        if (state == US_ZERO || state == US_POISONED || us_state_is_resident(state))
            continue;
        left++;
        if (state != US_STORED || (seen & US_BUSY) || started++ >= most)
            continue;
        if (!region->pool)
            us_await_ahead(region, (uint32_t)i, 1, now);
        else if (us_reserve_ahead(region))
            us_fill_native(region, (uint32_t)i, seen, 0, true, false);
    }
    return left;
}

/* After us_region_quiesce, with nothing left to restore: the kernel answers the region's faults from here on, and
 * us_region_detach and us_region_free may follow.  -errno: it is still ours. */
int us_region_unregister(struct us_region *region) {
    return us_uffd_unregister(region->client->uffd, region->start, region->pages << US_PAGE_SHIFT);
}

/* The client's last region was released: its agent ends, and no longer minds the pager's end. */
void us_client_let_go(struct us_client *client) {
    uint64_t one = 1;
    atomic_store(&client->channel->quit, 1);
    ssize_t ignored = write(client->order_fd, &one, sizeof one);
    (void)ignored;
}
