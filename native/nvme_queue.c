#define _GNU_SOURCE
#include "nvme_queue.h"
#include "crc32c.h"
#include "nvme_out.h"
#include "nvme_pdu.h"
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#define CIDS 65536u
#define SCRATCH_LOW 256u  /* with less room than this, what is left over, a header at most, moves to the front */
#define DIRECT_MIN 1024u  /* of missing data: from here on its own place in a receive beats a copy */
#define RECEIVES_A_TURN 8 /* then others have theirs */

/* A PDU's header, once taken, leaves what its data needs in here. */
struct data {
    struct us_nvme_command *command;
    uint8_t *sink;    /* where the next byte goes; NULL: nowhere */
    uint32_t padding; /* bytes before the data */
    uint32_t missing; /* bytes of data */
    uint32_t crc;
    bool trailer; /* a digest follows */
    bool success; /* its end completes the command */
};

struct us_nvme_queue {
    struct us_nvme_form form;
    struct us_nvme_framing framing;
    struct us_nvme_out out;
    struct data data;
    bool in_data;
    uint64_t *done; /* of the call that is being made, with its completions */
    int count;
    uint32_t free_count;
    uint16_t *slot; /* by CID: the number of its command from 1, or 0 */
    uint16_t *free_slots;
    struct us_nvme_command *commands;
};

enum step { MORE, ENOUGH, LOOK, FAILED };

int us_nvme_open(struct us_nvme_queue **out, const struct us_nvme_form *form) {
    if (!form->capacity || form->capacity >= CIDS || !form->alignment || form->alignment > US_PDU_ALIGNMENT_MAX ||
        !form->maxh2cdata || form->scratch_size < 2 * SCRATCH_LOW || form->start > form->end ||
        form->end > form->scratch_size - SCRATCH_LOW)
        return -EINVAL;
    struct us_nvme_queue *queue = calloc(1, sizeof *queue);
    if (!queue)
        return -ENOMEM;
    queue->form = *form;
    queue->framing = (struct us_nvme_framing){form->header_digest, form->data_digest, form->alignment};
    queue->slot = calloc(CIDS, sizeof *queue->slot);
    queue->free_slots = calloc(form->capacity, sizeof *queue->free_slots);
    queue->commands = calloc(form->capacity + 1, sizeof *queue->commands);
    if (!queue->slot || !queue->free_slots || !queue->commands) {
        us_nvme_close(queue);
        return -ENOMEM;
    }
    for (uint32_t slot = form->capacity; slot; slot--)
        queue->free_slots[queue->free_count++] = (uint16_t)slot;
    *out = queue;
    return 0;
}

void us_nvme_close(struct us_nvme_queue *queue) {
    if (!queue)
        return;
    for (uint32_t slot = 1; queue->commands && slot <= queue->form.capacity; slot++)
        free(queue->commands[slot].copy);
    us_nvme_out_free(&queue->out);
    free(queue->slot);
    free(queue->free_slots);
    free(queue->commands);
    free(queue);
}

/* --- commands --- */

static struct us_nvme_command *find(const struct us_nvme_queue *queue, uint32_t cid) {
    uint16_t slot = queue->slot[cid];
    return slot ? &queue->commands[slot] : NULL;
}

int us_nvme_submit(struct us_nvme_queue *queue, uint8_t opcode, uint32_t nsid, const uint8_t *cdw, const uint8_t *data,
                   uint8_t *into, uint32_t length) {
    if (!queue->free_count)
        return -EBUSY;
    uint32_t cid = queue->form.next_cid;
    while (queue->slot[cid])
        cid = (cid + 1) % CIDS;
    bool inside = data && length && length <= queue->form.in_capsule;
    struct us_nvme_sqe sqe = {.opcode = opcode,
                              .flags = US_NVME_BY_SGL,
                              .cid = (uint16_t)cid,
                              .nsid = nsid,
                              .length = length,
                              .sgl = inside ? US_NVME_SGL_IN_CAPSULE : US_NVME_SGL_TRANSPORT};
    memcpy(sqe.cdw, cdw, sizeof sqe.cdw);
    struct us_nvme_part along = {.data = data, .length = length, .cid = (int32_t)cid};
    int rc = us_nvme_out_frame(&queue->out, &queue->framing, US_PDU_CAPSULE_CMD, 0, &sqe, sizeof sqe, inside ? &along : NULL);
    if (rc)
        return rc;
    uint16_t slot = queue->free_slots[--queue->free_count];
    queue->commands[slot] = (struct us_nvme_command){.cid = (uint16_t)cid,
                                                     .into = into,
                                                     .data = inside ? NULL : data,
                                                     .expected = inside ? 0 : length,
                                                     .unsent = inside};
    queue->slot[cid] = slot;
    queue->form.next_cid = (cid + 1) % CIDS;
    if (length > queue->form.largest)
        queue->form.largest = length;
    return (int)cid;
}

