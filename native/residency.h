/* Whether reading mapped memory would wait for a medium. */
#ifndef US_RESIDENCY_H
#define US_RESIDENCY_H
#include <stdint.h>

/* 1 where the page that holds `address` is in memory (of a file: in the page cache), 0 where not, also where nothing is
 * mapped.  It may leave a moment later. */
int us_is_resident(uint64_t address);
#endif
