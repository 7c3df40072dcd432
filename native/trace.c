#include "trace.h"
#include "crc32c.h"
#include <errno.h>
#include <stdbool.h>
#include <string.h>

#define MAGIC 0x4b4c4255u /* "UBLK" */

/* A record: one byte, then as far as the byte does not say it all, numbers of 7 bits a byte: the distance of the page from the
 * previous record's, the time since then, the thread. */
enum { KIND_BITS = 3, OUTCOME_BITS = 3, NEXT_PAGE = 1 << 6, SAME_THREAD = 1 << 7 };
_Static_assert(US_TRACE_KINDS <= 1 << KIND_BITS && US_TRACE_OUTCOMES <= 1 << OUTCOME_BITS, "they share a byte with two flags");

struct header {
    uint32_t magic, records, bytes; /* bytes: after the header */
    uint32_t crc;                   /* of the rest of the header and of what follows */
    uint64_t time_ns;               /* that the first record's counts from */
};
_Static_assert(sizeof(struct header) == US_TRACE_BLOCK_HEADER, "on disk");

static uint32_t checksum(struct header header, const uint8_t *payload) {
    header.crc = 0;
    return us_crc32c(us_crc32c(0, &header, sizeof header), payload, header.bytes);
}

static uint8_t *put(uint8_t *to, uint64_t number) {
    for (; number >= 128; number >>= 7)
        *to++ = (uint8_t)(number | 128);
    *to++ = (uint8_t)number;
    return to;
}

static const uint8_t *get(const uint8_t *from, const uint8_t *end, uint64_t *number) {
    *number = 0;
    for (unsigned shift = 0; from && from < end && shift < 64; shift += 7) {
        *number |= (uint64_t)(*from & 127) << shift;
        if (*from++ < 128)
            return from;
    }
    return NULL;
}

uint64_t us_trace_pack(const struct us_trace_columns *from, uint64_t first, uint32_t count, uint8_t *block) {
    uint8_t *to = block + sizeof(struct header);
    struct header header = {.magic = MAGIC, .records = count, .time_ns = count ? from->time_ns[first] : 0};
    uint64_t time = header.time_ns;
    uint32_t page = 0, thread = 0;
    for (uint64_t i = first; i < first + count; i++) {
        bool next = from->page[i] == page + 1, same = from->thread[i] == thread;
        int64_t distance = (int64_t)from->page[i] - page;
        *to++ = (uint8_t)(from->kind[i] | from->outcome[i] << KIND_BITS | (next ? NEXT_PAGE : 0) | (same ? SAME_THREAD : 0));
        if (!next)
            to = put(to, (uint64_t)distance << 1 ^ (uint64_t)(distance >> 63));
        to = put(to, from->time_ns[i] > time ? from->time_ns[i] - time : 0);
        if (!same)
            to = put(to, from->thread[i]);
        page = from->page[i];
        thread = from->thread[i];
        time = from->time_ns[i] > time ? from->time_ns[i] : time;
    }
    header.bytes = (uint32_t)(to - block - (long)sizeof header);
    header.crc = checksum(header, block + sizeof header);
    memcpy(block, &header, sizeof header);
    return (uint64_t)(to - block);
}

int64_t us_trace_look(const uint8_t *data, uint64_t bytes, uint64_t *length) {
    struct header header;
    if (bytes < sizeof header)
        return -ENODATA;
    memcpy(&header, data, sizeof header);
    if (header.magic != MAGIC || header.bytes > bytes - sizeof header || header.records > header.bytes)
        return -ENODATA;
    if (checksum(header, data + sizeof header) != header.crc)
        return -ENODATA;
    *length = sizeof header + header.bytes;
    return header.records;
}

int us_trace_unpack(const uint8_t *block, const struct us_trace_columns *to, uint64_t first) {
    struct header header;
    memcpy(&header, block, sizeof header);
    const uint8_t *from = block + sizeof header, *end = from + header.bytes;
    uint64_t time = header.time_ns, number;
    uint32_t page = 0, thread = 0;
    for (uint64_t i = first; i < first + header.records; i++) {
        if (from == end)
            return -EBADMSG;
        uint8_t byte = *from++;
        to->kind[i] = byte & ((1 << KIND_BITS) - 1);
        to->outcome[i] = byte >> KIND_BITS & ((1 << OUTCOME_BITS) - 1);
        if (to->kind[i] >= US_TRACE_KINDS || to->outcome[i] >= US_TRACE_OUTCOMES)
            return -EBADMSG;
        number = 2;
        if (!(byte & NEXT_PAGE))
            from = get(from, end, &number);
        page += (uint32_t)(number >> 1 ^ -(number & 1));
        from = get(from, end, &number);
        time += number;
        if (!(byte & SAME_THREAD)) {
            from = get(from, end, &number);
            thread = (uint32_t)number;
        }
        if (!from)
            return -EBADMSG;
        to->page[i] = page;
        to->time_ns[i] = time;
        to->thread[i] = thread;
    }
    return from == end ? 0 : -EBADMSG;
}
