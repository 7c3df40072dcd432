/* Belady's optimum: send out the page whose next touch is farthest away. */
#include "simulate.h"
#include <errno.h>
#include <stdlib.h>

/* Resident pages by their next touch, the farthest on top; each knows its place, so that a touch moves it. */
struct heap {
    uint32_t *page, *place; /* place: 0: not resident, else its index + 1 */
    uint64_t *when;         /* by page */
    uint32_t count;
};

static void put(struct heap *heap, uint32_t at, uint32_t page) {
    heap->page[at] = page;
    heap->place[page] = at + 1;
}

static void rise(struct heap *heap, uint32_t at) {
    uint32_t page = heap->page[at];
    while (at) {
        uint32_t above = (at - 1) / 2;
        if (heap->when[heap->page[above]] >= heap->when[page])
            break;
        put(heap, at, heap->page[above]);
        at = above;
    }
    put(heap, at, page);
}

static void remove_top(struct heap *heap) {
    heap->place[heap->page[0]] = 0;
    uint32_t page = heap->page[--heap->count], at = 0, below;
    while ((below = 2 * at + 1) < heap->count) {
        if (below + 1 < heap->count && heap->when[heap->page[below + 1]] > heap->when[heap->page[below]])
            below++;
        if (heap->when[heap->page[below]] <= heap->when[page])
            break;
        put(heap, at, heap->page[below]);
        at = below;
    }
    if (heap->count)
        put(heap, at, page);
}

int64_t us_simulate_next(const uint32_t *touch, uint64_t touches, uint64_t pages, uint64_t *next) {
    uint64_t *latest = calloc(pages, sizeof *latest); /* its number + 1 */
    int64_t different = 0;
    if (!latest)
        return -ENOMEM;
    for (uint64_t i = touches; i-- > 0;) {
        uint64_t *known = &latest[touch[i]];
        different += !*known;
        if (next)
            next[i] = *known ? *known - 1 : touches;
        *known = i + 1;
    }
    free(latest);
    return different;
}

static uint64_t play(struct heap *heap, const uint32_t *touch, uint64_t touches, const uint64_t *next, uint32_t capacity) {
    uint64_t misses = 0;
    for (uint64_t i = 0; i < touches; i++) {
        uint32_t page = touch[i];
        heap->when[page] = next[i];
        if (heap->place[page]) {
            rise(heap, heap->place[page] - 1);
            continue;
        }
        misses++;
        if (heap->count == capacity)
            remove_top(heap);
        put(heap, heap->count, page);
        rise(heap, heap->count++);
    }
    return misses;
}

int us_simulate_best(const uint32_t *touch, uint64_t touches, uint64_t pages, uint32_t capacity, uint64_t *misses) {
    struct heap heap = {
        .page = malloc(((size_t)capacity + 1) * sizeof *heap.page),
        .place = calloc(pages, sizeof *heap.place),
        .when = calloc(pages, sizeof *heap.when),
    };
    uint64_t *next = malloc((touches + 1) * sizeof *next);
    int rc = -ENOMEM;
    if (heap.page && heap.place && heap.when && next && us_simulate_next(touch, touches, pages, next) >= 0) {
        *misses = play(&heap, touch, touches, next, capacity);
        rc = 0;
    }
    free(heap.page);
    free(heap.place);
    free(heap.when);
    free(next);
    return rc;
}
