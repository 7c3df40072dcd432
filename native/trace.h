/* Blocks of a fault trace: records packed into bytes and back; engine/traces.py has the files that they make up.
 *
 * A block is decoded by itself and carries a checksum, so that a file that ends in the middle of one is good up to there.
 */
#ifndef US_TRACE_H
#define US_TRACE_H
#include <stdint.h>

enum us_trace_kind {
    US_TRACE_READ,
    US_TRACE_WRITE,
    US_TRACE_PROTECT,  /* a write to a page that was there, write-protected */
    US_TRACE_PHASE,    /* no touch: the phase `page` begins */
    US_TRACE_RESIDENT, /* no touch: from here on as many pages may be resident as `page` says */
    US_TRACE_KINDS
};

/* how a touch was answered */
enum us_trace_outcome {
    US_TRACE_UNKNOWN,
    US_TRACE_ZERO,    /* zeros: the page had no content */
    US_TRACE_LOAD,    /* from compressed memory */
    US_TRACE_AWAITED, /* from the store */
    US_TRACE_RESCUE,  /* from the tail: it was on its way out */
    US_TRACE_THERE,
    US_TRACE_OUTCOMES
};

/* Columns, each of `count` records. */
struct us_trace_columns {
    uint32_t *page, *thread;
    uint64_t *time_ns;
    uint8_t *kind, *outcome;
};

#define US_TRACE_BLOCK_HEADER 24u
#define US_TRACE_RECORD_MAX 21u /* bytes that a record takes at the most */

/* Write records [first, first + count) as one block; its length.  `room` must do for a header and US_TRACE_RECORD_MAX a record.
 * Times that go back are taken for the latest. */
uint64_t us_trace_pack(const struct us_trace_columns *from, uint64_t first, uint32_t count, uint8_t *block);

/* How many records the block has, which begins at `data`; its length in `*length`.  -ENODATA: there is no whole block here. */
int64_t us_trace_look(const uint8_t *data, uint64_t bytes, uint64_t *length);

/* Unpack a block that us_trace_look has found good to records [first, ...).  -EBADMSG: it was packed wrongly. */
int us_trace_unpack(const uint8_t *block, const struct us_trace_columns *to, uint64_t first);
#endif
