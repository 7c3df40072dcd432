#define _GNU_SOURCE
#include "slots.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define SLOT_MIN 32u
#define SLOT_END 0xffffu
#define UNITS (US_BLOCK_BYTES / US_SLOT_UNIT)
#define BLOCKS_A_HEADER_PAGE (US_PAGE_BYTES / sizeof(uint64_t) / US_BLOCK_PAGES)
#define FREED 0xdb /* fills what a debug build gave back */

/* ---- classes ---- */

static void list_classes(struct us_slots *slots) {
    uint32_t filled = 0, last = 0; /* `filled`: from here on class_of is to be set */
    for (uint32_t count = US_BLOCK_BYTES / SLOT_MIN; filled <= US_OBJECT_MAX + US_SLOT_HEADER; count--) {
        uint32_t size = US_BLOCK_BYTES / count / US_SLOT_UNIT * US_SLOT_UNIT;
        if (size == last)
            continue;
        last = size;
        struct us_class *class = &slots->class[slots->classes];
        *class = (struct us_class){.size = size, .slots = US_BLOCK_BYTES / size};
        for (; filled <= size && filled <= US_OBJECT_MAX + US_SLOT_HEADER; filled += US_SLOT_UNIT)
            slots->class_of[filled / US_SLOT_UNIT] = (uint8_t)slots->classes;
        slots->classes++;
    }
    US_POOL_ASSERT(slots->classes < US_SLOT_CLASSES);
    slots->class[slots->classes++] = (struct us_class){.size = US_PAGE_BYTES, .slots = US_BLOCK_PAGES};
}

static struct us_class *class_for(struct us_slots *slots, uint32_t length) {
    if (length > US_OBJECT_MAX)
        return &slots->class[slots->classes - 1];
    return &slots->class[slots->class_of[(length + US_SLOT_HEADER + US_SLOT_UNIT - 1) / US_SLOT_UNIT]];
}

static bool is_whole_page(const struct us_slots *slots, const struct us_class *class) {
    return class == &slots->class[slots->classes - 1];
}

static uint32_t fit(const struct us_class *class, const struct us_block *block) {
    return block->pages * US_PAGE_BYTES / class->size;
}

static uint64_t *header_at(const struct us_slots *slots, const struct us_class *class, uint32_t number, uint32_t index) {
    if (is_whole_page(slots, class))
        return &slots->blocks.page_header[(uint64_t)number * US_BLOCK_PAGES + index];
    return (uint64_t *)(slots->blocks.map + (uint64_t)number * US_BLOCK_BYTES + index * class->size);
}

static uint64_t handle_at(const struct us_class *class, uint32_t number, uint32_t index) {
    return (uint64_t)number * UNITS + index * class->size / US_SLOT_UNIT;
}

/* Atomic, because a put makes BUSY an object without the lock; neither is free. */
static bool is_free(const uint64_t *place) {
    uint64_t header = __atomic_load_n(place, __ATOMIC_RELAXED);
    return !us_header_length(header) && !(header & US_HEADER_BUSY);
}

uint64_t *us_slots_find(const struct us_slots *slots, uint64_t handle, const struct us_class **class) {
    uint64_t number = handle / UNITS;
    if (!number || number >= __atomic_load_n(&slots->given, __ATOMIC_RELAXED))
        return NULL;
    const struct us_block *block = &slots->blocks.block[number];
    *class = &slots->class[__atomic_load_n(&block->class, __ATOMIC_RELAXED)];
    uint32_t offset = (uint32_t)(handle % UNITS) * US_SLOT_UNIT, index = offset / (*class)->size;
    if (index * (*class)->size != offset || index >= __atomic_load_n(&block->fresh, __ATOMIC_RELAXED))
        return NULL;
    return header_at(slots, *class, (uint32_t)number, index);
}

/* ---- lists of blocks ---- */

static void unlink_block(struct us_slots *slots, struct us_class *class, uint32_t number) {
    struct us_block *block = &slots->blocks.block[number];
    if (block->list < US_LISTS) {
        if (block->previous)
            slots->blocks.block[block->previous].next = block->next;
        else
            class->head[block->list] = block->next;
        if (block->next)
            slots->blocks.block[block->next].previous = block->previous;
    }
    block->list = US_LIST_NONE;
}

