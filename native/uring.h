/* Transfers on one file through io_uring, by raw system calls.
 *
 * Requests are asked for, go to the kernel together (us_uring_submit), and come back when each is wholly done, in any order
 * (us_uring_reap); an eventfd is readable when there is something to reap.  Between asking and reaping a request's buffer
 * belongs to the kernel, and there is no way to take it back sooner: whoever asks keeps it alive until then.
 *
 * No more than `depth` requests are in flight, for which the completion queue has room twice over: it cannot overflow.
 * Memory: one bounce area of US_URING_CHUNK bytes for each, touched only where a caller's buffer is not aligned.
 *
 * One thread alone calls all of this for one ring, the one that opened it.
 */
#ifndef US_URING_H
#define US_URING_H
#include <stdint.h>

#define US_URING_CHUNK 131072u /* the most bytes of one read or write */
#define US_URING_DEPTH_MAX 1024u

struct us_uring;

/* `align` is what the file wants of memory, offsets and lengths: 1, or a power of two up to 4096.  0 or -errno. */
int us_uring_open(struct us_uring **out, int fd, uint32_t depth, uint32_t align);
/* Nothing may be in flight. */
void us_uring_close(struct us_uring *ring);
int us_uring_eventfd(const struct us_uring *ring);

/* Returns the request's number, below depth, that is free again when it was reaped; -EBUSY when `depth` are in flight. */
int us_uring_ask(struct us_uring *ring, uint32_t operation, void *buffer, uint64_t length, uint64_t offset);
/* Hands over what was asked for; returns how many requests the kernel could not take yet, or -errno. */
int us_uring_submit(struct us_uring *ring);
/* Fills in up to depth requests that are done, as number << 32 | errno; returns their count, or -errno. */
int us_uring_reap(struct us_uring *ring, uint64_t *done);
/* The bytes that a request moved, until its number is used again. */
uint64_t us_uring_moved(const struct us_uring *ring, uint32_t number);
#endif
