/* userfaultfd ioctls as functions: 0 or -errno, with the partial progress that the kernel reports. */
#ifndef US_UFFD_H
#define US_UFFD_H
#include "uapi.h"
#include <errno.h>
#include <stdbool.h>
#include <sys/ioctl.h>

static inline int us_uffd_wake(int uffd, uint64_t start, uint64_t len) {
    struct us_uffd_range range = {start, len};
    return ioctl(uffd, US_IOC_WAKE, &range) ? -errno : 0;
}

/* `done` is the number of bytes installed; the page after them is the one the error speaks of. */
static inline int us_uffd_copy(int uffd, uint64_t dst, const void *src, uint64_t len, uint64_t mode, uint64_t *done) {
    struct us_uffd_copy copy = {.dst = dst, .src = (uint64_t)(uintptr_t)src, .len = len, .mode = mode};
    int rc = ioctl(uffd, US_IOC_COPY, &copy) ? -errno : 0;
    *done = copy.copy > 0 ? (uint64_t)copy.copy : 0;
    return rc;
}

static inline int us_uffd_protect(int uffd, uint64_t start, uint64_t len) {
    struct us_uffd_protect protect = {.range = {start, len}, .mode = US_WP_PROTECT};
    return ioctl(uffd, US_IOC_PROTECT, &protect) ? -errno : 0;
}

static inline int us_uffd_unprotect(int uffd, uint64_t start, uint64_t len) {
    struct us_uffd_protect protect = {.range = {start, len}, .mode = 0};
    return ioctl(uffd, US_IOC_PROTECT, &protect) ? -errno : 0;
}

static inline int us_uffd_poison(int uffd, uint64_t start, uint64_t len) {
    struct us_uffd_poison poison = {.range = {start, len}, .mode = 0};
    return ioctl(uffd, US_IOC_POISON, &poison) ? -errno : 0;
}

static inline int us_uffd_move(int uffd, uint64_t dst, uint64_t src, uint64_t len, uint64_t *done) {
    struct us_uffd_move move = {.dst = dst, .src = src, .len = len, .mode = 0};
    int rc = ioctl(uffd, US_IOC_MOVE, &move) ? -errno : 0;
    *done = move.move > 0 ? (uint64_t)move.move : 0;
    return rc;
}

static inline int us_uffd_register(int uffd, uint64_t start, uint64_t len, uint64_t mode) {
    struct us_uffd_register reg = {.range = {start, len}, .mode = mode};
    return ioctl(uffd, US_IOC_REGISTER, &reg) ? -errno : 0;
}

static inline int us_uffd_unregister(int uffd, uint64_t start, uint64_t len) {
    struct us_uffd_range range = {start, len};
    return ioctl(uffd, US_IOC_UNREGISTER, &range) ? -errno : 0;
}

/* Open a userfaultfd: /dev/userfaultfd first (its permissions are the administrator's word), then the system call. */
int us_uffd_open(bool user_mode_only, uint64_t features, uint64_t *granted);
#endif
