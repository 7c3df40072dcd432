#define _GNU_SOURCE
#include "uring.h"
#include "transfer.h"
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* --- the kernel's ABI, in our own words (Linux include/uapi/linux/io_uring.h) --- */

enum { OP_FSYNC = 3, OP_FALLOCATE = 17, OP_READ = 22, OP_WRITE = 23 };
enum { SQE_ASYNC = 1 << 4 };
enum { FSYNC_DATASYNC = 1 };
enum { SETUP_TASKRUN_FLAG = 1 << 9, SETUP_SINGLE_ISSUER = 1 << 12, SETUP_DEFER_TASKRUN = 1 << 13 };
enum { SQ_TASKRUN = 1 << 2 };
enum { COMPLETIONS_AN_ENTRY = 16 }; /* at least; Linux 6.14 makes 20, before it all of them */
enum { FEATURE_SINGLE_MMAP = 1 << 0, FEATURE_NODROP = 1 << 1, FEATURE_RW_CUR_POS = 1 << 3 };
enum { ENTER_GETEVENTS = 1 };
enum { REGISTER_EVENTFD = 4 };
#define MAP_QUEUES 0ll
#define MAP_REQUESTS 0x10000000ll

struct sq_offsets {
    uint32_t head, tail, mask, entries, flags, dropped, array, reserved;
    uint64_t user_address;
};
struct cq_offsets {
    uint32_t head, tail, mask, entries, overflow, completions, flags, reserved;
    uint64_t user_address;
};
struct parameters {
    uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd, reserved[3];
    struct sq_offsets sq;
    struct cq_offsets cq;
};
struct sqe {
    uint8_t opcode, flags;
    uint16_t priority;
    int32_t fd;
    uint64_t offset, address;
    uint32_t length, operation_flags;
    uint64_t user_data;
    uint16_t buffer_index, personality;
    int32_t splice_fd;
    uint64_t address3, padding;
};
struct cqe {
    uint64_t user_data;
    int32_t result;
    uint32_t flags;
};

_Static_assert(sizeof(struct sq_offsets) == 40 && offsetof(struct sq_offsets, array) == 24, "io_sqring_offsets");
_Static_assert(sizeof(struct cq_offsets) == 40 && offsetof(struct cq_offsets, completions) == 20, "io_cqring_offsets");
_Static_assert(sizeof(struct parameters) == 120 && offsetof(struct parameters, features) == 20 &&
                   offsetof(struct parameters, sq) == 40 && offsetof(struct parameters, cq) == 80,
               "io_uring_params");
_Static_assert(sizeof(struct sqe) == 64 && offsetof(struct sqe, fd) == 4 && offsetof(struct sqe, offset) == 8 &&
                   offsetof(struct sqe, address) == 16 && offsetof(struct sqe, length) == 24 &&
                   offsetof(struct sqe, operation_flags) == 28 && offsetof(struct sqe, user_data) == 32,
               "io_uring_sqe");
_Static_assert(sizeof(struct cqe) == 16 && offsetof(struct cqe, result) == 8, "io_uring_cqe");
_Static_assert(sizeof(_Atomic uint32_t) == sizeof(uint32_t), "the queues' heads and tails are plain words");

/* --- a ring --- */

struct request {
    struct us_transfer transfer;
    int32_t next; /* free request, or -1 */
};

struct us_uring {
    int fd, event, file;
    uint32_t depth, align, entries;
    bool deferred; /* completions are made when we enter */
    uint32_t ready; /* written to the queue, not yet handed over */
    uint8_t *queues;
    size_t queues_size;
    struct sqe *sqes;
    _Atomic uint32_t *sq_tail, *sq_flags, *cq_head, *cq_tail;
    uint32_t sq_mask, cq_mask;
    const struct cqe *cqes;
    uint8_t *bounce;
    struct request *requests;
    int32_t free;
};

static int setup(uint32_t entries, struct parameters *parameters) {
    /* Deferred: nothing interrupts this thread, and one entry makes all completions there are.  Linux 6.1. */
    static const uint32_t flags[] = {SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN | SETUP_TASKRUN_FLAG, 0};
    for (unsigned i = 0;; i++) {
        *parameters = (struct parameters){.flags = flags[i]};
        int fd = (int)syscall(SYS_io_uring_setup, entries, parameters);
        if (fd >= 0)
            return fd;
        if (errno != EINVAL || !flags[i])
            return -errno;
    }
}

