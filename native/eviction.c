/* The eviction policies by name, and the plain ones: fifo, clock, random. */
#include "eviction.h"
#include <stdlib.h>
#include <string.h>

#define RING_FIRST 1024u

bool us_ring_push(struct us_ring *ring, uint32_t page) {
    if (ring->in - ring->out == ring->size) {
        uint64_t size = ring->size ? ring->size * 2 : RING_FIRST;
        uint32_t *entry = malloc(size * sizeof *entry);
        if (!entry)
            return false;
        for (uint64_t i = ring->out; i != ring->in; i++)
            entry[i & (size - 1)] = ring->entry[i & (ring->size - 1)];
        free(ring->entry);
        ring->entry = entry;
        ring->size = size;
    }
    ring->entry[ring->in++ & (ring->size - 1)] = page;
    return true;
}

uint32_t us_ring_pop(struct us_ring *ring) {
    uint32_t page = ring->entry[ring->out++ & (ring->size - 1)];
    if (ring->staged < ring->out)
        ring->staged = ring->out;
    return page;
}

void us_ring_free(struct us_ring *ring) { free(ring->entry); }

bool us_ring_stage(struct us_ring *ring, uint32_t share, const uint8_t *touches, uint32_t *page) {
    uint64_t want = us_ring_count(ring) * share / 256;
    while (ring->staged - ring->out < want) {
        *page = ring->entry[ring->staged++ & (ring->size - 1)];
        if (!touches || !touches[*page])
            return true;
    }
    return false;
}

/* --- fifo and clock: one queue.  With fifo the tail brings nothing back; with clock a page that was touched there goes round again,
 * which with a tail is segmented FIFO (Turner and Levy, 1981), and with all touches seen the classic one. */

struct line {
    struct us_ring ring;
    uint8_t *touched; /* NULL: fifo */
    uint32_t tail;
};

static void line_close(void *state) {
    struct line *line = state;
    us_ring_free(&line->ring);
    free(line->touched);
    free(line);
}

static void *fifo_open(const struct us_eviction_setting *setting) {
    (void)setting;
    return calloc(1, sizeof(struct line));
}

static void *clock_open(const struct us_eviction_setting *setting) {
    struct line *line = calloc(1, sizeof *line);
    if (!line)
        return NULL;
    line->tail = setting->tail;
    line->touched = calloc(setting->pages, 1);
    if (line->touched)
        return line;
    line_close(line);
    return NULL;
}

static void line_resize(void *state, uint32_t capacity, uint32_t tail) {
    struct line *line = state;
    (void)capacity;
    line->tail = line->touched ? tail : 0;
}

static bool line_insert(void *state, uint32_t page, bool ahead) {
    struct line *line = state;
    (void)ahead;
    if (line->touched)
        line->touched[page] = 0;
    return us_ring_push(&line->ring, page);
}

static void line_touch(void *state, uint32_t page) {
    struct line *line = state;
    if (line->touched)
        line->touched[page] = 1;
}

static bool line_stage(void *state, uint32_t *page) {
    struct line *line = state;
    return us_ring_stage(&line->ring, line->tail, line->touched, page);
}

static bool line_victim(void *state, uint32_t *page) {
    struct line *line = state;
    if (!us_ring_count(&line->ring))
        return false;
    for (;;) {
        *page = us_ring_pop(&line->ring);
        if (!line->touched || !line->touched[*page])
            return true;
        line->touched[*page] = 0;
        us_ring_push(&line->ring, *page); /* into the place that it left */
    }
}

static const struct us_eviction us_eviction_fifo = {
    "fifo", fifo_open, line_close, line_resize, line_insert, line_touch, line_stage, line_victim};
static const struct us_eviction us_eviction_clock = {
    "clock", clock_open, line_close, line_resize, line_insert, line_touch, line_stage, line_victim};

/* --- random: a bag */

struct bag {
    uint32_t *page;
    uint64_t count, room, draw;
};

static void *random_open(const struct us_eviction_setting *setting) {
    struct bag *bag = calloc(1, sizeof *bag);
    if (bag)
        bag->draw = setting->seed;
    return bag;
}

static void random_close(void *state) {
    struct bag *bag = state;
    free(bag->page);
    free(bag);
}

static void random_resize(void *state, uint32_t capacity, uint32_t tail) {
    (void)state;
    (void)capacity;
    (void)tail;
}

static bool random_insert(void *state, uint32_t page, bool ahead) {
    struct bag *bag = state;
    (void)ahead;
    if (bag->count == bag->room) {
        uint64_t room = bag->room ? bag->room * 2 : RING_FIRST;
        uint32_t *grown = realloc(bag->page, room * sizeof *grown);
        if (!grown)
            return false;
        bag->page = grown;
        bag->room = room;
    }
    bag->page[bag->count++] = page;
    return true;
}

static void random_touch(void *state, uint32_t page) {
    (void)state;
    (void)page;
}

static bool random_stage(void *state, uint32_t *page) {
    (void)state;
    (void)page;
    return false;
}

static bool random_victim(void *state, uint32_t *page) {
    struct bag *bag = state;
    if (!bag->count)
        return false;
    uint64_t at = us_random(&bag->draw) % bag->count;
    *page = bag->page[at];
    bag->page[at] = bag->page[--bag->count];
    return true;
}

static const struct us_eviction us_eviction_random = {
    "random", random_open, random_close, random_resize, random_insert, random_touch, random_stage, random_victim};

/* --- by name */

static const struct us_eviction *const policies[] = {
    &us_eviction_s3g, &us_eviction_auto, &us_eviction_bip, &us_eviction_fifo, &us_eviction_clock, &us_eviction_random,
};
#define POLICIES (sizeof policies / sizeof *policies)

const struct us_eviction *us_eviction_find(const char *name) {
    for (unsigned i = 0; i < POLICIES; i++)
        if (strcmp(policies[i]->name, name) == 0)
            return policies[i];
    return NULL;
}

const char *us_eviction_name(uint32_t n) { return n < POLICIES ? policies[n]->name : NULL; }

void *us_eviction_open(const struct us_eviction *policy, const struct us_eviction_setting *setting) { return policy->open(setting); }
void us_eviction_close(const struct us_eviction *policy, void *state) { policy->close(state); }
void us_eviction_resize(const struct us_eviction *policy, void *state, uint32_t capacity, uint32_t tail) {
    policy->resize(state, capacity, tail);
}
bool us_eviction_insert(const struct us_eviction *policy, void *state, uint32_t page, bool ahead) {
    return policy->insert(state, page, ahead);
}
void us_eviction_touch(const struct us_eviction *policy, void *state, uint32_t page) { policy->touch(state, page); }
bool us_eviction_stage(const struct us_eviction *policy, void *state, uint32_t *page) { return policy->stage(state, page); }
bool us_eviction_victim(const struct us_eviction *policy, void *state, uint32_t *page) { return policy->victim(state, page); }
