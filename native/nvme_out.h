/* What one end of an NVMe/TCP connection has to send, in order: PDUs put together with padding and digests.
 *
 * Headers are made here (the "stage"); data stays where it is, is pointed at, and has to live until it was sent or kept.
 * Nothing here knows commands; a segment of data carries the CID that it belongs to, for whoever does.
 */
#ifndef US_NVME_OUT_H
#define US_NVME_OUT_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define US_NVME_NOBODY (-1)

struct us_nvme_segment {
    const uint8_t *data; /* NULL: it is in the stage */
    uint64_t offset;     /* there, or within the data of the command */
    uint32_t length;
    int32_t cid;  /* of the command whose data it is, else US_NVME_NOBODY */
    uint8_t last; /* of what an R2T asked for */
    uint8_t kept; /* data is a copy, freed when it was sent */
};

struct us_nvme_out {
    uint8_t *stage;
    struct us_nvme_segment *segments;
    size_t staged, stage_size;
    uint32_t first, end, segments_size;
    uint32_t sent; /* bytes of the first segment */
};

struct us_nvme_framing {
    bool header_digest, data_digest;
    uint32_t alignment; /* of data, from the start of the PDU; US_PDU_ALIGNMENT_MAX at most */
};

/* Data of a PDU to be framed: `length` bytes at `offset` of what a command has. */
struct us_nvme_part {
    const uint8_t *data;
    uint64_t offset;
    uint32_t length;
    int32_t cid;
    bool last;
};

void us_nvme_out_free(struct us_nvme_out *out);

/* Adds a PDU of a header whose fields after the first eight bytes are `body`; `part` NULL: it has no data.
 * 0, or -ENOMEM, and then nothing was added. */
int us_nvme_out_frame(struct us_nvme_out *out, const struct us_nvme_framing *framing, uint8_t type, uint8_t flags,
                      const void *body, uint32_t body_length, const struct us_nvme_part *part);

/* Sends from copies what is unsent of a command's data; `forget`: and counts it as nobody's.  0, or -ENOMEM half-way. */
int us_nvme_out_keep(struct us_nvme_out *out, int32_t cid, bool forget);

/* One sendmsg of what comes next: *went bytes went, to be counted by us_nvme_out_advance.  1 when the socket took less than it
 * was given, 0, or -errno. */
int us_nvme_out_write(const struct us_nvme_out *out, int fd, int flags, size_t *went);

/* Counts bytes as sent; the next segment of a command that is done with is taken out into *segment.  False: there is none. */
bool us_nvme_out_advance(struct us_nvme_out *out, size_t *bytes, struct us_nvme_segment *segment);

static inline const uint8_t *us_nvme_out_bytes(const struct us_nvme_out *out, const struct us_nvme_segment *segment) {
    return segment->data ? segment->data : out->stage + segment->offset;
}
#endif