static int map(struct us_uring *ring, const struct parameters *parameters) {
    size_t sq = parameters->sq.array + parameters->sq_entries * sizeof(uint32_t);
    size_t cq = parameters->cq.completions + parameters->cq_entries * sizeof(struct cqe);
    ring->queues_size = sq > cq ? sq : cq;
    int protection = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE;
    void *queues = mmap(NULL, ring->queues_size, protection, flags, ring->fd, MAP_QUEUES);
    if (queues == MAP_FAILED)
        return -errno;
    ring->queues = queues;
    void *sqes = mmap(NULL, ring->entries * sizeof(struct sqe), protection, flags, ring->fd, MAP_REQUESTS);
    if (sqes == MAP_FAILED)
        return -errno;
    ring->sqes = sqes;
    ring->sq_tail = (_Atomic uint32_t *)(void *)(ring->queues + parameters->sq.tail);
    ring->sq_flags = (_Atomic uint32_t *)(void *)(ring->queues + parameters->sq.flags);
    ring->cq_head = (_Atomic uint32_t *)(void *)(ring->queues + parameters->cq.head);
    ring->cq_tail = (_Atomic uint32_t *)(void *)(ring->queues + parameters->cq.tail);
    ring->sq_mask = *(uint32_t *)(void *)(ring->queues + parameters->sq.mask);
    ring->cq_mask = *(uint32_t *)(void *)(ring->queues + parameters->cq.mask);
    ring->cqes = (const struct cqe *)(const void *)(ring->queues + parameters->cq.completions);
    /* The array says which entry is where in the queue; entry i is always at place i. */
    uint32_t *array = (uint32_t *)(void *)(ring->queues + parameters->sq.array);
    for (uint32_t i = 0; i < parameters->sq_entries; i++)
        array[i] = i;
    return 0;
}