static void push_block(struct us_slots *slots, uint32_t *head, uint32_t number) {
    slots->blocks.block[number].previous = 0;
    slots->blocks.block[number].next = *head;
    if (*head)
        slots->blocks.block[*head].previous = number;
    *head = number;
}

/* Put a block where its fullness belongs. */
static void list_block(struct us_slots *slots, struct us_class *class, uint32_t number) {
    struct us_block *block = &slots->blocks.block[number];
    uint32_t room = fit(class, block) - block->used, list = US_LIST_NONE;
    if (room)
        list = (uint32_t)block->used * 4 / class->slots;
    else if (fit(class, block) < class->slots)
        list = US_LIST_GROW;
    if (list == block->list)
        return;
    unlink_block(slots, class, number);
    block->list = (uint8_t)list;
    if (list != US_LIST_NONE)
        push_block(slots, &class->head[list], number);
}

/* ---- memory ---- */

/* Pages that may still be taken, at most `wanted`. */
static uint32_t grant(struct us_slots *slots, uint32_t wanted) {
    uint64_t left = UINT64_MAX;
    if (slots->limit_pages)
        left = slots->limit_pages > slots->held_pages ? slots->limit_pages - slots->held_pages : 0;
    uint32_t granted = left < wanted ? (uint32_t)left : wanted;
    slots->held_pages += granted;
    return granted;
}

/* A block number without pages; 0 with *rc set where there is none. */
static uint32_t new_number(struct us_slots *slots, int *rc) {
    uint32_t number = slots->unused;
    if (number) {
        slots->unused = slots->blocks.block[number].next;
        return number;
    }
    number = slots->given;
    *rc = -ENOSPC;
    if (number == slots->blocks.count)
        return 0;
    if ((number + 1ull) * sizeof(struct us_block) > slots->described) {
        if (!grant(slots, 1))
            return 0;
        *rc = us_blocks_ready(&slots->blocks, (uint8_t *)slots->blocks.block + slots->described, US_PAGE_BYTES);
        if (*rc) {
            slots->held_pages--;
            return 0;
        }
        slots->described += US_PAGE_BYTES;
    }
    __atomic_store_n(&slots->given, number + 1, __ATOMIC_RELAXED);
    return number;
}

static void retire(struct us_slots *slots, uint32_t number) {
    struct us_block *block = &slots->blocks.block[number];
    block->list = US_LIST_NONE;
    block->next = slots->unused;
    slots->unused = number;
}

/* Take an emptied block out of its class. */
static void set_empty(struct us_slots *slots, struct us_class *class, uint32_t number) {
    struct us_block *block = &slots->blocks.block[number];
    unlink_block(slots, class, number);
    class->fit -= fit(class, block);
    class->blocks--;
    __atomic_store_n(&block->fresh, 0, __ATOMIC_RELAXED);
    block->free = SLOT_END;
    if (!block->pages) {
        retire(slots, number);
        return;
    }
    slots->empty_pages += block->pages;
    block->next = slots->empty;
    slots->empty = number;
}

static uint32_t pop_empty(struct us_slots *slots) {
    uint32_t number = slots->empty;
    if (number) {
        slots->empty = slots->blocks.block[number].next;
        slots->empty_pages -= slots->blocks.block[number].pages;
    }
    return number;
}

/* Return empty blocks to the kernel until at most `keep` pages wait for reuse. */
static void return_memory(struct us_slots *slots, uint64_t keep) {
    while (slots->empty_pages > keep) {
        uint32_t number = pop_empty(slots);
        struct us_block *block = &slots->blocks.block[number];
        pthread_mutex_unlock(&slots->lock);
        bool gone = us_blocks_punch(&slots->blocks, number, 0, block->pages);
        pthread_mutex_lock(&slots->lock);
        if (gone) {
            slots->held_pages -= block->pages;
            block->pages = 0;
        }
        retire(slots, number);
    }
}

/* ---- taking and giving ---- */

