#include "readahead.h"
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* --- streams: multi-stream readahead without hit information (stream buffers, Jouppi 1990; Palacharla and Kessler 1994).  A demand
 * fault at the edge of a window proves that the window was used, so hits need not be seen. */

#define STREAMS 16u
#define RECENT 64u /* a power of two */
#define WINDOW_FIRST 4u
#define WINDOW_MAX 31u  /* with the faulting page one install of 128 KiB */
#define DISTANCE_MAX 64 /* strides longer than this are taken for random access */

struct stream {
    int64_t last, stride; /* last: its latest demand fault */
    uint32_t window, used; /* used: for LRU */
};

struct streams {
    struct stream stream[STREAMS];
    int64_t recent[RECENT]; /* faults of no stream */
    uint32_t low[RECENT];   /* their low halves, apart: four to a vector */
    uint32_t recent_count, clock;
};

static void streams_init(void *state) {
    struct streams *streams = state;
    for (unsigned i = 0; i < RECENT; i++)
        streams->recent[i] = INT64_MIN / 2;
}

static bool is_recent(const struct streams *streams, int64_t page) {
    for (unsigned i = 0; i < RECENT; i++)
        if (streams->recent[i] == page)
            return true;
    return false;
}

static struct us_ahead advance(struct streams *streams, struct stream *stream, int64_t page) {
    stream->used = ++streams->clock;
    stream->last = page;
    return (struct us_ahead){stream->stride, stream->window};
}

/* How many steps a fault is past a stream's latest one: up to one more than the window's edge, since one page there may have been
 * resident; 0: it is not the stream's.  Inside the window means that the engine had to cut it short. */
static int64_t steps_past(const struct stream *stream, int64_t page) {
    int64_t distance = page - stream->last, reach = stream->stride * ((int64_t)stream->window + 2);
    /* most faults are far away, and a division costs as much as the rest of this */
    if (!stream->window || (reach > 0 ? distance <= 0 || distance > reach : distance >= 0 || distance < reach))
        return 0;
    return distance % stream->stride ? 0 : distance / stream->stride;
}

/* Whether any of them may lie near: for a random fault, which is most often alone, this is all the work. */
static bool may_be_near(const struct streams *streams, int64_t page) {
    uint32_t from = (uint32_t)page - DISTANCE_MAX, near = 0;
    for (unsigned i = 0; i < RECENT; i++)
        near |= streams->low[i] - from <= 2 * DISTANCE_MAX;
    return near;
}

/* Three faults at one distance begin a stream. */
static int64_t find_stride(const struct streams *streams, int64_t page) {
    if (!may_be_near(streams, page))
        return 0;
    for (unsigned i = 1; i <= RECENT; i++) {
        int64_t other = streams->recent[(streams->recent_count - i) % RECENT];
        int64_t distance = page - other;
        if (distance != 0 && distance <= DISTANCE_MAX && distance >= -DISTANCE_MAX && is_recent(streams, other - distance))
            return distance;
    }
    return 0;
}

static struct us_ahead streams_fault(void *state, int64_t page) {
    struct streams *streams = state;
    struct stream *oldest = &streams->stream[0];
    for (unsigned i = 0; i < STREAMS; i++) {
        struct stream *stream = &streams->stream[i];
        if (stream->used < oldest->used)
            oldest = stream;
        int64_t steps = steps_past(stream, page);
        if (!steps)
            continue;
        if (steps > (int64_t)stream->window)
            stream->window = stream->window * 2 < WINDOW_MAX ? stream->window * 2 : WINDOW_MAX;
        return advance(streams, stream, page);
    }
    int64_t stride = find_stride(streams, page);
    if (!stride) {
        unsigned at = streams->recent_count++ % RECENT;
        streams->recent[at] = page;
        streams->low[at] = (uint32_t)page;
        return (struct us_ahead){0, 0};
    }
    *oldest = (struct stream){.stride = stride, .window = WINDOW_FIRST};
    return advance(streams, oldest, page);
}

/* --- none */

static void none_init(void *state) { (void)state; }

static struct us_ahead none_fault(void *state, int64_t page) {
    (void)state;
    (void)page;
    return (struct us_ahead){0, 0};
}

static const struct us_prefetch policies[] = {
    {"streams", sizeof(struct streams), streams_init, streams_fault},
    {"none", 1, none_init, none_fault},
};
#define POLICIES (sizeof policies / sizeof *policies)

const struct us_prefetch *us_prefetch_find(const char *name) {
    for (unsigned i = 0; i < POLICIES; i++)
        if (strcmp(policies[i].name, name) == 0)
            return &policies[i];
    return NULL;
}

const char *us_prefetch_name(uint32_t n) { return n < POLICIES ? policies[n].name : NULL; }

void *us_prefetch_new(const struct us_prefetch *policy) {
    void *state = calloc(1, policy->state_bytes);
    if (state)
        policy->init(state);
    return state;
}

struct us_ahead us_prefetch_fault(const struct us_prefetch *policy, void *state, int64_t page) {
    return policy->fault(state, page);
}

void us_prefetch_free(void *state) { free(state); }
