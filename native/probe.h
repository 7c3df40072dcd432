/*
 * What this kernel lets this process do, found out by doing it.
 *
 * Every function opens what it needs for itself, closes it again and leaves the process as it was: the
 * descriptors are throw-away ones, because UFFDIO_API can be spoken only once on each. Sysctls, capabilities and
 * seccomp filters overlap in ways that no reading of files can settle, so the trial decides and the files only explain it.
 *
 * This module knows nothing of regions, pagers or verdicts: it reports errno values.
 */
#ifndef US_PROBE_H
#define US_PROBE_H

#include <stdint.h>

/* Each attempt is 0 or -errno. */
struct us_probe_userfault {
    int32_t device;    /* /dev/userfaultfd and USERFAULTFD_IOC_NEW: the mode of that file decides */
    int32_t syscall;   /* userfaultfd(2) serving kernel-mode faults too: capability or sysctl decide */
    int32_t user_mode; /* userfaultfd(2) with UFFD_USER_MODE_ONLY: anybody, unless seccomp refuses */
    int32_t api;       /* UFFDIO_API on the first descriptor that opened */
    int32_t move;      /* one page really moved by UFFDIO_MOVE */
    int32_t reserved;
    uint64_t features; /* what UFFDIO_API offers */
};

void us_probe_userfault(struct us_probe_userfault *out);

/* 0 when this process may drop several ranges of its own in one process_madvise(2): Linux 6.13, and filters dislike it. */
int us_probe_vectored_drop(void);

/* 0 when one of two sibling processes can read the other's memory after being named by PR_SET_PTRACER. */
int us_probe_readv(void);

/* 0 when io_uring_setup(2) works. */
int us_probe_io_uring(void);

/* 1 when KSM may merge this process's memory as a whole, 0 when not, -EINVAL on kernels that cannot say. */
int us_probe_merging(void);

#endif