/* Make ready what `number` needs to serve its class, with the lock dropped. */
static int grow_block(struct us_slots *slots, struct us_class *class, uint32_t number, uint32_t more) {
    struct us_block *block = &slots->blocks.block[number];
    uint32_t headers = number / BLOCKS_A_HEADER_PAGE;
    bool need_headers = is_whole_page(slots, class) && !slots->page_header_ready[headers];
    if (need_headers && !grant(slots, 1))
        return -ENOSPC;
    unlink_block(slots, class, number);
    block->list = US_LIST_GROWING;
    pthread_mutex_unlock(&slots->lock);
    int no_headers = need_headers ? us_blocks_ready(&slots->blocks, &slots->blocks.page_header[number * US_BLOCK_PAGES], 1) : 0;
    int rc = no_headers;
    if (!rc && more) {
        uint8_t *start = slots->blocks.map + (uint64_t)number * US_BLOCK_BYTES + block->pages * US_PAGE_BYTES;
        rc = us_blocks_ready(&slots->blocks, start, (uint64_t)more * US_PAGE_BYTES);
        if (rc) /* some of them may be there */
            us_blocks_punch(&slots->blocks, number, block->pages, more);
    }
    pthread_mutex_lock(&slots->lock);
    if (need_headers && (no_headers || slots->page_header_ready[headers]))
        slots->held_pages--; /* or another thread counted it */
    else if (need_headers)
        slots->page_header_ready[headers] = 1;
    if (!rc) {
        class->fit -= fit(class, block);
        block->pages += (uint8_t)more;
        class->fit += fit(class, block);
    }
    return rc;
}

/* A block of the class with a slot to take, from memory that is held already or new. */
static int find_room(struct us_slots *slots, struct us_class *class, uint32_t *number) {
    for (int list = US_LIST_FULLEST; list >= US_LIST_SPARSE; list--)
        if ((*number = class->head[list]))
            return 0;
    int rc = 0;
    uint32_t more = 0;
    bool joins = true;
    if (!(*number = pop_empty(slots))) {
        uint64_t wanted = 1 + class->blocks / 4; /* so that what waits unused stays in proportion */
        joins = !class->head[US_LIST_GROW];
        *number = joins ? new_number(slots, &rc) : class->head[US_LIST_GROW];
        if (!*number)
            return rc;
        uint32_t missing = US_BLOCK_PAGES - slots->blocks.block[*number].pages;
        more = grant(slots, wanted < missing ? (uint32_t)wanted : missing);
        rc = more || !missing ? 0 : -ENOSPC;
    }
    struct us_block *block = &slots->blocks.block[*number];
    if (joins) {
        uint8_t pages = block->pages;
        *block = (struct us_block){.free = SLOT_END, .pages = pages, .list = US_LIST_NONE};
        __atomic_store_n(&block->class, (uint8_t)(class - slots->class), __ATOMIC_RELAXED);
        class->fit += fit(class, block);
        class->blocks++;
    }
    if (!rc)
        rc = grow_block(slots, class, *number, more);
    if (rc) {
        slots->held_pages -= more;
        if (block->used)
            list_block(slots, class, *number);
        else
            set_empty(slots, class, *number);
    }
    return rc;
}

static uint64_t pop_slot(struct us_slots *slots, struct us_class *class, uint32_t number) {
    struct us_block *block = &slots->blocks.block[number];
    uint32_t index = block->free;
    if (index != SLOT_END) {
        uint64_t *header = header_at(slots, class, number, index);
        US_POOL_ASSERT(is_free(header));
        block->free = (uint16_t)(*header >> US_HEADER_SLOT_SHIFT);
#ifdef US_DEBUG
        uint8_t *data = us_slots_data(slots, class, handle_at(class, number, index));
        for (uint32_t i = 0; i < class->size - US_SLOT_HEADER; i++)
            US_POOL_ASSERT(data[i] == FREED);
#endif
    } else {
        index = block->fresh;
        US_POOL_ASSERT(index < fit(class, block));
        __atomic_store_n(&block->fresh, (uint16_t)(index + 1), __ATOMIC_RELAXED);
    }
    __atomic_store_n(header_at(slots, class, number, index), US_HEADER_BUSY, __ATOMIC_RELAXED);
    block->used++;
    class->used++;
    list_block(slots, class, number);
    return handle_at(class, number, index);
}

int us_slots_take(struct us_slots *slots, uint32_t length, uint64_t *handle) {
    struct us_class *class = class_for(slots, length);
    uint32_t number;
    int rc = find_room(slots, class, &number);
    if (!rc)
        *handle = pop_slot(slots, class, number);
    return rc;
}

