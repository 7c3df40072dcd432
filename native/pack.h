/* A page of 4 KiB made short: byte shuffle where it helps, then a codec.  And values: packed pages that describe themselves.
 *
 * A value is a tag byte and what the tag says.  Tag: kind 4 | width of the shuffle 4.  A kind is a codec of codec.h
 * (US_CODEC_NONE: the page as it is), or US_VALUE_SAME: four bytes, of which the page is full.  Values lie on media, so these
 * numbers never change their meaning.  backends/values.py makes them; they are read here, where it is quick.
 */
#ifndef US_PACK_H
#define US_PACK_H
#include <stdint.h>

#define US_VALUE_SAME 15
#define US_VALUE_WIDTH_SHIFT 4
#define US_VALUE_MAX 4097u /* bytes of the longest value */

/* The width by which it is worth shuffling a page that `codec` made `length` bytes of (0: did not fit anywhere) as it is; 0
 * for none. */
int us_pack_width(int codec, const void *page, uint32_t length);

/* Pack a page into at most `room` bytes: the bytes used, 0 where they do not suffice, -ENOMEM.  `shuffle` is a width, or one of
 * US_SHUFFLE_*; what was done is in `width`, 0 for no shuffle. */
int us_pack(int codec, int level, int shuffle, const void *page, void *out, uint32_t room, int *width);

/* The page: 0, -EILSEQ, -ENOMEM. */
int us_unpack(int codec, int width, const void *packed, uint32_t length, void *page);

/* The page that a value stands for: 0, -EILSEQ where it stands for none, -ENOMEM.  Its codec has to be open. */
int us_value_decode(const void *value, uint32_t length, void *page);

/* The same for a page kept as it is, whose value was cut in two: 0, -EILSEQ. */
int us_value_join(const void *head, uint32_t length, const void *tail, uint32_t rest, void *page);
#endif
