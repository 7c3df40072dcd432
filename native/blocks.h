/* The memory under a pool: one sealed, sparse memfd of 64 KiB blocks, with what describes them behind them.
 *
 * It is mapped whole at the largest size that handles and the process's limits allow, locked (as pages come) where
 * RLIMIT_MEMLOCK allows, and holds memory only where us_blocks_ready asked for it, so that no store through the mapping can hit
 * a page that the kernel cannot allocate: that would be SIGBUS, not an error.  Nothing here knows what blocks are used for.
 */
#ifndef US_BLOCKS_H
#define US_BLOCKS_H
#include <stdbool.h>
#include <stdint.h>

#define US_PAGE_BYTES 4096u
#define US_BLOCK_BYTES 65536u
#define US_BLOCK_PAGES (US_BLOCK_BYTES / US_PAGE_BYTES)
#define US_SLOT_UNIT 16u /* handles count in these */
#define US_HANDLE_LIMIT (1ull << 35)

struct us_block { /* in the memfd, so that whoever holds it can tell what the blocks hold */
    uint32_t next, previous;
    uint16_t used;
    uint16_t fresh; /* slots from here on were not used since the block joined its class */
    uint16_t free;  /* first of the list of FREE slots */
    uint8_t class;
    uint8_t pages; /* ready, from the front */
    uint8_t list;
    uint8_t unused[3];
};

struct us_blocks {
    uint8_t *map;
    struct us_block *block;
    uint64_t *page_header; /* one for each page of every block: the headers of whole-page slots */
    uint64_t mapped;
    uint32_t count;
    int fd;
    bool locked;
};

/* 0 or -errno; `limit` (0: none) is the memory that it will be asked to hold. */
int us_blocks_open(struct us_blocks *blocks, uint64_t limit);
void us_blocks_close(struct us_blocks *blocks);

/* Allocate and map the pages of [start, start + bytes): 0 or -ENOMEM, after which some of them may be there. */
int us_blocks_ready(const struct us_blocks *blocks, const void *start, uint64_t bytes);

/* Return pages of a block to the kernel: whether it took them. */
bool us_blocks_punch(const struct us_blocks *blocks, uint32_t number, uint32_t page, uint32_t pages);

/* Memory held, as the kernel counts it. */
uint64_t us_blocks_held(const struct us_blocks *blocks);
#endif