/* Mark one slot free; the block's place in the lists is for the caller to settle. */
static void drop_slot(struct us_slots *slots, struct us_class *class, uint32_t number, uint32_t index) {
    struct us_block *block = &slots->blocks.block[number];
    uint64_t *header = header_at(slots, class, number, index), next = SLOT_END;
    US_POOL_ASSERT(!is_free(header));
#ifdef US_DEBUG
    memset(us_slots_data(slots, class, handle_at(class, number, index)), FREED, class->size - US_SLOT_HEADER);
#endif
    if (block->list != US_LIST_MOVING) { /* whoever moves its objects makes the list anew */
        next = block->free;
        block->free = (uint16_t)index;
    }
    __atomic_store_n(header, next << US_HEADER_SLOT_SHIFT, __ATOMIC_RELAXED);
    block->used--;
    class->used--;
}

void us_slots_give(struct us_slots *slots, uint64_t handle) {
    uint32_t number = (uint32_t)(handle / UNITS);
    struct us_block *block = &slots->blocks.block[number];
    struct us_class *class = &slots->class[block->class];
    drop_slot(slots, class, number, (uint32_t)(handle % UNITS) * US_SLOT_UNIT / class->size);
    if (block->list == US_LIST_GROWING || block->list == US_LIST_MOVING)
        return;
    if (block->used) {
        list_block(slots, class, number);
        return;
    }
    set_empty(slots, class, number);
    /* What leaves is usually followed by as much that comes: keep a little, making pages ready again is dear. */
    return_memory(slots, 4 * US_BLOCK_PAGES + slots->held_pages / 128);
}

/* ---- compaction ---- */

/* The class that wastes most, if it wastes enough to be worth copying; those in `tried` are out. */
static struct us_class *worst_class(struct us_slots *slots, const bool *tried) {
    struct us_class *worst = NULL;
    uint64_t most = 0;
    for (uint32_t i = 0; i < slots->classes; i++) {
        struct us_class *class = &slots->class[i];
        uint64_t spare = (class->fit - class->used) * class->size;
        if (!tried[i] && spare > US_PAGE_BYTES + class->fit * class->size / 32 && spare > most) {
            most = spare;
            worst = class;
        }
    }
    return worst;
}

static uint32_t sparsest_block(const struct us_slots *slots, const struct us_class *class) {
    uint32_t best = 0;
    for (uint32_t list = US_LIST_SPARSE; list <= US_LIST_FULLEST && !best; list++) {
        uint32_t number = class->head[list];
        for (uint32_t seen = 0; number && seen < 16; seen++, number = slots->blocks.block[number].next)
            if (!best || slots->blocks.block[number].used < slots->blocks.block[best].used)
                best = number;
    }
    return best;
}

/* A place for an object of the block `from`, at `index`: in a fuller block, or nearer to its own block's front. */
static uint64_t find_target(struct us_slots *slots, struct us_class *class, uint32_t from, uint32_t index, uint32_t *low) {
    for (int list = US_LIST_FULLEST; list >= US_LIST_SPARSE; list--)
        if (class->head[list])
            return pop_slot(slots, class, class->head[list]);
    for (; *low < index; ++*low) {
        uint64_t *header = header_at(slots, class, from, *low);
        if (is_free(header)) {
            __atomic_store_n(header, US_HEADER_BUSY, __ATOMIC_RELAXED);
            slots->blocks.block[from].used++;
            class->used++;
            return handle_at(class, from, *low);
        }
    }
    return 0;
}

/* Copy one object and swap its reference; whichever copy is not referenced then is given back. */
static bool move_object(struct us_slots *slots, struct us_class *class, uint64_t header, uint64_t from, uint64_t to,
                        us_relocate_fn *relocate, void *owner) {
    uint32_t number = (uint32_t)(to / UNITS), index = (uint32_t)(to % UNITS) * US_SLOT_UNIT / class->size;
    memcpy(us_slots_data(slots, class, to), us_slots_data(slots, class, from), us_header_length(header));
    __atomic_store_n(header_at(slots, class, number, index), header, __ATOMIC_RELEASE);
    bool moved = relocate(owner, header >> US_HEADER_SLOT_SHIFT, from, to) == 1;
    us_slots_give(slots, moved ? from : to);
    return moved;
}

