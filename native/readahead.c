#include "readahead.h"
#include <string.h>

#define DISTANCE_MAX 64 /* strides longer than this are taken for random access */

void us_streams_init(struct us_streams *streams) {
    memset(streams, 0, sizeof *streams);
    for (unsigned i = 0; i < US_RECENT; i++)
        streams->recent[i] = INT64_MIN / 2;
}

static bool is_recent(const struct us_streams *streams, int64_t page) {
    for (unsigned i = 0; i < US_RECENT; i++)
        if (streams->recent[i] == page)
            return true;
    return false;
}

static struct us_ahead advance(struct us_streams *streams, struct us_stream *stream, int64_t page) {
    stream->used = ++streams->clock;
    stream->next = page + stream->stride * (int64_t)(stream->window + 1);
    return (struct us_ahead){stream->stride, stream->window};
}

/* Three faults at one distance begin a stream. */
static int64_t find_stride(const struct us_streams *streams, int64_t page) {
    for (unsigned i = 1; i <= US_RECENT; i++) {
        int64_t other = streams->recent[(streams->recent_count - i) % US_RECENT];
        int64_t distance = page - other;
        if (distance != 0 && distance <= DISTANCE_MAX && distance >= -DISTANCE_MAX && is_recent(streams, other - distance))
            return distance;
    }
    return 0;
}

struct us_ahead us_streams_fault(struct us_streams *streams, int64_t page) {
    struct us_stream *oldest = &streams->stream[0];
    for (unsigned i = 0; i < US_STREAMS; i++) {
        struct us_stream *stream = &streams->stream[i];
        if (stream->used < oldest->used)
            oldest = stream;
        if (!stream->window)
            continue;
        int64_t past = page - stream->next;
        if (past == 0 || past == stream->stride) { /* one page may have been resident */
            stream->window = stream->window * 2 < US_WINDOW_MAX ? stream->window * 2 : US_WINDOW_MAX;
            return advance(streams, stream, page);
        }
    }
    int64_t stride = find_stride(streams, page);
    if (!stride) {
        streams->recent[streams->recent_count++ % US_RECENT] = page;
        return (struct us_ahead){0, 0};
    }
    *oldest = (struct us_stream){.stride = stride, .window = US_WINDOW_FIRST};
    return advance(streams, oldest, page);
}
