/* An array of pages kept in a pool: what the awaited side of compressed RAM stands on.
 *
 * One word a page: its handle, and a bit that pins it while it is read.  It is the pool's owner, so that objects move.
 * Callers do not overlap two operations on one page of which one writes; compaction may run at any time.
 */
#ifndef US_RAM_H
#define US_RAM_H
#include "pool.h"

struct us_ram;

/* The array becomes the owner of the pool, which has to outlive it: 0, -ENOMEM. */
int us_ram_create(struct us_ram **out, struct us_pool *pool, uint64_t pages);
void us_ram_destroy(struct us_ram *ram);

/* Pages [index, index + count): how many were read, or written, before the first that failed, whose error is in `error`
 * (0 when none did). */
uint64_t us_ram_read(struct us_ram *ram, uint64_t index, uint64_t count, void *out, int *error);
uint64_t us_ram_write(struct us_ram *ram, uint64_t index, uint64_t count, const void *data, int *error);
void us_ram_discard(struct us_ram *ram, uint64_t index, uint64_t count);
#endif
