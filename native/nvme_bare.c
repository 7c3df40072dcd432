#define _GNU_SOURCE
#include "nvme_bare.h"
#include "nvme_out.h"
#include "nvme_pdu.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define INBOX (1u << 20)
#define DEPTH_MAX 1024u
#define QUEUE_ID 1 /* in answers: hosts do not look */
enum { OPCODE_WRITE = 1, OPCODE_READ = 2, OPCODE_WRITE_ZEROES = 8 };
enum { LBA_OUT_OF_RANGE = 0x080 };

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* Some bytes; 0 when the other end closed, or -errno. */
static ssize_t some(int fd, void *to, size_t room, bool spin) {
    ssize_t got;
    do {
        got = recv(fd, to, room, spin ? MSG_DONTWAIT : 0);
    } while (got < 0 && (errno == EINTR || errno == EAGAIN));
    return got < 0 ? -errno : got;
}

static int all(int fd, uint8_t *to, size_t count, bool spin) {
    for (ssize_t got; count; count -= (size_t)got, to += got)
        if ((got = some(fd, to, count, spin)) <= 0)
            return got ? (int)got : -EPIPE;
    return 0;
}

static int give(int fd, const uint8_t *bytes, size_t count) {
    while (count) {
        ssize_t went = send(fd, bytes, count, MSG_NOSIGNAL);
        if (went < 0 && errno != EINTR)
            return -errno;
        count -= went > 0 ? (size_t)went : 0;
        bytes += went > 0 ? went : 0;
    }
    return 0;
}

int us_nvme_ping(int fd, uint32_t ask, uint32_t answer, uint32_t count, bool spin, uint64_t *took) {
    uint8_t *bytes = calloc(1, ask > answer ? ask : answer);
    int rc = bytes ? 0 : -ENOMEM;
    for (uint32_t i = 0; i < count && !rc; i++) {
        uint64_t began = now();
        rc = give(fd, bytes, ask);
        if (!rc)
            rc = all(fd, bytes, answer, spin);
        took[i] = now() - began;
    }
    free(bytes);
    return rc;
}

int us_nvme_pong(int fd, uint32_t ask, uint32_t answer, bool spin) {
    uint8_t *bytes = calloc(1, ask > answer ? ask : answer);
    int rc = bytes ? 0 : -ENOMEM;
    while (!rc) {
        rc = all(fd, bytes, ask, spin);
        if (!rc)
            rc = give(fd, bytes, answer);
    }
    free(bytes);
    return rc == -EPIPE ? 0 : rc;
}

static struct us_nvme_framing framing(const struct us_nvme_bare *bare) {
    return (struct us_nvme_framing){bare->header_digest, bare->data_digest, 4};
}

static int flush(struct us_nvme_out *out, int fd) {
    size_t went;
    struct us_nvme_segment segment;
    do {
        int rc = us_nvme_out_write(out, fd, 0, &went);
        if (rc < 0)
            return rc;
        size_t left = went;
        while (us_nvme_out_advance(out, &left, &segment))
            ;
    } while (went);
    return 0;
}

/* --- the target --- */

static int answer(const struct us_nvme_bare *bare, struct us_nvme_out *out, const uint8_t *pdu) {
    struct us_pdu_common common;
    struct us_nvme_sqe sqe;
    memcpy(&common, pdu, sizeof common);
    memcpy(&sqe, pdu + sizeof common, sizeof sqe);
    uint64_t first;
    uint16_t count;
    memcpy(&first, sqe.cdw, sizeof first);
    memcpy(&count, sqe.cdw + sizeof first, sizeof count);
    uint64_t blocks = (uint64_t)count + 1, bytes = blocks * bare->block_size;
    struct us_nvme_framing form = framing(bare);
    struct us_nvme_cqe cqe = {.cid = sqe.cid, .queue = QUEUE_ID};
    if (sqe.opcode == OPCODE_READ || sqe.opcode == OPCODE_WRITE || sqe.opcode == OPCODE_WRITE_ZEROES) {
        uint8_t *place = bare->memory + first * bare->block_size;
        if (first > bare->blocks || blocks > bare->blocks - first)
            cqe.status = LBA_OUT_OF_RANGE << 1;
        else if (sqe.opcode == OPCODE_WRITE_ZEROES)
            memset(place, 0, bytes);
        else if (sqe.length != bytes)
            return -EPROTO;
        else if (sqe.opcode == OPCODE_READ) {
            struct us_pdu_transfer fields = {.cid = sqe.cid, .length = sqe.length};
            struct us_nvme_part part = {.data = place, .length = sqe.length, .cid = US_NVME_NOBODY};
            int rc = us_nvme_out_frame(out, &form, US_PDU_C2H_DATA, US_PDU_LAST, &fields, sizeof fields, &part);
            if (rc)
                return rc;
        } else if (common.pdo < sizeof common + sizeof sqe || common.plen < common.pdo + bytes)
            return -EPROTO; /* not along with its command: there are no R2Ts here */
        else
            memcpy(place, pdu + common.pdo, bytes);
    }
    return us_nvme_out_frame(out, &form, US_PDU_CAPSULE_RESP, 0, &cqe, sizeof cqe, NULL);
}

