#include "nvme_out.h"
#include "crc32c.h"
#include "nvme_pdu.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define SEGMENTS_A_PDU 3u                                  /* header, data, digest */
#define STAGED_A_PDU (US_PDU_ALIGNMENT_MAX + US_PDU_DIGEST) /* header with padding, digest of the data */
#define SEGMENTS_FIRST 64u
#define PIECES 256 /* of one sendmsg */

void us_nvme_out_free(struct us_nvme_out *out) {
    for (uint32_t i = out->first; i < out->end; i++)
        if (out->segments[i].kept)
            free((void *)out->segments[i].data);
    free(out->stage);
    free(out->segments);
    *out = (struct us_nvme_out){0};
}

/* Moves what is unsent to the front of its memory. */
static void pack(struct us_nvme_out *out) {
    size_t base = out->staged;
    for (uint32_t i = out->first; i < out->end && base == out->staged; i++)
        if (!out->segments[i].data)
            base = out->segments[i].offset;
    memmove(out->stage, out->stage + base, out->staged - base);
    out->staged -= base;
    memmove(out->segments, out->segments + out->first, (out->end - out->first) * sizeof *out->segments);
    out->end -= out->first;
    out->first = 0;
    for (uint32_t i = 0; i < out->end; i++)
        if (!out->segments[i].data)
            out->segments[i].offset -= base;
}

/* Room for one more PDU: by moving, and where that yields less than half, by more memory. */
static int reserve(struct us_nvme_out *out) {
    if (out->staged + STAGED_A_PDU <= out->stage_size && out->end + SEGMENTS_A_PDU <= out->segments_size)
        return 0;
    if (out->stage)
        pack(out);
    if (2 * (out->staged + STAGED_A_PDU) > out->stage_size) {
        size_t size = out->stage_size ? 2 * out->stage_size : SEGMENTS_FIRST * STAGED_A_PDU;
        uint8_t *stage = realloc(out->stage, size);
        if (!stage)
            return -ENOMEM;
        out->stage = stage;
        out->stage_size = size;
    }
    if (2 * (out->end + SEGMENTS_A_PDU) > out->segments_size) {
        uint32_t size = out->segments_size ? 2 * out->segments_size : SEGMENTS_FIRST;
        struct us_nvme_segment *segments = reallocarray(out->segments, size, sizeof *segments);
        if (!segments)
            return -ENOMEM;
        out->segments = segments;
        out->segments_size = size;
    }
    return 0;
}

/* The next bytes of the stage, to be sent after all that there is. */
static uint8_t *stage(struct us_nvme_out *out, uint32_t length) {
    uint8_t *at = out->stage + out->staged;
    struct us_nvme_segment *before = out->end > out->first ? &out->segments[out->end - 1] : NULL;
    if (before && !before->data && before->offset + before->length == out->staged)
        before->length += length;
    else
        out->segments[out->end++] =
            (struct us_nvme_segment){.offset = out->staged, .length = length, .cid = US_NVME_NOBODY};
    out->staged += length;
    return at;
}

int us_nvme_out_frame(struct us_nvme_out *out, const struct us_nvme_framing *framing, uint8_t type, uint8_t flags,
                      const void *body, uint32_t body_length, const struct us_nvme_part *part) {
    int rc = reserve(out);
    if (rc)
        return rc;
    struct us_pdu_common common = {.type = type, .flags = flags};
    uint32_t header = (uint32_t)sizeof common + body_length;
    uint32_t size = header + (framing->header_digest ? US_PDU_DIGEST : 0);
    common.hlen = (uint8_t)header;
    common.plen = size;
    if (framing->header_digest)
        common.flags |= US_PDU_HDGST;
    uint32_t padded = size;
    if (part) {
        padded = (size + framing->alignment - 1) / framing->alignment * framing->alignment;
        common.pdo = (uint8_t)padded;
        common.plen = padded + part->length;
        if (framing->data_digest) {
            common.flags |= US_PDU_DDGST;
            common.plen += US_PDU_DIGEST;
        }
    }
    uint8_t *at = stage(out, padded);
    memcpy(at, &common, sizeof common);
    memcpy(at + sizeof common, body, body_length);
    if (framing->header_digest) {
        uint32_t digest = us_crc32c(0, at, header);
        memcpy(at + header, &digest, sizeof digest);
    }
    memset(at + size, 0, padded - size);
    if (!part)
        return 0;
    out->segments[out->end++] = (struct us_nvme_segment){
        .data = part->data, .offset = part->offset, .length = part->length, .cid = part->cid, .last = part->last};
    if (framing->data_digest) {
        uint32_t digest = us_crc32c(0, part->data, part->length);
        memcpy(stage(out, sizeof digest), &digest, sizeof digest);
    }
    return 0;
}

int us_nvme_out_keep(struct us_nvme_out *out, int32_t cid, bool forget) {
    for (uint32_t i = out->first; i < out->end; i++) {
        struct us_nvme_segment *segment = &out->segments[i];
        if (segment->cid != cid)
            continue;
        if (!segment->kept) {
            uint8_t *copy = malloc(segment->length);
            if (!copy)
                return -ENOMEM;
            segment->data = memcpy(copy, segment->data, segment->length);
            segment->kept = true;
        }
        if (forget)
            segment->cid = US_NVME_NOBODY;
    }
    return 0;
}

int us_nvme_out_write(const struct us_nvme_out *out, int fd, int flags, size_t *went) {
    struct iovec pieces[PIECES];
    size_t count = 0, wanted = 0;
    for (uint32_t i = out->first; i < out->end && count < PIECES; i++, count++) {
        const struct us_nvme_segment *segment = &out->segments[i];
        uint32_t sent = i == out->first ? out->sent : 0;
        pieces[count] = (struct iovec){(void *)(us_nvme_out_bytes(out, segment) + sent), segment->length - sent};
        wanted += pieces[count].iov_len;
    }
    *went = 0;
    if (!count)
        return 0;
    struct msghdr message = {.msg_iov = pieces, .msg_iovlen = count};
    ssize_t rc;
    do {
        rc = sendmsg(fd, &message, flags | MSG_NOSIGNAL);
    } while (rc < 0 && errno == EINTR);
    if (rc < 0)
        return errno == EAGAIN ? 1 : -errno;
    *went = (size_t)rc;
    return *went < wanted;
}

bool us_nvme_out_advance(struct us_nvme_out *out, size_t *bytes, struct us_nvme_segment *segment) {
    while (out->first < out->end) {
        *segment = out->segments[out->first];
        uint32_t left = segment->length - out->sent;
        if (*bytes < left) {
            out->sent += (uint32_t)*bytes;
            return false;
        }
        *bytes -= left;
        out->sent = 0;
        out->first++;
        if (segment->kept)
            free((void *)segment->data);
        if (segment->cid != US_NVME_NOBODY)
            return true;
    }
    out->first = out->end = 0;
    out->staged = 0;
    return false;
}
