#define _GNU_SOURCE
#include "residency.h"
#include <sys/mman.h>

#define PAGE 4096u

int us_is_resident(uint64_t address) {
    unsigned char seen = 0;
    return !mincore((void *)(uintptr_t)(address & ~(uint64_t)(PAGE - 1)), PAGE, &seen) && seen & 1;
}