/* After the objects moved: return the pages behind the last one, list the free slots again from the front. */
static void settle_block(struct us_slots *slots, struct us_class *class, uint32_t number) {
    struct us_block *block = &slots->blocks.block[number];
    uint32_t end = block->fresh;
    while (end && is_free(header_at(slots, class, number, end - 1)))
        end--;
    __atomic_store_n(&block->fresh, (uint16_t)end, __ATOMIC_RELAXED);
    uint32_t keep = (end * class->size + US_PAGE_BYTES - 1) / US_PAGE_BYTES, surplus = block->pages - keep;
    if (end && surplus) {
        pthread_mutex_unlock(&slots->lock);
        bool gone = us_blocks_punch(&slots->blocks, number, keep, surplus);
        pthread_mutex_lock(&slots->lock);
        if (gone) {
            class->fit -= fit(class, block);
            block->pages = (uint8_t)keep;
            class->fit += fit(class, block);
            slots->held_pages -= surplus;
        }
    }
    block->free = SLOT_END;
    for (uint32_t index = block->fresh; index-- > 0;) {
        uint64_t *header = header_at(slots, class, number, index);
        if (is_free(header)) {
            __atomic_store_n(header, (uint64_t)block->free << US_HEADER_SLOT_SHIFT, __ATOMIC_RELAXED);
            block->free = (uint16_t)index;
        }
    }
    if (block->used)
        list_block(slots, class, number);
    else
        set_empty(slots, class, number);
}

/* Empty one block as far as its objects and `most` allow: the number moved. */
static uint32_t evacuate(struct us_slots *slots, struct us_class *class, uint32_t number, uint32_t most,
                         us_relocate_fn *relocate, void *owner) {
    struct us_block *block = &slots->blocks.block[number];
    uint32_t moved = 0, low = 0;
    unlink_block(slots, class, number);
    block->list = US_LIST_MOVING;
    for (uint32_t index = block->fresh; index-- > 0 && moved < most;) {
        uint64_t *place = header_at(slots, class, number, index);
        uint64_t header = __atomic_load_n(place, __ATOMIC_ACQUIRE);
        if (!us_header_length(header))
            continue;
        uint64_t to = find_target(slots, class, number, index, &low);
        if (!to)
            break;
        moved += move_object(slots, class, header, handle_at(class, number, index), to, relocate, owner);
        pthread_mutex_unlock(&slots->lock); /* a fault may be waiting */
        pthread_mutex_lock(&slots->lock);
    }
    settle_block(slots, class, number);
    return moved;
}

uint32_t us_slots_compact(struct us_slots *slots, uint32_t most, us_relocate_fn *relocate, void *owner) {
    bool tried[US_SLOT_CLASSES] = {false};
    uint32_t moved = 0;
    while (relocate && moved < most) {
        struct us_class *class = worst_class(slots, tried);
        uint32_t number = class ? sparsest_block(slots, class) : 0;
        if (!class)
            break;
        uint64_t before = class->fit;
        if (number)
            moved += evacuate(slots, class, number, most - moved, relocate, owner);
        tried[class - slots->class] = class->fit >= before; /* no page came free: pinned, or a thread grew it */
    }
    slots->moved += moved;
    return_memory(slots, 0);
    return moved;
}

/* ---- beginning and end ---- */

int us_slots_open(struct us_slots *slots, uint64_t limit) {
    *slots = (struct us_slots){.given = 1, .limit_pages = limit / US_PAGE_BYTES + (limit && limit < US_PAGE_BYTES)};
    list_classes(slots);
    int rc = us_blocks_open(&slots->blocks, limit);
    if (rc)
        return rc;
    slots->page_header_ready = calloc(slots->blocks.count / BLOCKS_A_HEADER_PAGE + 1, 1);
    if (!slots->page_header_ready) {
        us_blocks_close(&slots->blocks);
        return -ENOMEM;
    }
    pthread_mutexattr_t kind;
    pthread_mutexattr_init(&kind);
    pthread_mutexattr_settype(&kind, PTHREAD_MUTEX_ADAPTIVE_NP); /* held for less than a sleep costs */
    pthread_mutex_init(&slots->lock, &kind);
    pthread_mutexattr_destroy(&kind);
    return 0;
}

void us_slots_close(struct us_slots *slots) {
    us_blocks_close(&slots->blocks);
    free(slots->page_header_ready);
    pthread_mutex_destroy(&slots->lock);
}
