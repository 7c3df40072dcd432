#include "shuffle.h"
#include "codec.h"
#include <string.h>

#ifndef __clang__
#pragma GCC optimize("O3") /* groups of vectors stay in registers only where all loops over them are unrolled */
#endif

#define LANES 16u
#define GROUP 8u /* vectors: as many as the words of the wider width have bytes */
#define RUN_BYTES 3u /* that a change of value costs a run-length code */
#define PLANE_BYTES 10u /* that a plane costs which never changes */
#define SAMPLED 4u /* one vector in so many is looked at */

typedef uint8_t vector __attribute__((vector_size(LANES)));

#define LOW_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#ifdef __clang__
#define ZIP(a, b, halves) __builtin_shufflevector(a, b, halves)
#else
#define ZIP(a, b, halves) __builtin_shuffle(a, b, (vector){halves})
#endif

/* Zip the first half of a group of vectors with its second: the byte at i goes where the bits of i, rotated left by one, say.
 * Where i is (plane, place) that many rotations make it (place, plane), and the other way round. */
static inline __attribute__((always_inline)) void zip(vector *group, unsigned rotations) {
    vector zipped[GROUP];
    for (unsigned round = 0; round < rotations; round++) {
        for (unsigned i = 0; i < GROUP / 2; i++) {
            zipped[2 * i] = ZIP(group[i], group[i + GROUP / 2], LOW_HALVES);
            zipped[2 * i + 1] = ZIP(group[i], group[i + GROUP / 2], HIGH_HALVES);
        }
        memcpy(group, zipped, sizeof zipped);
    }
}

/* A group holds GROUP * LANES bytes of words, which are `strip` bytes of each plane. */
static inline __attribute__((always_inline)) void spread(unsigned width, unsigned bits, const uint8_t *words,
                                                         uint8_t *planes) {
    const unsigned strip = GROUP * LANES / width, plane = US_CODEC_PAGE / width;
    vector group[GROUP];
    for (unsigned at = 0; at < US_CODEC_PAGE; at += GROUP * LANES, planes += strip) {
        memcpy(group, words + at, sizeof group);
        zip(group, 7 - bits);
        for (unsigned i = 0; i < width; i++)
            memcpy(planes + i * plane, (const uint8_t *)group + i * strip, strip);
    }
}

static inline __attribute__((always_inline)) void gather(unsigned width, unsigned bits, const uint8_t *planes,
                                                         uint8_t *words) {
    const unsigned strip = GROUP * LANES / width, plane = US_CODEC_PAGE / width;
    vector group[GROUP];
    for (unsigned at = 0; at < US_CODEC_PAGE; at += GROUP * LANES, planes += strip) {
        for (unsigned i = 0; i < width; i++)
            memcpy((uint8_t *)group + i * strip, planes + i * plane, strip);
        zip(group, bits);
        memcpy(words + at, group, sizeof group);
    }
}

void us_shuffle(int width, const void *page, void *out) {
    if (width == 4)
        spread(4, 2, page, out);
    else
        spread(8, 3, page, out);
}

void us_unshuffle(int width, const void *shuffled, void *page) {
    if (width == 4)
        gather(4, 2, shuffled, page);
    else
        gather(8, 3, shuffled, page);
}

/* How often, in the vectors looked at, each byte of a word is what it is in the next word. */
static inline __attribute__((always_inline)) vector repeats(unsigned width, const uint8_t *page) {
    vector now, next, count = {0};
    for (unsigned at = 0; at < US_CODEC_PAGE; at += SAMPLED * LANES) {
        memcpy(&now, page + at, LANES);
        memcpy(&next, page + at + width, LANES);
        count -= (vector)(now == next);
    }
    return count;
}

static uint32_t estimate(unsigned width, vector count) {
    const uint32_t plane = US_CODEC_PAGE / width, pairs = plane / SAMPLED;
    uint32_t bytes = 0;
    for (unsigned i = 0; i < width; i++) {
        uint32_t same = 0;
        for (unsigned lane = i; lane < LANES; lane += width)
            same += count[lane];
        uint32_t needed = PLANE_BYTES + RUN_BYTES * SAMPLED * (pairs - same);
        bytes += needed < plane ? needed : plane;
    }
    return bytes;
}

uint32_t us_shuffle_estimate(const void *page, int *width) {
    uint32_t of_four = estimate(4, repeats(4, page)), of_eight = estimate(8, repeats(8, page));
    *width = of_four < of_eight ? 4 : 8;
    return of_four < of_eight ? of_four : of_eight;
}