static int start(struct us_uring *ring, uint32_t depth) {
    struct parameters parameters;
    ring->fd = setup(depth, &parameters);
    if (ring->fd < 0)
        return ring->fd;
    uint32_t needed = FEATURE_SINGLE_MMAP | FEATURE_NODROP | FEATURE_RW_CUR_POS; /* the last: Linux 5.6, OP_READ */
    if ((parameters.features & needed) != needed)
        return -ENOSYS;
    ring->entries = parameters.sq_entries;
    ring->deferred = parameters.flags & SETUP_DEFER_TASKRUN;
    int rc = map(ring, &parameters);
    if (rc)
        return rc;
    ring->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (ring->event < 0 || syscall(SYS_io_uring_register, ring->fd, REGISTER_EVENTFD, &ring->event, 1))
        return -errno;
    ring->bounce = mmap(NULL, (size_t)depth * US_URING_CHUNK, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (ring->bounce == MAP_FAILED) {
        ring->bounce = NULL;
        return -ENOMEM;
    }
    ring->requests = calloc(depth, sizeof *ring->requests);
    if (!ring->requests)
        return -ENOMEM;
    for (uint32_t i = 0; i < depth; i++)
        ring->requests[i].next = i + 1 < depth ? (int32_t)i + 1 : -1;
    return 0;
}

int us_uring_open(struct us_uring **out, int fd, uint32_t depth, uint32_t align) {
    if (!depth || depth > US_URING_DEPTH_MAX || !align || align > 4096 || align & (align - 1))
        return -EINVAL;
    struct us_uring *ring = calloc(1, sizeof *ring);
    if (!ring)
        return -ENOMEM;
    *ring = (struct us_uring){.fd = -1, .event = -1, .file = fd, .depth = depth, .align = align};
    int rc = start(ring, depth);
    if (rc) {
        us_uring_close(ring);
        return rc;
    }
    *out = ring;
    return 0;
}

void us_uring_close(struct us_uring *ring) {
    if (!ring)
        return;
    if (ring->sqes)
        munmap(ring->sqes, ring->entries * sizeof(struct sqe));
    if (ring->queues)
        munmap(ring->queues, ring->queues_size);
    if (ring->bounce)
        munmap(ring->bounce, (size_t)ring->depth * US_URING_CHUNK);
    if (ring->event >= 0)
        close(ring->event);
    if (ring->fd >= 0)
        close(ring->fd);
    free(ring->requests);
    free(ring);
}

int us_uring_eventfd(const struct us_uring *ring) {
    return ring->event;
}

/* Writes a request's next entry into the queue.  There is a place: the queue has `depth` of them, a request one at a time. */
static void enqueue(struct us_uring *ring, uint32_t number) {
    const struct us_transfer *transfer = &ring->requests[number].transfer;
    uint64_t left = transfer->length - transfer->done;
    uint32_t tail = atomic_load_explicit(ring->sq_tail, memory_order_relaxed);
    struct sqe *sqe = &ring->sqes[tail & ring->sq_mask];
    *sqe = (struct sqe){.fd = ring->file, .offset = transfer->offset + transfer->done, .user_data = number};
    if (transfer->tries)
        sqe->flags |= SQE_ASYNC; /* a thread of the kernel waits, where asking again did not help */
    switch (transfer->operation) {
    case US_FILE_READ:
    case US_FILE_WRITE:
        sqe->opcode = transfer->operation == US_FILE_READ ? OP_READ : OP_WRITE;
        sqe->address = (uint64_t)(uintptr_t)(transfer->memory + transfer->done);
        sqe->length = (uint32_t)left;
        break;
    case US_FILE_SYNC:
        sqe->opcode = OP_FSYNC;
        sqe->offset = 0;
        sqe->operation_flags = FSYNC_DATASYNC;
        break;
    default:
        sqe->opcode = OP_FALLOCATE;
        sqe->address = left;
        sqe->length = (uint32_t)us_transfer_mode(transfer->operation);
    }
    atomic_store_explicit(ring->sq_tail, tail + 1, memory_order_release);
    ring->ready++;
}

int us_uring_ask(struct us_uring *ring, uint32_t operation, void *buffer, uint64_t length, uint64_t offset) {
    bool moves = operation <= US_FILE_WRITE;
    if (moves && length > US_URING_CHUNK)
        return -EINVAL;
    int32_t number = ring->free;
    if (number < 0)
        return -EBUSY;
    struct request *request = &ring->requests[number];
    ring->free = request->next;
    request->transfer = (struct us_transfer){
        .buffer = buffer, .memory = buffer, .operation = operation, .length = length, .offset = offset};
    if (moves && (uintptr_t)buffer & (ring->align - 1)) {
        request->transfer.memory = ring->bounce + (size_t)number * US_URING_CHUNK;
        if (operation == US_FILE_WRITE)
            memcpy(request->transfer.memory, buffer, length);
    }
    enqueue(ring, (uint32_t)number);
    return number;
}

static int enter(const struct us_uring *ring, uint32_t submitted, uint32_t flags) {
    int taken = (int)syscall(SYS_io_uring_enter, ring->fd, submitted, 0, flags, NULL, 0);
    return taken < 0 ? -errno : taken;
}

int us_uring_submit(struct us_uring *ring) {
    while (ring->ready) {
        int taken = enter(ring, ring->ready, 0);
        if (taken > 0)
            ring->ready -= (uint32_t)taken;
        if (taken == 0 || taken == -EAGAIN || taken == -EBUSY)
            break; /* short of memory: the caller comes again */
        if (taken < 0 && taken != -EINTR)
            return taken;
    }
    return (int)ring->ready;
}

/* Ends a request, or puts what is left of it into the queue; true when it ended. */
static bool settle(struct us_uring *ring, const struct cqe *cqe, uint64_t *done) {
    uint32_t number = (uint32_t)cqe->user_data;
    struct request *request = &ring->requests[number];
    struct us_transfer *transfer = &request->transfer;
    int result;
    if (us_transfer_goes_on(transfer, cqe->result, ring->align, &result)) {
        enqueue(ring, number);
        return false;
    }
    if (transfer->operation == US_FILE_READ && !result && transfer->memory != transfer->buffer)
        memcpy(transfer->buffer, transfer->memory, transfer->length);
    request->next = ring->free;
    ring->free = (int32_t)number;
    *done = (uint64_t)number << 32 | (uint32_t)-result;
    return true;
}

int us_uring_reap(struct us_uring *ring, uint64_t *done) {
    uint64_t signals;
    ssize_t ignored = read(ring->event, &signals, sizeof signals);
    (void)ignored; /* first, so that what completes from here on is signalled again */
    /* An entry makes some twenty completions; the eventfd tells nothing of those left over, a flag does.  Whoever sets it races
     * with us, so that it may stay behind alone: more entries than there are requests to complete would be in vain. */
    uint32_t entries = ring->deferred ? ring->depth / COMPLETIONS_AN_ENTRY + 1 : 0;
    for (uint32_t i = 0; i < entries && (!i || atomic_load(ring->sq_flags) & SQ_TASKRUN); i++) {
        int rc = enter(ring, 0, ENTER_GETEVENTS);
        if (rc < 0 && rc != -EINTR)
            return rc;
    }
    int count = 0;
    uint32_t head = atomic_load_explicit(ring->cq_head, memory_order_relaxed);
    uint32_t tail = atomic_load_explicit(ring->cq_tail, memory_order_acquire);
    while (head != tail) {
        count += settle(ring, &ring->cqes[head & ring->cq_mask], &done[count]);
        head++;
    }
    atomic_store_explicit(ring->cq_head, head, memory_order_release);
    int rc = us_uring_submit(ring);
    return rc < 0 ? rc : count;
}

uint64_t us_uring_moved(const struct us_uring *ring, uint32_t number) {
    return ring->requests[number].transfer.done;
}