int us_nvme_abandon(struct us_nvme_queue *queue, uint16_t cid) {
    struct us_nvme_command *command = find(queue, cid);
    if (!command)
        return -ENOENT;
    if (queue->in_data && queue->data.command == command)
        queue->data.sink = NULL;
    command->into = NULL;
    if (command->data && !command->copy) {
        command->copy = malloc(command->expected ? command->expected : 1);
        if (!command->copy)
            return -ENOMEM;
        command->data = memcpy(command->copy, command->data, command->expected);
    }
    return command->unsent ? us_nvme_out_keep(&queue->out, cid, false) : 0;
}

static enum step complete(struct us_nvme_queue *queue, struct us_nvme_command *command, uint16_t status, uint64_t result) {
    if (command->unsent && us_nvme_out_keep(&queue->out, command->cid, true))
        return FAILED;
    if (command->damaged)
        status = US_NVME_TRANSIENT_TRANSPORT;
    queue->done[2 * queue->count] = command->cid | (uint32_t)status << 16;
    queue->done[2 * queue->count + 1] = result;
    queue->count++;
    free(command->copy);
    queue->free_slots[queue->free_count++] = queue->slot[command->cid];
    queue->slot[command->cid] = 0;
    *command = (struct us_nvme_command){0};
    return MORE;
}

/* --- what comes --- */

static enum step response(struct us_nvme_queue *queue, const uint8_t *body) {
    struct us_nvme_cqe cqe;
    memcpy(&cqe, body, sizeof cqe);
    struct us_nvme_command *command = find(queue, cqe.cid);
    uint16_t status = cqe.status >> 1;
    if (!command || (queue->form.entries && cqe.head >= queue->form.entries) ||
        (!status && command->moved != command->expected))
        return LOOK;
    return complete(queue, command, status, cqe.result);
}

static enum step read_data(struct us_nvme_queue *queue, const struct us_pdu_common *common, const uint8_t *body, uint32_t size) {
    struct us_pdu_transfer transfer;
    memcpy(&transfer, body, sizeof transfer);
    struct us_nvme_command *command = find(queue, transfer.cid);
    if (!command || command->data || transfer.length != size || !size || transfer.offset != command->moved ||
        size > command->expected - command->moved)
        return LOOK;
    bool whole = size == command->expected - command->moved, success = common->flags & US_PDU_SUCCESS;
    if (success && !(whole && common->flags & US_PDU_LAST))
        return LOOK;
    queue->data = (struct data){.command = command,
                                .sink = command->into ? command->into + command->moved : NULL,
                                .padding = common->pdo - US_PDU_HLEN - (queue->form.header_digest ? US_PDU_DIGEST : 0),
                                .missing = size,
                                .trailer = queue->form.data_digest,
                                .success = success};
    command->moved += size;
    queue->in_data = true;
    return MORE;
}

static enum step ready_to_transfer(struct us_nvme_queue *queue, const uint8_t *body) {
    struct us_pdu_transfer r2t;
    memcpy(&r2t, body, sizeof r2t);
    struct us_nvme_command *command = find(queue, r2t.cid);
    if (!command || !command->data || r2t.offset != command->moved || !r2t.length ||
        r2t.length > command->expected - command->moved || command->r2ts >= queue->form.r2ts)
        return LOOK;
    command->moved += r2t.length;
    command->r2ts++;
    for (uint32_t done = 0, length; done < r2t.length; done += length) {
        length = r2t.length - done < queue->form.maxh2cdata ? r2t.length - done : queue->form.maxh2cdata;
        uint32_t offset = r2t.offset + done;
        bool last = done + length == r2t.length;
        struct us_pdu_transfer fields = {.cid = r2t.cid, .tag = r2t.tag, .offset = offset, .length = length};
        struct us_nvme_part part = {
            .data = command->data + offset, .offset = offset, .length = length, .cid = r2t.cid, .last = last};
        if (us_nvme_out_frame(&queue->out, &queue->framing, US_PDU_H2C_DATA, last ? US_PDU_LAST : 0, &fields, sizeof fields,
                              &part))
            return FAILED;
        command->unsent++;
    }
    return MORE;
}

