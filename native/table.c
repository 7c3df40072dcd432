#define _GNU_SOURCE
#include "table.h"
#include "uapi.h"
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define ROOT_ENTRIES (US_TABLE_SLOTS / US_BRANCH_PAGES)
#define ROOT_OFFSET US_PAGE
#define NODES_OFFSET (ROOT_OFFSET + ROOT_ENTRIES * sizeof(us_entry))
#define TABLE_BYTES (NODES_OFFSET + (uint64_t)US_NODES_MAX * US_NODE_BYTES)
#define NODES_A_PAGE (US_PAGE / US_NODE_BYTES)
#define READY_SHARE 8u  /* of the nodes made, one in so many is made ready ahead: what lies idle stays in proportion */
#define READY_MAX 512u  /* nodes */

_Static_assert(US_LEAF_PAGES * sizeof(us_word) == US_NODE_BYTES, "a leaf is a node");
_Static_assert(US_BRANCH_LEAVES * sizeof(us_entry) == US_NODE_BYTES, "a branch is a node");
_Static_assert(US_BRANCH_NODES % NODES_A_PAGE == 0 && NODES_OFFSET % US_PAGE == 0, "extents share no page of nodes");

int us_table_open(struct us_table *table) {
    *table = (struct us_table){.fd = memfd_create("userswap-table", MFD_CLOEXEC | MFD_ALLOW_SEALING)};
    if (table->fd < 0)
        return -errno;
    void *map = MAP_FAILED;
    if (!ftruncate(table->fd, (off_t)TABLE_BYTES) &&
        !fcntl(table->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
        map = mmap(NULL, TABLE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, table->fd, 0);
    if (map == MAP_FAILED) {
        int error = errno;
        close(table->fd);
        table->fd = -1;
        return -error;
    }
    table->map = map;
    table->root = (us_entry *)((uint8_t *)map + ROOT_OFFSET);
    table->node = (uint8_t *)map + NODES_OFFSET;
    *(struct us_table_header *)map = (struct us_table_header){
        .magic = US_TABLE_MAGIC,
        .bytes = TABLE_BYTES,
        .slots = US_TABLE_SLOTS,
        .root_offset = ROOT_OFFSET,
        .nodes_offset = NODES_OFFSET,
        .leaf_pages = US_LEAF_PAGES,
        .branch_leaves = US_BRANCH_LEAVES,
        .branch_nodes = US_BRANCH_NODES,
        .node_bytes = US_NODE_BYTES,
    };
    return 0;
}

void us_table_close(struct us_table *table) {
    if (!table->map)
        return;
    munmap(table->map, TABLE_BYTES);
    close(table->fd);
    *table = (struct us_table){.fd = -1};
}

/* Memory that the table takes, of all regions. */
uint64_t us_table_bytes(const struct us_table *table) {
    struct stat status;
    return fstat(table->fd, &status) ? 0 : (uint64_t)status.st_blocks * 512;
}

int us_extent_open(struct us_extent *extent, struct us_table *table, uint64_t base, uint64_t pages) {
    if (!pages || base % US_BRANCH_PAGES || base > US_TABLE_SLOTS || pages > US_TABLE_SLOTS - base)
        return -EINVAL;
    *extent = (struct us_extent){.table = table, .base = base, .pages = pages};
    return -pthread_mutex_init(&extent->lock, NULL);
}

static uint64_t branches(const struct us_extent *extent) {
    return (extent->pages + US_BRANCH_PAGES - 1) / US_BRANCH_PAGES;
}

static uint64_t first_node(const struct us_extent *extent) {
    return extent->base / US_BRANCH_PAGES * US_BRANCH_NODES;
}

/* What is set aside in the file. */
static uint64_t room_of(const struct us_extent *extent) { return branches(extent) * US_BRANCH_NODES; }

/* The node behind an entry, made if there is none. */
static void *node_behind(struct us_extent *extent, us_entry *entry) {
    uint32_t seen = atomic_load_explicit(entry, memory_order_acquire);
    if (!seen) {
        /* the remainder matters only where the client has cleared entries: it then harms its own pages alone */
        uint32_t made = atomic_fetch_add_explicit(&extent->made, 1, memory_order_relaxed);
        seen = (uint32_t)(first_node(extent) + made % room_of(extent)) + 1;
        atomic_store_explicit(entry, seen, memory_order_release);
    }
    return us_table_node(extent->table, seen);
}

/* A lock, and not a race of two threads for the entry: once for 64 pages it costs nothing, and it leaves no node over. */
us_word *us_extent_make(struct us_extent *extent, uint64_t index) {
    uint64_t slot = extent->base + index;
    pthread_mutex_lock(&extent->lock);
    us_entry *branch = node_behind(extent, &extent->table->root[slot / US_BRANCH_PAGES]);
    us_word *leaf = node_behind(extent, &branch[slot / US_LEAF_PAGES % US_BRANCH_LEAVES]);
    pthread_mutex_unlock(&extent->lock);
    return leaf + slot % US_LEAF_PAGES;
}

uint64_t us_extent_made(const struct us_extent *extent) { return atomic_load(&extent->made); }

static uint32_t ahead_of(uint32_t made) {
    uint32_t ahead = made / READY_SHARE / NODES_A_PAGE * NODES_A_PAGE;
    return ahead < READY_MAX ? ahead : READY_MAX;
}

/* Whether us_extent_prepare is due. */
bool us_extent_is_low(const struct us_extent *extent) {
    uint32_t made = atomic_load_explicit(&extent->made, memory_order_relaxed);
    return made + ahead_of(made) / 2 > atomic_load_explicit(&extent->ready, memory_order_relaxed) && ahead_of(made);
}

/* Get memory for the next nodes, so that no fault waits while the kernel clears it.  Where there is none nothing is lost: the
 * touch of the node asks again. */
void us_extent_prepare(struct us_extent *extent) {
    uint64_t made = atomic_load(&extent->made), page = (made + NODES_A_PAGE - 1) / NODES_A_PAGE * NODES_A_PAGE;
    uint64_t end = page + ahead_of((uint32_t)made), room = room_of(extent), ready = atomic_load(&extent->ready);
    uint64_t from = ready > page ? ready : page, to = end < room ? end : room;
    if (from < to)
        madvise(extent->table->node + (first_node(extent) + from) * US_NODE_BYTES, (to - from) * US_NODE_BYTES, MADV_POPULATE_WRITE);
    atomic_store(&extent->ready, (uint32_t)end);
}

uint64_t us_extent_from(const struct us_extent *extent, uint64_t index) {
    const struct us_table *table = extent->table;
    while (index < extent->pages) {
        uint64_t slot = extent->base + index;
        uint32_t entry = atomic_load_explicit(&table->root[slot / US_BRANCH_PAGES], memory_order_acquire);
        const us_entry *branch = entry ? us_table_node(table, entry) : NULL;
        for (uint64_t i = slot / US_LEAF_PAGES % US_BRANCH_LEAVES; branch && i < US_BRANCH_LEAVES; i++) {
            if (atomic_load_explicit(&branch[i], memory_order_acquire))
                return index;
            index = (index / US_LEAF_PAGES + 1) * US_LEAF_PAGES;
        }
        if (!branch)
            index = (index / US_BRANCH_PAGES + 1) * US_BRANCH_PAGES;
    }
    return index;
}

static bool punch(const struct us_table *table, uint64_t from, uint64_t to) {
    return from >= to || !fallocate(table->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)from, (off_t)(to - from));
}

/* Gives the memory of the nodes and of the root back.  Nobody uses a word of the extent any more. */
void us_extent_close(struct us_extent *extent) {
    struct us_table *table = extent->table;
    uint64_t root = extent->base / US_BRANCH_PAGES, root_end = root + branches(extent);
    uint64_t node = first_node(extent), room = room_of(extent), made = atomic_load(&extent->made);
    for (uint64_t i = root; i < root_end; i++)
        if (atomic_load(&table->root[i])) /* reading fills no more than 4 bytes for 8192 pages */
            atomic_store(&table->root[i], 0);
    /* the next extent here must find zeros, whatever becomes of the memory */
    if (!punch(table, NODES_OFFSET + node * US_NODE_BYTES, NODES_OFFSET + (node + room) * US_NODE_BYTES))
        memset(table->node + node * US_NODE_BYTES, 0, (made < room ? made : room) * US_NODE_BYTES);
    /* whole pages only: neighbours' entries may share the first and the last */
    uint64_t from = ROOT_OFFSET + root * sizeof(us_entry), to = ROOT_OFFSET + root_end * sizeof(us_entry);
    punch(table, (from + US_PAGE - 1) / US_PAGE * US_PAGE, to / US_PAGE * US_PAGE);
    pthread_mutex_destroy(&extent->lock);
}
