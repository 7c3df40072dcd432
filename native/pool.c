#include "pool.h"
#include "pack.h"
#include "shuffle.h"
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define SLOT_MASK ((1ull << 47) - 1)
#define MOVES_FOR_ROOM 64u
#define WASTE_MIN (512u << 10) /* classes by the hundred hold a page or two that are not full */

_Static_assert(US_CODEC_PAGE == US_PAGE_BYTES, "one page size");

struct us_pool {
    struct us_slots slots;
    us_relocate_fn *relocate;
    void *owner;
    int codec, level, shuffle;
    uint64_t limit_bytes;
    uint64_t objects, whole_pages, payload_bytes, object_bytes, compactions; /* under slots.lock */
    _Atomic uint64_t same_filled;
};

int us_pool_create(struct us_pool **out, int codec, int level, int shuffle, uint64_t limit_bytes) {
    bool is_width = shuffle == US_SHUFFLE_AUTO || shuffle == US_SHUFFLE_OFF || shuffle == 4 || shuffle == 8;
    if (codec < 0 || codec >= US_CODECS || !is_width)
        return -EINVAL;
    if (!us_codec_is_open(codec))
        return -ENOPKG;
    struct us_pool *pool = calloc(1, sizeof *pool);
    if (!pool)
        return -ENOMEM;
    int rc = us_slots_open(&pool->slots, limit_bytes);
    if (rc) {
        free(pool);
        return rc;
    }
    pool->codec = codec;
    pool->level = level;
    pool->shuffle = shuffle;
    pool->limit_bytes = limit_bytes;
    *out = pool;
    return 0;
}

void us_pool_destroy(struct us_pool *pool) {
    if (!pool)
        return;
    us_slots_close(&pool->slots);
    free(pool);
}

void us_pool_set_owner(struct us_pool *pool, us_relocate_fn *relocate, void *owner) {
    pthread_mutex_lock(&pool->slots.lock);
    pool->relocate = relocate;
    pool->owner = owner;
    pthread_mutex_unlock(&pool->slots.lock);
}

int us_pool_fd(const struct us_pool *pool) { return pool->slots.blocks.fd; }

/* One memcmp against itself, a word on: it ends at the first difference, and the C library has it in vectors. */
static bool is_same_filled(const void *page, uint32_t *pattern) {
    memcpy(pattern, page, sizeof *pattern);
    return !memcmp(page, (const uint8_t *)page + sizeof *pattern, US_PAGE_BYTES - sizeof *pattern);
}

static void fill(void *page, uint32_t pattern) {
    uint64_t *words = page, both = (uint64_t)pattern << 32 | pattern;
    for (uint32_t i = 0; i < US_PAGE_BYTES / sizeof both; i++)
        words[i] = both;
}

static int take_slot(struct us_pool *pool, uint32_t length, uint64_t *handle) {
    const struct us_class *class;
    pthread_mutex_lock(&pool->slots.lock);
    int rc = us_slots_take(&pool->slots, length, handle);
    if (rc == -ENOSPC && us_slots_compact(&pool->slots, MOVES_FOR_ROOM, pool->relocate, pool->owner))
        rc = us_slots_take(&pool->slots, length, handle);
    if (!rc) {
        us_slots_find(&pool->slots, *handle, &class);
        pool->objects++;
        pool->whole_pages += length == US_PAGE_BYTES;
        pool->payload_bytes += length;
        pool->object_bytes += class->size;
    }
    pthread_mutex_unlock(&pool->slots.lock);
    return rc;
}

int us_pool_put(struct us_pool *pool, const void *page, uint64_t slot, uint64_t *handle) {
    uint8_t packed[US_OBJECT_MAX];
    uint32_t pattern;
    if (is_same_filled(page, &pattern)) {
        atomic_fetch_add_explicit(&pool->same_filled, 1, memory_order_relaxed);
        *handle = US_HANDLE_SAME | pattern;
        return 0;
    }
    int width, length = us_pack(pool->codec, pool->level, pool->shuffle, page, packed, sizeof packed, &width);
    if (length < 0)
        return length;
    const void *content = length ? (const void *)packed : page;
    uint64_t codec = length ? (uint64_t)pool->codec : US_CODEC_NONE;
    if (!length) {
        length = US_PAGE_BYTES;
        width = 0;
    }
    uint64_t taken;
    int rc = take_slot(pool, (uint32_t)length, &taken);
    if (rc)
        return rc;
    const struct us_class *class;
    uint64_t *header = us_slots_find(&pool->slots, taken, &class);
    memcpy(us_slots_data(&pool->slots, class, taken), content, (size_t)length);
    uint64_t made = (slot & SLOT_MASK) << US_HEADER_SLOT_SHIFT | (uint64_t)width / 4 << US_HEADER_WIDTH_SHIFT |
                    codec << US_HEADER_CODEC_SHIFT | (uint64_t)length;
    __atomic_store_n(header, made, __ATOMIC_RELEASE);
    *handle = taken;
    return 0;
}

