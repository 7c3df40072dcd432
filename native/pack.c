#include "pack.h"
#include "codec.h"
#include "shuffle.h"
#include <errno.h>
#include <string.h>

#define KIND_MASK ((1u << US_VALUE_WIDTH_SHIFT) - 1)
#define SHORT_ENOUGH 512u /* no shuffle is tried on what is this short without it */
#define NOT_RANDOM (US_CODEC_PAGE * 15 / 16)

_Static_assert(US_CODECS <= US_VALUE_SAME, "kinds");
_Static_assert(US_CODEC_NONE == 0 && US_CODEC_LZ4 == 1 && US_CODEC_ZSTD == 2, "codecs' numbers lie on media");
_Static_assert(US_VALUE_MAX == 1 + US_CODEC_PAGE, "a page as it is");

/* The estimate is of runs alone.  lz4 finds hardly more in a shuffled page; zstd's entropy code gets it shorter by a quarter
 * and more.  Tried on heaps, programs, text, databases and arrays of numbers: so almost no second try is in vain. */
int us_pack_width(int codec, const void *page, uint32_t length) {
    if (length && length <= SHORT_ENOUGH)
        return 0;
    if (!length)
        length = US_CODEC_PAGE;
    int width;
    uint32_t estimate = us_shuffle_estimate(page, &width), most = codec == US_CODEC_ZSTD ? length + length / 8 : length - length / 8;
    return estimate < most && estimate < NOT_RANDOM ? width : 0;
}

static int pack_shuffled(int codec, int level, int width, const void *page, void *out, uint32_t room) {
    uint8_t shuffled[US_CODEC_PAGE];
    us_shuffle(width, page, shuffled);
    return us_compress(codec, level, shuffled, out, room);
}

int us_pack(int codec, int level, int shuffle, const void *page, void *out, uint32_t room, int *width) {
    *width = shuffle == US_SHUFFLE_AUTO ? 0 : shuffle;
    if (*width)
        return pack_shuffled(codec, level, *width, page, out, room);
    int plain = us_compress(codec, level, page, out, room);
    if (plain < 0 || shuffle != US_SHUFFLE_AUTO || codec == US_CODEC_NONE)
        return plain;
    int chosen = us_pack_width(codec, page, (uint32_t)plain);
    if (!chosen)
        return plain;
    uint8_t packed[US_CODEC_PAGE];
    uint32_t shorter = plain ? (uint32_t)plain - 1 : room;
    int length = pack_shuffled(codec, level, chosen, page, packed, shorter < sizeof packed ? shorter : sizeof packed);
    if (length <= 0)
        return plain;
    memcpy(out, packed, (size_t)length);
    *width = chosen;
    return length;
}

int us_unpack(int codec, int width, const void *packed, uint32_t length, void *page) {
    if (!width)
        return us_decompress(codec, packed, length, page);
    if (width != 4 && width != 8)
        return -EILSEQ;
    uint8_t shuffled[US_CODEC_PAGE];
    int rc = us_decompress(codec, packed, length, shuffled);
    if (!rc)
        us_unshuffle(width, shuffled, page);
    return rc;
}

static int fill(const uint8_t *pattern, uint32_t length, uint8_t *page) {
    if (length != sizeof(uint32_t))
        return -EILSEQ;
    for (uint32_t at = 0; at < US_CODEC_PAGE; at += length)
        memcpy(page + at, pattern, length);
    return 0;
}

int us_value_decode(const void *value, uint32_t length, void *page) {
    const uint8_t *tag = value, *content = tag + 1;
    if (length < 2 || length > US_VALUE_MAX)
        return -EILSEQ;
    unsigned kind = *tag & KIND_MASK, width = *tag >> US_VALUE_WIDTH_SHIFT;
    if (kind == US_VALUE_SAME && !width)
        return fill(content, length - 1, page);
    if (kind >= US_CODECS)
        return -EILSEQ;
    if (kind != US_CODEC_NONE)
        return us_unpack((int)kind, (int)width, content, length - 1, page);
    if (width || length != US_VALUE_MAX)
        return -EILSEQ;
    memcpy(page, content, US_CODEC_PAGE);
    return 0;
}

int us_value_join(const void *head, uint32_t length, const void *tail, uint32_t rest, void *page) {
    const uint8_t *tag = head;
    if (!length || rest > US_CODEC_PAGE || length + rest != US_VALUE_MAX || *tag != US_CODEC_NONE)
        return -EILSEQ;
    memcpy(page, tag + 1, length - 1);
    memcpy((uint8_t *)page + length - 1, tail, rest);
    return 0;
}
