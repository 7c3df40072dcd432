/* streams: multi-stream readahead without hit information (stream buffers, Jouppi 1990; Palacharla and Kessler 1994).  A demand
 * fault at the edge of a window proves that the window was used, so hits need not be seen.
 *
 * Faults of a small region taken at random lie at equal distances now and then.  Where most streams end at once, new ones are on
 * probation (us_trust): they read nothing until their next fault has come.
 */
#include "readahead.h"

#define STREAMS 16u
#define RECENT 64u /* a power of two */
#define WINDOW_FIRST 4u
#define WINDOW_MAX 31u  /* with the faulting page one install of 128 KiB */
#define DISTANCE_MAX 64 /* strides longer than this are taken for random access */
#define PROOF_SOON 32u  /* faults within which a new stream must go on: later, it is chance */
#define PROOFS 2u       /* that end probation */

struct stream {
    int64_t last, stride; /* last: its latest demand fault; stride 0: no stream */
    uint32_t window, used; /* used: when that fault was */
    uint32_t proofs;       /* faults that came where it said */
};

struct streams {
    struct stream stream[STREAMS];
    int64_t recent[RECENT]; /* faults of no stream */
    uint32_t low[RECENT];   /* their low halves, apart: four to a vector */
    uint32_t recent_count, faults;
    struct us_trust trust;
};

static void streams_init(void *state) {
    struct streams *streams = state;
    for (unsigned i = 0; i < RECENT; i++)
        streams->recent[i] = INT64_MIN / 2;
    streams->trust.score = US_TRUST_START;
}

static bool is_recent(const struct streams *streams, int64_t page) {
    for (unsigned i = 0; i < RECENT; i++)
        if (streams->recent[i] == page)
            return true;
    return false;
}

/* How many steps a fault is past a stream's latest one: up to one more than the window's edge, since one page there may have been
 * resident; 0: it is not the stream's. */
static int64_t steps_past(const struct stream *stream, int64_t page) {
    int64_t distance = page - stream->last, reach = stream->stride * ((int64_t)stream->window + 2);
    /* most faults are far away, and a division costs as much as the rest of this */
    if (!stream->stride || (reach > 0 ? distance <= 0 || distance > reach : distance >= 0 || distance < reach))
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

/* The stream goes on at a fault so many steps past its latest.  At the edge of the window, the window was used, and the next one is
 * twice as long; inside, what was read there is not there (any more, or yet, or there was no room), and it is half as long. */
static void go_on(struct streams *streams, struct stream *stream, int64_t steps) {
    bool edge = steps > (int64_t)stream->window;
    if (!edge) {
        stream->window /= steps > 1 ? 2 : 1;
        stream->proofs = stream->window ? stream->proofs : 0;
    } else if (stream->proofs && stream->window) {
        stream->window = stream->window * 2 < WINDOW_MAX ? stream->window * 2 : WINDOW_MAX;
    } else if (streams->faults - stream->used <= PROOF_SOON) {
        if (!stream->proofs++)
            us_trust_kept(&streams->trust);
        if (stream->window)
            stream->window *= 2;
        else if (stream->proofs >= PROOFS || !us_trust_is_low(&streams->trust))
            stream->window = WINDOW_FIRST;
    }
}

static struct us_ahead streams_fault(void *state, int64_t page) {
    struct streams *streams = state;
    struct stream *stream = &streams->stream[0];
    int64_t steps = 0;
    streams->faults++;
    for (unsigned i = 0; i < STREAMS && !steps; i++) {
        struct stream *other = &streams->stream[i];
        steps = steps_past(other, page);
        if (steps || other->used < stream->used)
            stream = other;
    }
    if (steps) {
        go_on(streams, stream, steps);
    } else {
        int64_t stride = find_stride(streams, page);
        if (!stride) {
            unsigned at = streams->recent_count++ % RECENT;
            streams->recent[at] = page;
            streams->low[at] = (uint32_t)page;
            return (struct us_ahead){0, 0, 0};
        }
        us_trust_begun(&streams->trust);
        *stream = (struct stream){.stride = stride, .window = us_trust_is_low(&streams->trust) ? 0 : WINDOW_FIRST};
    }
    stream->last = page;
    stream->used = streams->faults;
    return (struct us_ahead){stream->window ? stream->stride : 0, stream->window, 0};
}

const struct us_prefetch us_prefetch_streams = {
    .name = "streams", .state_bytes = sizeof(struct streams), .init = streams_init, .fault = streams_fault};
