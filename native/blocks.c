#define _GNU_SOURCE
#include "blocks.h"
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#define SMALLEST (4ull << 20)

#ifndef MADV_POPULATE_WRITE /* Linux 5.14 */
#define MADV_POPULATE_WRITE 23
#endif

_Static_assert(sizeof(struct us_block) == 20, "struct us_block");
_Static_assert(US_HANDLE_LIMIT * US_SLOT_UNIT == 512ull << 30, "handles reach 512 GiB");

static uint64_t whole_pages(uint64_t bytes) { return (bytes + US_PAGE_BYTES - 1) & ~(uint64_t)(US_PAGE_BYTES - 1); }

static uint64_t headers_bytes(uint64_t blocks) { return whole_pages(blocks * US_BLOCK_PAGES * sizeof(uint64_t)); }

static uint64_t bytes_with_description(uint64_t blocks) {
    return blocks * US_BLOCK_BYTES + whole_pages(blocks * sizeof(struct us_block)) + headers_bytes(blocks);
}

/* Blocks to ask for first. */
static uint64_t wanted_blocks(uint64_t limit) {
    uint64_t bytes = US_HANDLE_LIMIT * US_SLOT_UNIT;
    struct rlimit most;
    if (limit && limit < bytes / 8)
        bytes = limit * 4 + (256ull << 20); /* blocks are seldom full: room for more of them than `limit` fills */
    if (!getrlimit(RLIMIT_FSIZE, &most) && most.rlim_cur != RLIM_INFINITY)
        while (bytes > SMALLEST && bytes_with_description(bytes / US_BLOCK_BYTES) > most.rlim_cur)
            bytes /= 2; /* beyond it ftruncate raises SIGXFSZ */
    if (!getrlimit(RLIMIT_AS, &most) && most.rlim_cur != RLIM_INFINITY)
        while (bytes > SMALLEST && bytes > most.rlim_cur / 4)
            bytes /= 2; /* the rest of the process needs addresses too */
    return bytes / US_BLOCK_BYTES;
}

static int map_largest(struct us_blocks *blocks, uint64_t limit) {
    for (uint64_t count = wanted_blocks(limit);; count /= 2) {
        blocks->mapped = bytes_with_description(count);
        blocks->map = mmap(NULL, blocks->mapped, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, blocks->fd, 0);
        if (blocks->map != MAP_FAILED) {
            blocks->count = (uint32_t)count;
            blocks->block = (struct us_block *)(blocks->map + count * US_BLOCK_BYTES);
            blocks->page_header = (uint64_t *)(blocks->map + blocks->mapped - headers_bytes(count));
            return 0;
        }
        if (errno != ENOMEM || count <= SMALLEST / US_BLOCK_BYTES)
            return -errno;
    }
}

int us_blocks_open(struct us_blocks *blocks, uint64_t limit) {
    *blocks = (struct us_blocks){.map = MAP_FAILED};
    blocks->fd = memfd_create("userswap-pool", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    int rc = blocks->fd < 0 ? -errno : map_largest(blocks, limit);
    if (!rc && (ftruncate(blocks->fd, (off_t)blocks->mapped) ||
                fcntl(blocks->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)))
        rc = -errno;
    if (rc) {
        us_blocks_close(blocks);
        return rc;
    }
    madvise(blocks->map, blocks->mapped, MADV_NOHUGEPAGE); /* a page given back must be gone, not zeroed inside a huge one */
    madvise(blocks->map, blocks->mapped, MADV_DONTDUMP);
    blocks->locked = !mlock2(blocks->map, blocks->mapped, MLOCK_ONFAULT);
    return 0;
}

void us_blocks_close(struct us_blocks *blocks) {
    if (blocks->map != MAP_FAILED)
        munmap(blocks->map, blocks->mapped);
    if (blocks->fd >= 0)
        close(blocks->fd);
}

int us_blocks_ready(const struct us_blocks *blocks, const void *start, uint64_t bytes) {
    uint64_t offset = (uint64_t)((const uint8_t *)start - blocks->map), first = offset & ~(uint64_t)(US_PAGE_BYTES - 1);
    uint64_t length = offset + bytes - first;
    if (!madvise(blocks->map + first, length, MADV_POPULATE_WRITE))
        return 0;
    if (errno != EINVAL) /* an older kernel: allocate here, let the mapping fault */
        return -ENOMEM;
    return fallocate(blocks->fd, 0, (off_t)first, (off_t)length) ? -ENOMEM : 0;
}

bool us_blocks_punch(const struct us_blocks *blocks, uint32_t number, uint32_t page, uint32_t pages) {
    off_t start = (off_t)number * US_BLOCK_BYTES + page * US_PAGE_BYTES;
    return !fallocate(blocks->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, (off_t)pages * US_PAGE_BYTES);
}

uint64_t us_blocks_held(const struct us_blocks *blocks) {
    struct stat now;
    return fstat(blocks->fd, &now) ? 0 : (uint64_t)now.st_blocks * 512;
}
