#define _GNU_SOURCE
#include "transfer.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define TRIES_MAX 64

bool us_transfer_goes_on(struct us_transfer *transfer, int64_t returned, uint32_t align, int *result) {
    bool reads = transfer->operation == US_FILE_READ;
    *result = 0;
    if (returned == -EINTR || returned == -EAGAIN) {
        *result = (int)returned;
        return ++transfer->tries < TRIES_MAX;
    }
    if (returned < 0) {
        *result = (int)returned;
        return false;
    }
    if (transfer->operation > US_FILE_WRITE)
        return false;
    /* Unbuffered work starts at a whole block again.  A read that twice ends at the same byte has met the file's end. */
    uint32_t tail = (uint32_t)(returned % align);
    transfer->done += (uint64_t)returned - tail;
    if (transfer->done == transfer->length)
        return false;
    if (reads && (returned == 0 || (tail && (uint64_t)returned == tail && tail == transfer->tail))) {
        uint64_t end = transfer->done + tail;
        memset(transfer->memory + end, 0, transfer->length - end);
        transfer->done = transfer->length;
        return false;
    }
    transfer->tail = tail;
    transfer->tries = (uint64_t)returned == tail ? transfer->tries + 1 : 0;
    if (transfer->tries < TRIES_MAX)
        return true;
    *result = -EIO;
    return false;
}

int us_transfer_mode(uint32_t operation) {
    switch (operation) {
    case US_FILE_PUNCH:
        return FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    case US_FILE_ZERO:
        return FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
    default:
        return FALLOC_FL_KEEP_SIZE;
    }
}

static int64_t call(const struct us_transfer *transfer, int fd) {
    uint64_t left = transfer->length - transfer->done;
    off_t offset = (off_t)(transfer->offset + transfer->done);
    int64_t returned;
    switch (transfer->operation) {
    case US_FILE_READ:
        returned = pread(fd, transfer->memory + transfer->done, left, offset);
        break;
    case US_FILE_WRITE:
        returned = pwrite(fd, transfer->memory + transfer->done, left, offset);
        break;
    case US_FILE_SYNC:
        returned = fdatasync(fd);
        break;
    default:
        returned = fallocate(fd, us_transfer_mode(transfer->operation), offset, (off_t)left);
    }
    return returned < 0 ? -errno : returned;
}

int us_transfer_now(uint32_t operation, int fd, void *buffer, uint64_t length, uint64_t offset, uint32_t align,
                    uint64_t *done) {
    struct us_transfer transfer = {
        .buffer = buffer, .memory = buffer, .operation = operation, .offset = offset, .length = length};
    bool copied = (uintptr_t)buffer % align != 0;
    if (copied) {
        transfer.memory = aligned_alloc(align, length);
        if (!transfer.memory)
            return -ENOMEM;
        if (operation == US_FILE_WRITE)
            memcpy(transfer.memory, buffer, length);
    }
    int result;
    while (us_transfer_goes_on(&transfer, call(&transfer, fd), align, &result)) {
    }
    if (copied) {
        if (operation == US_FILE_READ && !result)
            memcpy(buffer, transfer.memory, length);
        free(transfer.memory);
    }
    *done = transfer.done;
    return result;
}

int us_transfer_cached(int fd, void *buffer, uint64_t length, uint64_t offset) {
    struct iovec place = {buffer, length};
    ssize_t returned = preadv2(fd, &place, 1, (off_t)offset, RWF_NOWAIT);
    if (returned < 0)
        return -errno;
    return (uint64_t)returned == length ? 0 : -EAGAIN;
}