int us_pool_get(struct us_pool *pool, uint64_t handle, void *page) {
    if (handle & US_HANDLE_SAME) {
        fill(page, (uint32_t)handle);
        return 0;
    }
    const struct us_class *class;
    const uint64_t *place = us_slots_find(&pool->slots, handle, &class);
    uint64_t header = place ? __atomic_load_n(place, __ATOMIC_ACQUIRE) : 0;
    uint32_t length = us_header_length(header);
    if (!length || length > US_PAGE_BYTES || (length < US_PAGE_BYTES && length + US_SLOT_HEADER > class->size))
        return -EILSEQ;
    const uint8_t *data = us_slots_data(&pool->slots, class, handle);
    int codec = (int)(header >> US_HEADER_CODEC_SHIFT & 3), width = (int)(header >> US_HEADER_WIDTH_SHIFT & 3) * 4;
    if (length < US_PAGE_BYTES)
        return us_unpack(codec, width, data, length, page);
    if (class->size != US_PAGE_BYTES)
        return -EILSEQ;
    memcpy(page, data, US_PAGE_BYTES);
    return 0;
}

void us_pool_free(struct us_pool *pool, uint64_t handle) {
    if (!handle)
        return;
    if (handle & US_HANDLE_SAME) {
        atomic_fetch_sub_explicit(&pool->same_filled, 1, memory_order_relaxed);
        return;
    }
    const struct us_class *class;
    pthread_mutex_lock(&pool->slots.lock);
    const uint64_t *place = us_slots_find(&pool->slots, handle, &class);
    uint32_t length = place ? us_header_length(__atomic_load_n(place, __ATOMIC_RELAXED)) : 0;
    US_POOL_ASSERT(length); /* freed before, or never an object */
    if (length) {
        pool->objects--;
        pool->whole_pages -= length == US_PAGE_BYTES;
        pool->payload_bytes -= length;
        pool->object_bytes -= class->size;
        us_slots_give(&pool->slots, handle);
    }
    pthread_mutex_unlock(&pool->slots.lock);
}

uint32_t us_pool_cost(struct us_pool *pool, uint64_t handle) {
    const struct us_class *class;
    return handle & US_HANDLE_SAME || !us_slots_find(&pool->slots, handle, &class) ? 0 : class->size;
}

int us_pool_compact(struct us_pool *pool, unsigned max_moves) {
    pthread_mutex_lock(&pool->slots.lock);
    uint32_t moved = us_slots_compact(&pool->slots, max_moves, pool->relocate, pool->owner);
    pool->compactions += moved > 0;
    pthread_mutex_unlock(&pool->slots.lock);
    return (int)moved;
}

int us_pool_wants_compaction(const struct us_pool *pool) {
    uint64_t held = us_pool_held(pool), useful = __atomic_load_n(&pool->object_bytes, __ATOMIC_RELAXED);
    return held > useful + held / 32 + WASTE_MIN;
}

uint64_t us_pool_held(const struct us_pool *pool) {
    return __atomic_load_n(&pool->slots.held_pages, __ATOMIC_RELAXED) * US_PAGE_BYTES;
}

void us_pool_stats(struct us_pool *pool, struct us_pool_stats *stats) {
    pthread_mutex_lock(&pool->slots.lock);
    *stats = (struct us_pool_stats){
        .objects = pool->objects,
        .whole_pages = pool->whole_pages,
        .payload_bytes = pool->payload_bytes,
        .object_bytes = pool->object_bytes,
        .compactions = pool->compactions,
        .moved = pool->slots.moved,
    };
    pthread_mutex_unlock(&pool->slots.lock);
    stats->same_filled = atomic_load_explicit(&pool->same_filled, memory_order_relaxed);
    stats->file_bytes = us_blocks_held(&pool->slots.blocks);
    stats->limit_bytes = pool->limit_bytes;
    stats->codec = (uint32_t)pool->codec;
    stats->locked = pool->slots.blocks.locked;
}
