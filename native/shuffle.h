/* Byte shuffle: the bytes of a page's words by their place in the word, first all first bytes, then all second ones.
 *
 * Numbers of one width differ in their low bytes and agree in their high ones: lz4 finds little in them as they are, and runs
 * when they are shuffled.  Nothing here knows what is done with a page afterwards.
 */
#ifndef US_SHUFFLE_H
#define US_SHUFFLE_H
#include <stdint.h>

#define US_SHUFFLE_OFF 0
#define US_SHUFFLE_AUTO (-1) /* else the bytes of a word: 4 or 8 */

/* One page; `width` is 4 or 8, `out` another page. */
void us_shuffle(int width, const void *page, void *out);
void us_unshuffle(int width, const void *shuffled, void *page);

/* About how many bytes a run-length code would need for the page when shuffled, and by which width. */
uint32_t us_shuffle_estimate(const void *page, int *width);
#endif
