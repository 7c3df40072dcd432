#define _GNU_SOURCE
#include "ram.h"
#include <errno.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PIN (1ull << 63) /* compaction's swap expects the bare handle: a pinned one stays where it is */

struct us_ram {
    struct us_pool *pool;
    uint64_t pages;
    _Atomic uint64_t *word; /* 0: reads as zeros */
};

static int relocate(void *owner, uint64_t slot, uint64_t from, uint64_t to) {
    struct us_ram *ram = owner;
    return atomic_compare_exchange_strong(&ram->word[slot], &from, to);
}

int us_ram_create(struct us_ram **out, struct us_pool *pool, uint64_t pages) {
    struct us_ram *ram = calloc(1, sizeof *ram);
    if (!ram)
        return -ENOMEM;
    /* not calloc: a store of many pages of which few are used needs addresses, not a promise of memory */
    ram->word = mmap(NULL, pages * sizeof(uint64_t), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (ram->word == MAP_FAILED) {
        free(ram);
        return -ENOMEM;
    }
    ram->pool = pool;
    ram->pages = pages;
    us_pool_set_owner(pool, relocate, ram);
    *out = ram;
    return 0;
}

void us_ram_destroy(struct us_ram *ram) {
    if (!ram)
        return;
    us_pool_set_owner(ram->pool, NULL, NULL);
    munmap((void *)ram->word, ram->pages * sizeof(uint64_t));
    free(ram);
}

/* The handle of a page, which cannot move until the word is written again. */
static uint64_t pin(_Atomic uint64_t *word) {
    uint64_t seen;
    while ((seen = atomic_fetch_or(word, PIN)) & PIN)
        sched_yield(); /* another thread reads the same page */
    return seen;
}

uint64_t us_ram_read(struct us_ram *ram, uint64_t index, uint64_t count, void *out, int *error) {
    *error = 0;
    for (uint64_t i = 0; i < count; i++) {
        _Atomic uint64_t *word = &ram->word[index + i];
        uint8_t *page = (uint8_t *)out + i * US_CODEC_PAGE;
        if (!atomic_load(word)) {
            memset(page, 0, US_CODEC_PAGE);
            continue;
        }
        uint64_t handle = pin(word);
        *error = us_pool_get(ram->pool, handle, page);
        atomic_store(word, handle);
        if (*error)
            return i;
    }
    return count;
}

uint64_t us_ram_write(struct us_ram *ram, uint64_t index, uint64_t count, const void *data, int *error) {
    *error = 0;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t handle;
        *error = us_pool_put(ram->pool, (const uint8_t *)data + i * US_CODEC_PAGE, index + i, &handle);
        if (*error)
            return i;
        us_pool_free(ram->pool, atomic_exchange(&ram->word[index + i], handle));
    }
    return count;
}

void us_ram_discard(struct us_ram *ram, uint64_t index, uint64_t count) {
    for (uint64_t i = 0; i < count; i++)
        if (atomic_load(&ram->word[index + i]))
            us_pool_free(ram->pool, atomic_exchange(&ram->word[index + i], 0));
}
