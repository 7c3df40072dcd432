/* The page table of one client: a memfd that outlives the pager, and says what it is by itself.
 *
 *     header | root: an entry for 8192 pages | nodes of 512 bytes: branches of 128 entries, leaves of 64 words
 *
 * Nodes are made when the first of their pages is touched; without a leaf all its 64 pages are ZERO.  Nodes of one region stand
 * densely, in the order they were made, so that touches scattered over a terabyte share pages of the table.  A region is an
 * extent of slots; what its nodes can ever take is set aside for it in the file (which is sparse): there is no list of free
 * nodes, and closing gives back one range.
 *
 * A node stays where it is until its extent is closed: a pointer to a word is good that long.
 */
#ifndef US_TABLE_H
#define US_TABLE_H
#include "word.h"
#include <pthread.h>

#define US_TABLE_SLOTS (1ull << 32) /* pages of one client, all regions together: 16 TiB */
#define US_LEAF_PAGES 64u
#define US_BRANCH_LEAVES 128u
#define US_BRANCH_PAGES (US_LEAF_PAGES * US_BRANCH_LEAVES) /* extents start on a multiple: no branch has two owners */
#define US_BRANCH_NODES 136u /* set aside for a branch and its leaves: whole pages */
#define US_NODE_BYTES 512u
#define US_NODES_MAX (1u << 27) /* a power of two, at least US_BRANCH_NODES for each branch */
#define US_TABLE_MAGIC 0x3130626174777375ull /* "uswtab01" */

_Static_assert(US_TABLE_SLOTS / US_BRANCH_PAGES * US_BRANCH_NODES <= US_NODES_MAX, "room for every node");
_Static_assert(US_BRANCH_NODES > US_BRANCH_LEAVES, "room for the branch itself");

struct us_table_header { /* at offset 0 of the memfd */
    uint64_t magic, bytes, slots, root_offset, nodes_offset;
    uint32_t leaf_pages, branch_leaves, branch_nodes, node_bytes;
};
_Static_assert(sizeof(struct us_table_header) == 56, "us_table_header crosses processes");

/* What stands in the root and in branches: 1 + the node's number; 0: none. */
typedef _Atomic uint32_t us_entry;

struct us_table {
    int fd;
    void *map;
    us_entry *root;
    uint8_t *node; /* node 0 */
};

struct us_extent {
    struct us_table *table;
    uint64_t base, pages; /* slots of the table */
    _Atomic uint32_t made;  /* nodes; changed under the lock */
    _Atomic uint32_t ready; /* nodes for which there is memory, as far as us_extent_prepare knows */
    pthread_mutex_t lock;
};

int us_table_open(struct us_table *table);
void us_table_close(struct us_table *table);
uint64_t us_table_bytes(const struct us_table *table);

int us_extent_open(struct us_extent *extent, struct us_table *table, uint64_t base, uint64_t pages);
void us_extent_close(struct us_extent *extent);
us_word *us_extent_make(struct us_extent *extent, uint64_t index);
uint64_t us_extent_made(const struct us_extent *extent);
bool us_extent_is_low(const struct us_extent *extent);
void us_extent_prepare(struct us_extent *extent);
/* The first page at or after `index` that has a leaf; at least `pages`: there is none. */
uint64_t us_extent_from(const struct us_extent *extent, uint64_t index);

/* The one after `page`, which has a leaf. */
static inline uint64_t us_extent_next(const struct us_extent *extent, uint64_t page) {
    return (page + 1) % US_LEAF_PAGES ? page + 1 : us_extent_from(extent, page + 1);
}

/* The client can write to the memfd too: whatever an entry says, the node lies in the table. */
static inline void *us_table_node(const struct us_table *table, uint32_t entry) {
    return table->node + (uint64_t)((entry - 1) & (US_NODES_MAX - 1)) * US_NODE_BYTES;
}

/* NULL: no leaf. */
static inline us_word *us_table_peek(const struct us_table *table, uint64_t slot) {
    uint32_t entry = atomic_load_explicit(&table->root[slot / US_BRANCH_PAGES], memory_order_acquire);
    if (__builtin_expect(!entry, 0))
        return NULL;
    us_entry *branch = us_table_node(table, entry);
    entry = atomic_load_explicit(&branch[slot / US_LEAF_PAGES % US_BRANCH_LEAVES], memory_order_acquire);
    if (__builtin_expect(!entry, 0))
        return NULL;
    return (us_word *)us_table_node(table, entry) + slot % US_LEAF_PAGES;
}

static inline us_word *us_extent_peek(const struct us_extent *extent, uint64_t index) {
    return us_table_peek(extent->table, extent->base + index);
}
#endif
