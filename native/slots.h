/* Where a pool keeps its objects: slots of fixed size classes in the blocks of blocks.h.
 *
 * A block belongs to one class while any slot of it is taken.  Its pages are made ready (allocated and mapped) a few at a
 * time from the front, so that a class with few objects holds few pages.  Every slot begins with an 8-byte header; the slots
 * that are whole pages have theirs in an array behind the blocks.
 *
 * Invariants:
 *  1. A header says FREE, BUSY (taken, its content not written yet) or the object; only FREE slots are taken, a BUSY one
 *     never moves.  The header is stored last (release), after the object's bytes.
 *  2. A block is in exactly one place: a list of its class, full (in no list), detached (one thread works on it with the lock
 *     dropped; others may give slots back but take none), the list of empty blocks, or unused.
 *  3. Content moves only in us_slots_compact, under the lock, and only after `relocate` took the one reference along.
 *
 * Locking: one mutex, held for list surgery and for the copy of one object; system calls are made without it.  Nothing here
 * knows codecs or pages' contents.
 */
#ifndef US_SLOTS_H
#define US_SLOTS_H
#include "blocks.h"
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#define US_SLOT_HEADER 8u
#define US_OBJECT_MAX 3624u  /* more is kept as a whole page: a slot for it would save less than a ninth */
#define US_SLOT_CLASSES 128u /* room for; the table has fewer */

/* header: length 13 | codec 2 | width of the byte shuffle / 4, 2 | slot of the owner 47; length 0 is no object */
#define US_HEADER_LENGTH 0x1fffull
#define US_HEADER_CODEC_SHIFT 13
#define US_HEADER_WIDTH_SHIFT 15
#define US_HEADER_SLOT_SHIFT 17
#define US_HEADER_BUSY (1ull << US_HEADER_CODEC_SHIFT) /* else, with length 0: FREE, next free slot in the slot bits */

enum us_list { US_LIST_SPARSE, US_LIST_FULLEST = 3, US_LIST_GROW, US_LISTS, US_LIST_NONE, US_LIST_GROWING, US_LIST_MOVING };

struct us_class {
    uint32_t size, slots;
    uint32_t head[US_LISTS];
    uint64_t blocks;
    uint64_t fit, used; /* slots whose pages are ready, and those taken */
};

/* 1: the reference at `slot` was swapped from `from` to `to`; 0: it was not, it may be in use. */
typedef int us_relocate_fn(void *owner, uint64_t slot, uint64_t from, uint64_t to);

struct us_slots {
    struct us_blocks blocks;
    uint8_t *page_header_ready; /* one for each page of blocks.page_header */
    uint64_t described;         /* bytes of blocks.block whose pages are ready */
    uint32_t given;             /* numbers 1 ... given - 1 were given out: handle 0 stays none */
    uint32_t unused, empty;     /* lists: no pages; ready pages but no object */
    uint64_t empty_pages;
    uint64_t held_pages, limit_pages; /* 0: no limit */
    uint64_t moved;
    pthread_mutex_t lock;
    uint32_t classes; /* the last one is the whole-page class */
    uint8_t class_of[US_OBJECT_MAX / US_SLOT_UNIT + 2];
    struct us_class class[US_SLOT_CLASSES];
};

/* Make the memfd and map it: 0 or -errno.  `limit` bounds the memory held (0: none). */
int us_slots_open(struct us_slots *slots, uint64_t limit);
void us_slots_close(struct us_slots *slots);

/* Take a slot for `length` bytes (> US_OBJECT_MAX: a whole page), with the lock held, which it drops and takes again where
 * pages have to be made ready: 0, -ENOSPC (limit), -ENOMEM.  The slot's header is BUSY. */
int us_slots_take(struct us_slots *slots, uint32_t length, uint64_t *handle);

/* Give a slot back; with the lock held.  May return memory, for which it drops the lock and takes it again. */
void us_slots_give(struct us_slots *slots, uint64_t handle);

/* Move objects out of sparse blocks, at most `most`, and give empty memory back: the number moved.  With
 * the lock held; it drops it between two objects. */
uint32_t us_slots_compact(struct us_slots *slots, uint32_t most, us_relocate_fn *relocate, void *owner);

/* The header of a handle's slot and its class; NULL where no slot can be.  Needs no lock. */
uint64_t *us_slots_find(const struct us_slots *slots, uint64_t handle, const struct us_class **class);

static inline uint8_t *us_slots_data(const struct us_slots *slots, const struct us_class *class, uint64_t handle) {
    uint8_t *slot = slots->blocks.map + handle * US_SLOT_UNIT;
    return class == &slots->class[slots->classes - 1] ? slot : slot + US_SLOT_HEADER;
}
static inline uint32_t us_header_length(uint64_t header) { return (uint32_t)(header & US_HEADER_LENGTH); }

#ifdef US_DEBUG
#include <stdio.h>
#include <stdlib.h>
#define US_POOL_ASSERT(true_here)                                                                    \
    do {                                                                                             \
        if (!(true_here)) {                                                                          \
            fprintf(stderr, "userswap: %s:%d: broken: %s\n", __FILE__, __LINE__, #true_here);        \
            abort();                                                                                 \
        }                                                                                            \
    } while (0)
#else
#define US_POOL_ASSERT(true_here) ((void)0)
#endif
#endif
