/* One piece of work on a file, from its first system call to its last.
 *
 * The kernel may move fewer bytes than asked, be interrupted, or want to be asked again; a transfer knows what is left of it,
 * whoever makes the calls: a ring (uring.c), or a thread that waits for each (us_transfer_now).
 * What lies behind a file's end reads as zeros.
 */
#ifndef US_TRANSFER_H
#define US_TRANSFER_H
#include <stdbool.h>
#include <stdint.h>

enum us_operation {
    US_FILE_READ,
    US_FILE_WRITE,
    US_FILE_SYNC,     /* fdatasync */
    US_FILE_PUNCH,    /* the range reads as zeros and takes no room */
    US_FILE_ZERO,     /* the range reads as zeros */
    US_FILE_ALLOCATE, /* the range has its room; the file's size stays */
};

struct us_transfer {
    uint8_t *buffer; /* the caller's */
    uint8_t *memory; /* what the kernel is given: the buffer, or an aligned copy */
    uint64_t offset, length, done;
    uint32_t operation;
    uint32_t tail;  /* bytes beyond the last whole block that the last read brought */
    uint32_t tries; /* in a row that moved nothing */
};

/* Takes in what a system call returned; true when another has to follow.  Else `*result` is 0 or -errno. */
bool us_transfer_goes_on(struct us_transfer *transfer, int64_t returned, uint32_t align, int *result);

/* The whole of it, here and now: 0 or -errno; `*done` says how many bytes had been moved. */
int us_transfer_now(uint32_t operation, int fd, void *buffer, uint64_t length, uint64_t offset, uint32_t align,
                    uint64_t *done);

/* A read that is answered from the page cache: 0; -EAGAIN where not all of it is there; another -errno where the file
 * cannot tell. */
int us_transfer_cached(int fd, void *buffer, uint64_t length, uint64_t offset);

/* The mode of fallocate(2) that an operation stands for. */
int us_transfer_mode(uint32_t operation);
#endif
