#include "crc32c.h"
#include <pthread.h>
#include <string.h>

#define POLYNOMIAL 0x82f63b78u /* bits reversed: the lowest is the highest power */
#define SLICES 8u
#define LANE 1360u /* bytes; three lanes are a page but for 16 bytes */

static uint32_t tables[SLICES][256]; /* [n][b]: byte b with n zero bytes after it */
static uint32_t past_lane[4][256];   /* [n][b]: byte n of a checksum, b, with LANE zero bytes after it */
static pthread_once_t tables_once = PTHREAD_ONCE_INIT;

static void make_tables(void) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (unsigned bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? POLYNOMIAL : 0);
        tables[0][byte] = crc;
    }
    for (unsigned n = 1; n < SLICES; n++)
        for (uint32_t byte = 0; byte < 256; byte++)
            tables[n][byte] = tables[n - 1][byte] >> 8 ^ tables[0][tables[n - 1][byte] & 0xff];
    for (unsigned bit = 0; bit < 32; bit++) {
        uint32_t crc = 1u << bit;
        for (unsigned zero = 0; zero < LANE; zero++)
            crc = crc >> 8 ^ tables[0][crc & 0xff];
        for (unsigned byte = 1u << bit % 8, low = 0; low < byte; low++) /* what has this bit is the sum of it and the rest */
            past_lane[bit / 8][byte + low] = crc ^ past_lane[bit / 8][low];
    }
}

uint32_t us_crc32c_tables(uint32_t crc, const void *data, size_t length) {
    const uint8_t *at = data, *const end = at + length;
    pthread_once(&tables_once, make_tables);
    crc = ~crc;
    for (; (size_t)(end - at) >= SLICES; at += SLICES) {
        uint32_t first = crc ^ ((uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24);
        crc = tables[7][first & 0xff] ^ tables[6][first >> 8 & 0xff] ^ tables[5][first >> 16 & 0xff] ^
              tables[4][first >> 24] ^ tables[3][at[4]] ^ tables[2][at[5]] ^ tables[1][at[6]] ^ tables[0][at[7]];
    }
    for (; at < end; at++)
        crc = crc >> 8 ^ tables[0][(crc ^ *at) & 0xff];
    return ~crc;
}

#ifdef __x86_64__
static uint32_t shift(uint64_t crc) {
    return past_lane[0][crc & 0xff] ^ past_lane[1][crc >> 8 & 0xff] ^ past_lane[2][crc >> 16 & 0xff] ^ past_lane[3][crc >> 24];
}

/* The instruction takes three cycles, and one can begin in each: three parts at once, joined afterwards. */
__attribute__((target("sse4.2"))) static uint64_t three_lanes(uint64_t first, const uint8_t *at) {
    uint64_t words[3], second = 0, third = 0;
    for (const uint8_t *const end = at + LANE; at < end; at += sizeof *words) {
        for (unsigned lane = 0; lane < 3; lane++)
            memcpy(&words[lane], at + lane * LANE, sizeof *words);
        first = __builtin_ia32_crc32di(first, words[0]);
        second = __builtin_ia32_crc32di(second, words[1]);
        third = __builtin_ia32_crc32di(third, words[2]);
    }
    return shift(shift(first) ^ second) ^ third;
}

__attribute__((target("sse4.2"))) static uint32_t by_instruction(uint32_t crc, const void *data, size_t length) {
    const uint8_t *at = data, *const end = at + length;
    uint64_t word, wide = (uint32_t)~crc;
    if (length >= 3 * LANE)
        pthread_once(&tables_once, make_tables);
    for (; (size_t)(end - at) >= 3 * LANE; at += 3 * LANE)
        wide = three_lanes(wide, at);
    for (; (size_t)(end - at) >= sizeof word; at += sizeof word) {
        memcpy(&word, at, sizeof word);
        wide = __builtin_ia32_crc32di(wide, word);
    }
    uint32_t narrow = (uint32_t)wide;
    for (; at < end; at++)
        narrow = __builtin_ia32_crc32qi(narrow, *at);
    return ~narrow;
}

uint32_t us_crc32c(uint32_t crc, const void *data, size_t length) {
    return __builtin_cpu_supports("sse4.2") ? by_instruction(crc, data, length) : us_crc32c_tables(crc, data, length);
}
#else
uint32_t us_crc32c(uint32_t crc, const void *data, size_t length) {
    return us_crc32c_tables(crc, data, length);
}
#endif