/* The size of the data of a PDU that begins so; -1: Python says what is wrong with it. */
static int64_t data_size(const struct us_nvme_queue *queue, const struct us_pdu_common *common) {
    uint32_t least = US_PDU_HLEN + (queue->form.header_digest ? US_PDU_DIGEST : 0);
    if (common->hlen != US_PDU_HLEN || (common->flags & US_PDU_HDGST) != (queue->form.header_digest ? US_PDU_HDGST : 0))
        return -1;
    if (common->type != US_PDU_CAPSULE_RESP && common->type != US_PDU_R2T && common->type != US_PDU_C2H_DATA)
        return -1;
    if (common->plen == least)
        return 0;
    if (common->type != US_PDU_C2H_DATA || (common->flags & US_PDU_DDGST) != (queue->form.data_digest ? US_PDU_DDGST : 0) ||
        common->pdo < least || common->pdo % 4)
        return -1;
    int64_t size = (int64_t)common->plen - common->pdo - (queue->form.data_digest ? US_PDU_DIGEST : 0);
    return size > 0 && size <= queue->form.largest ? size : -1;
}

static enum step take_header(struct us_nvme_queue *queue) {
    const uint8_t *at = queue->form.scratch + queue->form.start;
    uint32_t available = queue->form.end - queue->form.start;
    struct us_pdu_common common;
    if (available < sizeof common)
        return ENOUGH;
    memcpy(&common, at, sizeof common);
    int64_t size = data_size(queue, &common);
    if (size < 0)
        return LOOK;
    uint32_t total = US_PDU_HLEN;
    if (queue->form.header_digest) {
        total += US_PDU_DIGEST;
        uint32_t digest;
        if (available < total)
            return ENOUGH;
        memcpy(&digest, at + US_PDU_HLEN, sizeof digest);
        if (digest != us_crc32c(0, at, US_PDU_HLEN))
            return LOOK;
    }
    if (available < total)
        return ENOUGH;
    const uint8_t *body = at + sizeof common;
    enum step step = common.type == US_PDU_C2H_DATA       ? read_data(queue, &common, body, (uint32_t)size)
                     : common.type == US_PDU_CAPSULE_RESP ? response(queue, body)
                                                          : ready_to_transfer(queue, body);
    if (step == MORE)
        queue->form.start += total;
    return step;
}

/* Counts bytes of data that lie where they belong. */
static void count_data(struct us_nvme_queue *queue, const uint8_t *bytes, uint32_t count) {
    struct data *data = &queue->data;
    if (data->trailer)
        data->crc = us_crc32c(data->crc, bytes, count);
    data->missing -= count;
    if (data->sink)
        data->sink += count;
}

static enum step take_data(struct us_nvme_queue *queue) {
    struct data *data = &queue->data;
    uint32_t available = queue->form.end - queue->form.start;
    uint32_t count = available < data->padding ? available : data->padding;
    data->padding -= count;
    queue->form.start += count;
    available -= count;
    if (data->padding)
        return ENOUGH;
    count = available < data->missing ? available : data->missing;
    if (count) {
        const uint8_t *bytes = queue->form.scratch + queue->form.start;
        if (data->sink)
            memcpy(data->sink, bytes, count);
        count_data(queue, bytes, count);
        queue->form.start += count;
        available -= count;
    }
    if (data->missing)
        return ENOUGH;
    if (data->trailer) {
        uint32_t digest;
        if (available < sizeof digest)
            return ENOUGH;
        memcpy(&digest, queue->form.scratch + queue->form.start, sizeof digest);
        queue->form.start += sizeof digest;
        if (digest != data->crc)
            data->command->damaged = true;
    }
    queue->in_data = false;
    return data->success ? complete(queue, data->command, 0, 0) : MORE;
}

/* Takes all that lies in scratch. */
static enum step take_all(struct us_nvme_queue *queue) {
    enum step step;
    do {
        step = queue->in_data ? take_data(queue) : take_header(queue);
    } while (step == MORE);
    if (queue->form.start == queue->form.end)
        queue->form.start = queue->form.end = 0;
    else if (queue->form.scratch_size - queue->form.end < SCRATCH_LOW) {
        memmove(queue->form.scratch, queue->form.scratch + queue->form.start, queue->form.end - queue->form.start);
        queue->form.end -= queue->form.start;
        queue->form.start = 0;
    }
    return step;
}

/* Data is awaited whose bytes may be received into their place. */
static bool is_direct(const struct us_nvme_queue *queue) {
    return queue->in_data && queue->data.sink && queue->data.missing >= DIRECT_MIN && !queue->data.padding &&
           queue->form.start == queue->form.end;
}

static int outcome(const struct us_nvme_queue *queue, enum step step) {
    if (step == FAILED)
        return -ENOMEM;
    return queue->count | (step == LOOK ? US_NVME_LOOK : 0) | (queue->out.first < queue->out.end ? US_NVME_OUT : 0);
}

void us_nvme_room(struct us_nvme_queue *queue, struct us_nvme_room *room) {
    if (is_direct(queue)) {
        const struct us_nvme_command *command = queue->data.command;
        *room = (struct us_nvme_room){
            .cid = command->cid, .at = command->moved - queue->data.missing, .length = queue->data.missing};
    } else {
        *room = (struct us_nvme_room){.cid = -1, .at = queue->form.end, .length = queue->form.scratch_size - queue->form.end};
    }
}

