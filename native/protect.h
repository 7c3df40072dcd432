/* The mover `protect`: write-protect, wait, read, store, drop.  See protect.c for why. */
#ifndef US_PROTECT_H
#define US_PROTECT_H
#include "pager.h"

/* How long a page is protected before it is read: what I/O that began earlier has to end. */
#define US_GRACE_MS 100

void us_protect_watch(struct us_client *client, int thread);
uint32_t us_protect_room(struct us_region *region, uint32_t most, uint32_t sent);
void us_protect(struct us_region *region, const uint32_t *index, uint32_t count);
uint32_t us_protect_send(struct us_client *client, struct us_region *region, uint32_t most);
void us_protect_read(struct us_client *client, struct us_batch *batch, uint64_t readable);
void us_protect_store(struct us_client *client, struct us_batch *batch, uint64_t readable);
void us_protect_stored(struct us_client *client, struct us_batch *batch);
void us_protect_free(struct us_region *region);
#endif