/* Answers what has come whole; what is left moves to the front. */
static int answer_all(const struct us_nvme_bare *bare, struct us_nvme_out *out, uint8_t *inbox, size_t *end) {
    struct us_pdu_common common;
    size_t start = 0;
    while (*end - start >= sizeof common) {
        memcpy(&common, inbox + start, sizeof common);
        if (common.type != US_PDU_CAPSULE_CMD || common.plen < sizeof common + sizeof(struct us_nvme_sqe) ||
            common.plen > INBOX)
            return -EPROTO;
        if (common.plen > *end - start)
            break;
        int rc = answer(bare, out, inbox + start);
        if (rc)
            return rc;
        start += common.plen;
    }
    *end -= start;
    memmove(inbox, inbox + start, *end);
    return 0;
}

int us_nvme_bare_serve(int fd, const struct us_nvme_bare *bare) {
    struct us_nvme_out out = {0};
    size_t end = 0;
    uint8_t *inbox = malloc(INBOX);
    int rc = inbox ? 0 : -ENOMEM;
    while (!rc) {
        ssize_t got = some(fd, inbox + end, INBOX - end, bare->spin);
        if (got <= 0) {
            rc = got ? (int)got : -EPIPE;
            break;
        }
        end += (size_t)got;
        rc = answer_all(bare, &out, inbox, &end);
        if (!rc)
            rc = flush(&out, fd);
    }
    us_nvme_out_free(&out);
    free(inbox);
    return rc == -EPIPE || rc == -ECONNRESET ? 0 : rc;
}

/* --- the host --- */

static int ask(const struct us_nvme_bare *bare, struct us_nvme_out *out, uint32_t number) {
    struct us_nvme_framing form = framing(bare);
    uint64_t block = number * 2654435761u % bare->blocks; /* Knuth's multiplier: far from the one before */
    struct us_nvme_sqe sqe = {.opcode = OPCODE_READ,
                              .flags = US_NVME_BY_SGL,
                              .cid = (uint16_t)number,
                              .nsid = 1,
                              .length = bare->block_size,
                              .sgl = US_NVME_SGL_TRANSPORT};
    memcpy(sqe.cdw, &block, sizeof block);
    return us_nvme_out_frame(out, &form, US_PDU_CAPSULE_CMD, 0, &sqe, sizeof sqe, NULL);
}

int us_nvme_bare_ask(int fd, const struct us_nvme_bare *bare, uint32_t depth, uint32_t count, uint64_t *took) {
    if (!depth || depth > DEPTH_MAX)
        return -EINVAL;
    uint64_t began[DEPTH_MAX];
    uint32_t digests = 2 * bare->header_digest + bare->data_digest;
    uint32_t size = 2 * US_PDU_HLEN + bare->block_size + US_PDU_DIGEST * digests;
    struct us_nvme_out out = {0};
    uint8_t *inbox = malloc(INBOX);
    int rc = inbox ? 0 : -ENOMEM;
    uint64_t bytes = 0;
    for (uint32_t asked = 0, done = 0; done < count && !rc;) {
        for (uint64_t time = now(); asked < count && asked < done + depth && !rc; asked++) {
            began[asked % depth] = time;
            rc = ask(bare, &out, asked);
        }
        if (!rc)
            rc = flush(&out, fd);
        ssize_t got = rc ? 0 : some(fd, inbox, INBOX, bare->spin);
        if (got <= 0)
            rc = rc ? rc : got ? (int)got : -EPIPE;
        bytes += got > 0 ? (uint64_t)got : 0;
        for (uint64_t time = now(); done < bytes / size; done++)
            took[done] = time - began[done % depth];
    }
    us_nvme_out_free(&out);
    free(inbox);
    return rc;
}