int us_nvme_take(struct us_nvme_queue *queue, uint32_t count, uint64_t *done) {
    queue->done = done;
    queue->count = 0;
    if (is_direct(queue)) {
        if (count > queue->data.missing)
            return -EINVAL;
        count_data(queue, queue->data.sink, count);
    } else {
        if (count > queue->form.scratch_size - queue->form.end)
            return -EINVAL;
        queue->form.end += count;
    }
    return outcome(queue, take_all(queue));
}

/* One receive, into the place of the data that is awaited and into scratch; *whole: it filled both. */
static ssize_t receive(struct us_nvme_queue *queue, int fd, bool *whole) {
    uint32_t direct = is_direct(queue) ? queue->data.missing : 0, room = queue->form.scratch_size - queue->form.end;
    struct iovec pieces[2] = {{queue->data.sink, direct}, {queue->form.scratch + queue->form.end, room}};
    struct msghdr message = {.msg_iov = direct ? pieces : pieces + 1, .msg_iovlen = direct ? 2 : 1};
    ssize_t got;
    do {
        got = recvmsg(fd, &message, MSG_DONTWAIT);
    } while (got < 0 && errno == EINTR);
    if (got <= 0)
        return got < 0 ? -errno : 0;
    uint32_t placed = (size_t)got < direct ? (uint32_t)got : direct;
    if (placed)
        count_data(queue, queue->data.sink, placed);
    queue->form.end += (uint32_t)got - placed;
    *whole = (size_t)got == (size_t)direct + room;
    return got;
}

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static int receive_until(struct us_nvme_queue *queue, int fd, uint32_t wait, uint64_t *done) {
    uint64_t until = wait ? now() + wait : 0;
    bool late = false;
    queue->done = done;
    queue->count = 0;
    enum step step = ENOUGH;
    for (int turn = 0; turn < RECEIVES_A_TURN && step == ENOUGH;) {
        bool whole = false;
        ssize_t got = receive(queue, fd, &whole);
        if (got > 0) {
            step = take_all(queue);
            turn++;
        } else if (got != -EAGAIN) {
            if (got == 0)
                return queue->count | US_NVME_EOF;
            return queue->count ? queue->count : (int)got; /* what completed is told of first: the error comes again */
        }
        if (whole)
            continue;
        late = until && now() >= until;
        if (queue->count || !until || late)
            break;
        if (got < 0)
            sched_yield();
    }
    int rc = outcome(queue, step);
    return rc >= 0 && late ? rc | US_NVME_LATE : rc;
}

int us_nvme_receive(struct us_nvme_queue *queue, int fd, uint64_t *done) {
    return receive_until(queue, fd, 0, done);
}

int us_nvme_exchange(struct us_nvme_queue *queue, int fd, uint32_t wait, uint64_t *done) {
    us_nvme_send(queue, fd); /* what is wrong with the connection is found by receiving, after what came before */
    return receive_until(queue, fd, wait, done);
}

/* --- what goes --- */

void us_nvme_sent(struct us_nvme_queue *queue, size_t bytes) {
    struct us_nvme_segment segment;
    while (us_nvme_out_advance(&queue->out, &bytes, &segment)) {
        struct us_nvme_command *command = find(queue, (uint32_t)segment.cid);
        command->unsent--;
        command->r2ts -= segment.last;
    }
}

int us_nvme_send(struct us_nvme_queue *queue, int fd) {
    int rc;
    size_t went;
    do {
        rc = us_nvme_out_write(&queue->out, fd, MSG_DONTWAIT, &went);
        us_nvme_sent(queue, went);
    } while (rc == 0 && went);
    return rc;
}

/* --- for Python's machine --- */

bool us_nvme_piece(struct us_nvme_queue *queue, uint32_t number, struct us_nvme_piece *piece) {
    const struct us_nvme_out *out = &queue->out;
    if (number >= out->end - out->first)
        return false;
    const struct us_nvme_segment *segment = &out->segments[out->first + number];
    uint32_t sent = number ? 0 : out->sent;
    *piece = (struct us_nvme_piece){.bytes = us_nvme_out_bytes(out, segment) + sent,
                                    .offset = segment->offset + sent,
                                    .length = segment->length - sent,
                                    .cid = segment->kept ? US_NVME_NOBODY : segment->cid};
    return true;
}

const struct us_nvme_form *us_nvme_form(const struct us_nvme_queue *queue) {
    return &queue->form;
}

const struct us_nvme_command *us_nvme_command(const struct us_nvme_queue *queue, uint16_t cid) {
    return find(queue, cid);
}
